"""Which architectures are exact: docs/models.md is held to what a tiny random model of each one does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import files_of, save_model, tiny_model
from transformers import AutoConfig

from asyncopd.errors import ConfigError, EngineError
from asyncopd.models.load import build_causal_lm, load_pretrained
from asyncopd.models.sampling import SamplerSettings
from asyncopd.rollout.hf import HfSampler
from flows.check_model import agree

DOCUMENT = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
TOLERANCE_NATS = 5e-6
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
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
# Heads of keys and of values differ in width; the first layer has no experts.
DEEPSEEK = {
    **EXPERTS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "glm4_moe", "ernie4_5_moe", "phimoe", "flex_olmo"), EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), DEEPSEEK),
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def architecture(name: str, **changes: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": name, **CHANGES.get(name, {}), **changes}


def table(title: str) -> list[list[str]]:
    """Rows of the table below a heading of docs/models.md, without its header."""
    section = DOCUMENT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in row] for row in rows[1:]]


EXACT = [name for row in table("Exact") for name in re.findall(r"\w+", row[0])]
REFUSED = table("Refused")
UNKNOWN = "brand_new"


@pytest.mark.parametrize("name", EXACT)
def test_sampler_scorer_and_learner_compute_the_models_own_log_probs(name: str, tmp_path: Path) -> None:
    made = build_causal_lm(architecture(name), seed=0)
    files = files_of(save_model(tmp_path, made))
    files.check(needed_context=32)
    model = load_pretrained(files)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 24, rng.integers(1, 7)).astype(np.int32) for _ in range(6)]
    found = agree(model, prompts, stop_ids=(1,), dtype=torch.float32)
    assert max(found.differences.values()) < TOLERANCE_NATS, found.differences
    assert sum(len(t.response_ids) for t in found.trajectories) > 12


@pytest.mark.parametrize(("name", "setting", "why"), REFUSED, ids=[f"{row[0]}-{row[1]}" for row in REFUSED])
def test_what_is_refused_is_refused_from_config_json(name: str, setting: str, why: str, tmp_path: Path) -> None:
    changes = json.loads(f"{{{setting}}}") if ":" in setting else {}
    described = {"model_type": name, **changes}
    config = AutoConfig.for_model(**described).to_dict() if name != UNKNOWN else described
    save_model(tmp_path, tiny_model())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["XForCausalLM"]}))
    with pytest.raises(ConfigError, match=re.escape(why)):
        files_of(tmp_path).check(needed_context=32)


def test_an_attention_that_the_slot_cache_cannot_serve_is_found_by_trial() -> None:
    # Differential attention asks twice a layer, and the second answer overwrote the cache of the first: sampled
    # log-probs were 3.4 nats off, in silence.
    model = build_causal_lm(architecture("diffllama"), seed=0)
    with pytest.raises(EngineError, match="hidden states through the slot cache differ by"):
        HfSampler(model, SamplerSettings(slots=2, max_context=16, stop_ids=(1,), seed=0))


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"attn_pdrop": 0}])
def test_a_configuration_that_transformers_refuses_is_one_sentence(changes: dict[str, Any]) -> None:
    # The library's validation has exceptions of its own; it wants MPT's dropouts as they were typed.
    with pytest.raises(ConfigError, match="cannot be built by transformers"):
        build_causal_lm({**architecture("mpt" if "attn_pdrop" in changes else "llama"), **changes}, seed=0)
