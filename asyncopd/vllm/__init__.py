"""vLLM as sampler and as teacher; nothing else imports vllm."""
