"""Building, serialising and refusing models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hf_models import FAMILIES, files_of, save_model, tiny_model
from transformers import PreTrainedModel

from asyncopd.errors import ConfigError, EngineError
from asyncopd.models import files
from asyncopd.models.causal_lm import load_safetensors, to_safetensors, weights_digest
from asyncopd.models.load import architecture_of_size, build_causal_lm, load_pretrained

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_survive_the_way_through_bytes_exactly(family: str, changes: dict[str, Any]) -> None:
    source, target = tiny_model(family, seed=1, **changes), tiny_model(family, seed=2, **changes)
    assert weights_digest(source) != weights_digest(target)
    load_safetensors(target, to_safetensors(source))
    assert_equal_states(target.state_dict(), source.state_dict())
    assert to_safetensors(target) == to_safetensors(source)
    assert weights_digest(target) == weights_digest(source)
    # Tied weights stay tied: one tensor, not two equal ones.
    tied = target.get_output_embeddings().weight is target.get_input_embeddings().weight
    assert tied == changes["tie_word_embeddings"]


def test_weights_are_converted_to_the_models_dtype() -> None:
    source, target = tiny_model(), tiny_model(seed=1).to(torch.bfloat16)
    load_safetensors(target, to_safetensors(source))
    assert {parameter.dtype for parameter in target.parameters()} == {torch.bfloat16}
    assert_equal_states(target.state_dict(), {k: v.to(torch.bfloat16) for k, v in source.state_dict().items()})


def test_wrong_tensors_are_named_and_nothing_is_copied() -> None:
    model = tiny_model()
    before = state(model)
    tensors = safetensors.torch.load(to_safetensors(tiny_model(seed=1)))
    name = "model.layers.1.mlp.up_proj.weight"
    shaped = {**tensors, name: tensors[name][:5].contiguous()}
    for wrong, complaint in (
        ({k: v for k, v in tensors.items() if k != name}, f"{name} should be .* and is no such tensor"),
        ({**tensors, "model.extra": torch.ones(2)}, "model.extra should be no such tensor"),
        (shaped, f"{name} should be .* and is \\(5, 32\\)"),
    ):
        with pytest.raises(EngineError, match=complaint):
            load_safetensors(model, safetensors.torch.save(wrong))
    assert_equal_states(model.state_dict(), before)


def test_building_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = tiny_model(seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert_equal_states(tiny_model(seed=3).state_dict(), first.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_survives_json_and_a_directory(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    rebuilt = build_causal_lm(json.loads(json.dumps(model.config.to_dict())), seed=0)
    load_safetensors(rebuilt, to_safetensors(model))
    assert weights_digest(rebuilt) == weights_digest(model)
    loaded = load_pretrained(files_of(save_model(tmp_path, model)))
    assert_equal_states(loaded.state_dict(), model.state_dict())


def test_parameter_counts_are_those_the_docstring_states() -> None:
    for family, expected in (("llama", (68_784, 395_808)), ("qwen3", (68_832, 395_952)), ("gpt2", (70_944, 364_320))):
        counts = tuple(
            build_causal_lm(
                architecture_of_size(
                    num_layers=layers,
                    hidden_size=width,
                    num_heads=4,
                    vocab_size=42,
                    max_positions=256,
                    eos_id=1,
                    pad_id=0,
                    model_type=family,  # type: ignore[arg-type]
                ),
                seed=0,
            ).num_parameters()
            for layers, width in ((2, 48), (3, 96))
        )
        assert counts == expected


@pytest.mark.parametrize(
    ("architecture", "complaint"),
    [
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 2}, "final_logit_softcapping"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logit_scale = 0.0625"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window = 8"),
        ({"model_type": "llama", "rope_parameters": DYNAMIC_ROPE}, "rope_type dynamic"),
        ({"model_type": "no_such_model"}, "cannot be built by transformers"),
        ({"model_type": "mamba"}, "cannot be built by transformers"),
    ],
)
def test_architectures_that_would_be_silently_wrong_are_refused(architecture: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build_causal_lm({**SIZES, **architecture}, seed=0)


def test_unknown_causes_are_found_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    # Granite divides its logits; here as if nobody had known that.
    monkeypatch.setattr(files, "_CHANGES", {})
    with pytest.raises(ConfigError, match="packed into one row differ"):
        build_causal_lm({**SIZES, "model_type": "granite", "logits_scaling": 2.0}, seed=0)
    # ALiBi wants its own mask.
    with pytest.raises(ConfigError, match="does not take 4-D attention masks"):
        build_causal_lm({"model_type": "falcon", "alibi": True, "hidden_size": 16, "num_attention_heads": 2}, seed=0)


def test_a_directory_without_a_model_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a directory with config\.json"):
        load_pretrained(files_of(tmp_path))
