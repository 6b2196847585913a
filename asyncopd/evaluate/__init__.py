"""Evaluation: sampled-decoding accuracy and KL to the teacher of chosen policy versions."""
