"""`asyncopd check-model` and `export-model`, on small models in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import files_of, save_model, tiny_model, weights
from synthetic_run import new_log
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncopd import cli
from asyncopd.config import load_config
from asyncopd.models.load import load_pretrained
from asyncopd.types import PolicyVersion
from storage.stores import open_store


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_a_model_that_the_engines_agree_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = tiny_model(max_position_embeddings=128), tiny_model(seed=1, num_hidden_layers=3)
    # More rows than ids: they get no mass in any engine.
    paths = [str(save_model(tmp_path / name, model, num_ids=20)) for name, model in (("s", student), ("t", teacher))]
    facts_path = tmp_path / "facts.json"
    # No letter of the prompts is a token of this model; they are all unknown, which is id 0.
    assert (
        status_of("check-model", paths[0], "--teacher", paths[1], "--dtype", "float32", "--json", str(facts_path)) == 0
    )
    facts: dict[str, Any] = json.loads(facts_path.read_text())
    assert facts["student"]["difference_nats"] < 5e-6
    assert (facts["student"]["ids"], facts["student"]["rows"]) == (20, 24)
    assert list(facts["student"]["stop_ids"]) == ["1"]
    assert facts["teacher"]["kl_of_student_nats"] > 0.01
    said = capsys.readouterr().out
    assert "a published version" in said
    assert "student: loading" in said


@pytest.mark.parametrize("dropped", ["7", "0 1"])
def test_a_model_that_no_run_would_take(dropped: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save_model(tmp_path, tiny_model()))
    assert status_of("check-model", path, "--drop-layers", *dropped.split()) == 2
    assert "student.drop_layers: " in capsys.readouterr().err


def test_two_tokenizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = save_model(tmp_path / "s", tiny_model()), save_model(tmp_path / "t", tiny_model(), first=0x3400)
    assert status_of("check-model", str(student), "--teacher", str(teacher)) == 2
    assert "tokenizers differ" in capsys.readouterr().err


def test_a_student_without_layers_leaves_a_run_as_a_plain_folder(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model(num_hidden_layers=3), num_ids=20)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    questions = tmp_path / "train.jsonl"
    questions.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 2)
    config = load_config(
        {
            "storage": {"root": str(tmp_path / "runs")},
            "task": {"kind": "text", "train_path": str(questions), "tokenizer": "student", "max_prompt_tokens": 32},
            "student": {"kind": "pretrained", "path": str(tmp_path / "model"), "drop_layers": [1]},
            "teacher": {"engine": "hf", "model": {"kind": "pretrained", "path": str(tmp_path / "model")}},
            "rollout": {"max_new_tokens": 16},
        }
    )
    log = new_log(open_store(config.storage.root), config, "healed")
    student = load_pretrained(files_of(tmp_path / "model", drop_layers=(1,)))
    log.publish_architecture({"config.json": json.dumps(student.config.to_dict()).encode()})
    log.publish_policy(weights(student), worker="learn-0")
    trained = weights(student)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    log.publish_policy(weights(student, 1), worker="learn-0")
    assert log.config()["student"]["drop_layers"] == [1]

    out = tmp_path / "out"
    assert status_of("export-model", "healed", "--root", config.storage.root, "--output", str(out)) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert "num_ids" not in json.loads((out / "config.json").read_text())
    assert loaded.generation_config.eos_token_id == [1, 5]
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 1
    # It is a model like any other, with its stop ids and its ids that exist.
    again = load_pretrained(files_of(out))
    assert again.config.num_ids == 20
    assert again.config.num_hidden_layers == 2

    assert status_of("export-model", "healed", "--root", config.storage.root, "--output", str(out)) == 2
    first = ["--output", str(tmp_path / "first"), "--policy-version", "0"]
    assert status_of("export-model", "healed", "--root", config.storage.root, *first) == 0
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == trained.safetensors
    missing = ["--output", str(tmp_path / "none"), "--policy-version", "9"]
    assert status_of("export-model", "healed", "--root", config.storage.root, *missing) == 2
    assert PolicyVersion(1) == log.latest_policy()
