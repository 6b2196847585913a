"""What the files of a model show to be wrong is refused by `preflight`: no torch, no engine, two seconds at most."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
import safetensors.torch
import yaml
from hf_models import CHATML, save_chat_tokenizer, save_model, tiny_model
from tokenizers import Tokenizer

from asyncopd.config import RunConfig, load_config
from asyncopd.errors import ConfigError
from asyncopd.models.files import ModelFiles
from flows.preflight import preflight
from flows.train import _open_or_create
from storage.runs import list_runs
from storage.stores import open_store

QUESTION = json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model of four layers; copied, because making one takes a second."""
    return save_model(tmp_path_factory.mktemp("saved") / "model", tiny_model(num_hidden_layers=4))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return copy_of(saved, tmp_path / "model")


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def sections(student: Path, teacher: Path | None = None, **task: Any) -> dict[str, Any]:
    """A run of two pretrained models; needs a context of 64 + 32 tokens."""
    data = student.parent / "train.jsonl"
    data.write_text(QUESTION + QUESTION.replace("1 + 1", "2 + 0"))
    return {
        **pipeline.SMALL,
        "storage": {"root": str(student.parent / "runs")},
        "student": {"kind": "pretrained", "path": str(student)},
        "teacher": {"engine": "hf", "model": {"kind": "pretrained", "path": str(teacher or student)}},
        "task": {"kind": "text", "train_path": str(data), "max_prompt_tokens": 64, "tokenizer": "student", **task},
    }


def run_of(student: Path, teacher: Path | None = None, **task: Any) -> RunConfig:
    return load_config(sections(student, teacher, **task))


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; a value of None removes its key."""
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not None}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.torch.save(edit(safetensors.torch.load(path.read_bytes())), {"format": "pt"}))


def test_a_sound_model_passes(folder: Path) -> None:
    preflight(run_of(folder))


# -- config.json ------------------------------------------------------------------------------------------------------
QWEN3_5 = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "no_such_model"}, "model_type 'no_such_model', which this transformers cannot generate"),
        ({"model_type": "llava"}, "model_type 'llava', which this transformers cannot generate"),
        ({"model_type": None}, "model_type None, which this transformers cannot generate"),
        (
            {"model_type": "phi_own", "auto_map": {"AutoModel": "x.Y"}},
            r"code of its own \(auto_map\), which is not run",
        ),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"says architectures \['BertForMaskedLM'\]"),
        ({"model_type": "bert", "architectures": None}, "Is it an embedding or reward model"),
        ({"model_type": "xlm-roberta", "architectures": None}, "Is it an embedding or reward model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Is it an embedding or reward model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "model_type 't5', which this"),
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0},
            "final_logit_softcapping = 30.0 changes the logits",
        ),
        ({"model_type": "granite", "logits_scaling": 8.0}, "logits_scaling = 8.0 changes the logits"),
        ({"model_type": "cohere", "logit_scale": 0.0625}, "logit_scale = 0.0625 changes the logits"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "llama4", "attention_chunk_size": 8192}, "attention_chunk_size = 8192"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, "linear_attention"),
        (QWEN3_5, "linear_attention"),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 16}, "carry a state along .* linear_num_key_heads"),
        ({"model_type": "bamba", "mamba_d_state": 16}, "carry a state along"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "does not run on torch's scaled_dot_product"),
        ({"model_type": "gpt_neo"}, "does not run on torch's scaled_dot_product_attention"),
        ({"rope_scaling": {"type": "su"}, "rope_parameters": None}, "rope_type su changes with the longest"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type dynamic changes with the longest"),
        ({"max_position_embeddings": 95}, "a context of 95 tokens, .* = 96"),
        ({"max_position_embeddings": None, "n_positions": 95}, "a context of 95 tokens, .* = 96"),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 95}}, "a context of 95 tokens"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\) and cannot be trained"),
        ({"vocab_size": 23}, "has 23 rows in its embedding and a tokenizer with 24 ids"),
        ({"vocab_size": 25}, r"says vocab_size 25, and .*model.safetensors holds an embedding of shape \[24, 32\]"),
        ({"num_hidden_layers": 5}, r"says 5 layers, .* none of the layers \[4\]. Is the download complete"),
    ],
)
def test_a_configuration_that_cannot_work(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=rf"student\.path: .*{said}"):
        preflight(run_of(folder))


def test_windows_that_are_not_used_are_no_obstacle(folder: Path) -> None:
    # As Qwen2.5 says it.
    edit_json(folder / "config.json", model_type="qwen2", sliding_window=32768, use_sliding_window=False)
    preflight(run_of(folder))


def test_a_teacher_is_checked_as_a_student_is(folder: Path, saved: Path) -> None:
    edit_json(folder / "config.json", mamba_d_state=16)
    with pytest.raises(ConfigError, match=r"teacher\.path: .*carry a state along"):
        preflight(run_of(copy_of(saved, folder.parent / "student"), folder))


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b"{"), ("config.json", '{"a": 1}'.encode("utf-16")), ("config.json", b"[]")],
)
def test_a_configuration_that_is_no_json_object(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"student: .*config\.json (is not JSON in UTF-8|holds list; expected an obj)"
    ):
        preflight(run_of(folder))


# -- weights ----------------------------------------------------------------------------------------------------------
def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        *(
            (without(f"layers.{layer}.mlp.up_proj"), rf"\['model.layers.{layer}.mlp.up_proj.weight'\] are missing")
            for layer in range(4)
        ),
        (without("layers.3."), r"says 4 layers, .* none of the layers \[3\]"),
        (
            lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()},
            r"names that begin with 'module\.'",
        ),
        (
            lambda tensors: {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()},
            "saved from within a wrapper",
        ),
        (
            lambda tensors: tensors | {(name := "model.layers.3.mlp.up_proj.weight"): tensors[name][:5].contiguous()},
            r"model.layers.3.mlp.up_proj.weight has shape \[5, 32\]; expected \[112, 32\], as in the other layers",
        ),
        (
            lambda tensors: tensors | {(name := "lm_head.weight"): tensors[name][:5].contiguous()},
            r"holds an embedding of shape \[5, 32\]. Expected 24 rows",
        ),
    ],
)
def test_weights_of_another_architecture(
    folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]], said: str
) -> None:
    edit_weights(folder, edit)
    with pytest.raises(ConfigError, match=rf"student\.path: .*{said}"):
        preflight(run_of(folder))


def test_layers_of_two_kinds_are_no_damage(folder: Path) -> None:
    # Experts in every second layer.
    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            key.replace("1.mlp.", "1.mlp.experts.").replace("3.mlp.", "3.mlp.experts."): t for key, t in tensors.items()
        }

    edit_weights(folder, edit)
    preflight(run_of(folder))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1234567\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole[:-100], "header says [0-9]+. Is it cut off"),
        (lambda whole: whole[:100], "no safetensors file. Is it cut off"),
        (lambda whole: b"", r"\(0 bytes\) is no safetensors file"),
        (lambda whole: LFS_POINTER, "is a pointer of Git LFS: run `git lfs pull`"),
        (lambda whole: struct.pack("<Q", 2) + b"[]", "no safetensors file"),
        (lambda whole: struct.pack("<Q", 9) + b'{"a": {}}', "no safetensors file"),
    ],
)
def test_a_file_of_weights_that_is_none(folder: Path, change: Callable[[bytes], bytes], said: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=said):
        preflight(run_of(folder))


def test_no_weights_and_weights_of_other_kinds(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no model.safetensors .* but \['pytorch_model.bin'\]. Pickled weights"):
        preflight(run_of(folder))


def test_shards_that_are_missing_or_lack_a_tensor(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=4)
    folder = save_model(tmp_path / "model", model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    preflight(run_of(folder))
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole.replace("model.norm.weight", "model.another.weight"))
    with pytest.raises(ConfigError, match=r"names tensors that its files do not hold: \['model.another.weight'\]"):
        preflight(run_of(folder))
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is no index of weights"):
        preflight(run_of(folder))
    index.write_text(whole)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=rf"names \['{shards[1].name}'\], which are not there"):
        preflight(run_of(folder))


def test_a_tied_model_whose_head_differs(tmp_path: Path) -> None:
    # A3: the learner trained two matrices, and samplers tied them.
    folder = save_model(tmp_path / "model", tiny_model())
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="says tie_word_embeddings: true, and its weights hold a head that differs"):
        preflight(run_of(folder))
    edit_weights(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    preflight(run_of(folder))


# -- tokenizers -------------------------------------------------------------------------------------------------------
def test_the_digest_leaves_out_what_does_not_decide_ids(folder: Path, saved: Path) -> None:
    # A9: the same tokenizer, saved after it was used with padding and truncation.
    path = folder / "tokenizer.json"
    again = Tokenizer.from_file(str(path))
    again.enable_padding(length=4)
    again.enable_truncation(8)
    again.save(str(path))
    assert path.read_bytes() != (saved / "tokenizer.json").read_bytes()
    preflight(run_of(copy_of(saved, folder.parent / "student"), folder))


def test_special_tokens_with_other_ids_are_another_tokenizer(folder: Path, saved: Path) -> None:
    # A1
    student = copy_of(saved, folder.parent / "student")
    for path, specials in ((student, ["<a>", "<b>"]), (folder, ["<b>", "<a>"])):
        edit_json(path / "config.json", vocab_size=26)
        edit_weights(
            path,
            lambda tensors: {
                key: tensor.repeat(2, 1)[:26].contiguous() if len(tensor) == 24 else tensor
                for key, tensor in tensors.items()
            },
        )
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens(specials)
        tokenizer.save(str(path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"tokenizers differ: .*must share one tokenizer"):
        preflight(run_of(student, folder))
    preflight(run_of(student, student))


def test_a_changed_tokenizer_is_read_again(folder: Path) -> None:
    # The service lives for months.
    preflight(run_of(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match="has 24 rows in its embedding and a tokenizer with 25 ids"):
        preflight(run_of(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": {"type": "Rune"}}', r"student: .*tokenizer\.json cannot serve as tokenizer\.json"),
        ("{", r"student: .*tokenizer\.json cannot serve as tokenizer\.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(folder: Path, content: str, said: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        preflight(run_of(folder))


def test_ids_with_holes_are_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    del described["model"]["vocab"]["\u4e05"]
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"leaves out 1 ids below 24 \(\[5\] …\). Expected ids without holes"):
        preflight(run_of(folder))


def test_every_stop_id_of_the_generation_settings_counts(folder: Path) -> None:
    # A6
    def stop_ids() -> frozenset[int]:
        return ModelFiles(run_of(folder).student).stop_ids  # type: ignore[arg-type]

    edit_json(folder / "generation_config.json", eos_token_id=[1, 7])
    assert stop_ids() == {1, 7}
    edit_json(folder / "generation_config.json", eos_token_id=5)
    assert stop_ids() == {5}
    for generation in ('{"eos_token_id": null}', "{}"):
        (folder / "generation_config.json").write_text(generation)
        edit_json(folder / "config.json", eos_token_id=[2, 3])
        assert stop_ids() == {2, 3}
    (folder / "generation_config.json").unlink()
    assert stop_ids() == {2, 3}


# -- chat templates ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty") / "model"
    tiny_model(vocab_size=259).save_pretrained(folder)
    return save_chat_tokenizer(folder)


DATED = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}Today is {{ day }}. " + CHATML
REFUSES = "{{ raise_exception('Only systems speak here') }}"


@pytest.mark.parametrize(
    ("template", "task", "said"),
    [
        ("", {}, "has no chat template. Use prompt_format plain"),
        (DATED, {}, "asks for today's date, .* Set task.chat_date, for example"),
        (DATED, {"chat_date": "2026-01-01"}, None),
        (DATED, {"chat_options": {"day": "1 Jan 2026"}}, None),
        (DATED, {"prompt_format": "plain"}, None),
        (REFUSES, {}, "Only systems speak here"),
    ],
)
def test_chat_templates(chatty: Path, tmp_path: Path, template: str, task: dict[str, Any], said: str | None) -> None:
    folder = copy_of(chatty, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    if template:
        edit_json(folder / "tokenizer_config.json", chat_template=template)
    config = run_of(folder, **{"prompt_format": "chat", **task})
    if said is None:
        preflight(config)
        return
    with pytest.raises(ConfigError, match=said):
        preflight(config)


# -- cost -------------------------------------------------------------------------------------------------------------
def test_a_refusal_takes_two_seconds_and_no_torch(chatty: Path, tmp_path: Path) -> None:
    # With a vocabulary as large as Qwen's; `chat`, so that a template is rendered too.
    folder = copy_of(chatty, tmp_path / "model")
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    letters = list(described["model"]["vocab"])
    pairs = [(first, second) for first in letters for second in letters]
    described["model"]["vocab"] |= {"".join(pair): len(letters) + number for number, pair in enumerate(pairs)}
    described["model"]["merges"] = pairs
    for number, token in enumerate(described["added_tokens"]):
        token["id"] = len(letters) + len(pairs) + number
    path.write_text(json.dumps(described))
    edit_json(folder / "config.json", vocab_size=len(letters) + len(pairs) + 3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections(folder, prompt_format="chat")))
    code = """
import sys, time
from asyncopd.config import load_config
from asyncopd.errors import ConfigError
from flows.preflight import preflight
from flows.train import _open_or_create
from storage.runs import list_runs
from storage.stores import open_store
config = load_config(sys.argv[1])
began = time.process_time()
try:
    preflight(config)
except ConfigError as error:
    print(time.process_time() - began, {"torch", "transformers", "vllm"} & set(sys.modules), error, sep="|")
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True)
    seconds, heavy, said = ended.stdout.split("|")
    assert "Expected 65795 rows" in said
    assert heavy == "set()"
    assert float(seconds) < 2.0


def test_the_flow_refuses_before_a_run_exists(folder: Path) -> None:
    edit_json(folder / "config.json", max_position_embeddings=95)
    asked = run_of(folder)
    with pytest.raises(ConfigError, match=r"a context of 95 tokens"):
        _open_or_create(asked.model_dump(mode="json"), {}, "refused", None)
    assert list_runs(open_store(asked.storage.root)) == []
