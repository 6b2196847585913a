"""Which architectures are exact: sampler, scorer and learner against transformers' own forward pass (docs/models.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncopd.errors import ConfigError
from asyncopd.models.load import build_causal_lm
from flows.check_model import agree

torch.set_num_threads(1)

TOLERANCE_NATS = 5e-6
NAMES = {
    "num_hidden_layers": ("num_layers", "n_layer", "n_layers"),
    "hidden_size": ("n_embd", "d_model"),
}
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}, "gpt2": {}, "gpt_neox": {}, "gptj": {"rotary_dim": 8, "no": "head_dim"}, "opt": {}, "bloom": {},
    "phi": {}, "phi3": {"sliding_window": None}, "olmo": {}, "olmo2": {}, "olmo3": {}, "granite": {}, "granitemoe": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "falcon": {"no": "head_dim", "new_decoder_architecture": True, "num_kv_heads": 2}, "stablelm": {}, "starcoder2": {},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "qwen2_moe": {**EXPERTS,"shared_expert_intermediate_size": 16}, "olmoe": EXPERTS,
    "deepseek_v3": {**EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v2": {**EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "glm": {}, "glm4": {}, "glm4_moe": EXPERTS, "smollm3": {}, "helium": {}, "ernie4_5": {}, "ernie4_5_moe": EXPERTS, "exaone4": {"sliding_window": None, "layer_types": ["full_attention"]*2}, "nemotron": {}, "cohere": {}, "cohere2": {}, "seed_oss": {}, "arcee": {}, "apertus": {}, "gpt_oss": EXPERTS, "hunyuan_v1_dense": {}, "minimax": {}, "dots1": EXPERTS, "gpt_bigcode": {}, "codegen": {"rotary_dim": 8}, "mpt": {}, "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]]}, "persimmon": {}, "jetmoe":{}, "lfm2": {}, "qwen3_next": EXPERTS, "mamba": {}, "jamba": EXPERTS, "bitnet": {}, "diffllama": {}, "xglm": {}, "biogpt": {}, "granitemoehybrid": {}, "zamba2": {}, "ministral": {}, "llama4_text": EXPERTS, "phimoe": EXPERTS, "aria_text": {}, "doge": {}, "bamba": {}, "rwkv": {}, "qwen3_5_text": {}, "vaultgemma": {}, "flex_olmo": EXPERTS,
}

import sys, time
if __name__ == "__main__":
    for name in (sys.argv[1:] or ARCHITECTURES):
        s=time.time()
        try:
            model = build_causal_lm({k: v for k, v in {**SIZES, "model_type": name, **ARCHITECTURES[name]}.items() if k not in ("no", ARCHITECTURES[name].get("no"))}, seed=0)
            rng = np.random.default_rng(0)
            prompts = [rng.integers(2, 24, rng.integers(1, 7)).astype(np.int32) for _ in range(10)]
            a = agree(model, prompts, stop_ids=(1,), dtype=torch.float32)
            print(name, {k: f"{v:.1e}" for k, v in a.differences.items()}, model.num_parameters(), f"{time.time()-s:.1f}", flush=True)
        except Exception as e:
            print(name, "REFUSED" if isinstance(e, ConfigError) else "FAILED", type(e).__name__, str(e)[-330:], f"{time.time()-s:.1f}", flush=True)
