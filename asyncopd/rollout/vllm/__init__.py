"""The vLLM sampler: `sampler` runs in the role's process, `recorder` inside vLLM's engine process."""
