"""Configuration: what is refused, and how well the refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from asyncopd.config import load_config, parse_override
from asyncopd.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert "../" not in path.read_text()  # everything it names comes with the repository, or by a name
    assert config == load_config(config.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("gsm8k_qwen3", "9ece4c05337e3bfc"),
        ("gsm8k_tiny", "efb9308d424daf63"),
        ("quickstart", "96b383c042827b60"),
        ("smollm2", "d7ae8b16a51550a9"),
        ("smollm2_vllm", "76bacd9042b74ef6"),
        ("walk_neural", "ba5859ac40b422f9"),
        ("walk_vllm", "69e39397932821d2"),
    ],
)
def test_a_configuration_keeps_its_digest(name: str, digest: str) -> None:
    # Stored runs carry it. It may change only with a setting, or its default, that changes what a run computes.
    assert load_config(ROOT / "configs" / f"{name}.yaml").digest() == digest


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"learner": {"lrr": 1}}, "learner.lrr: unknown key. Nearest known key: learner.lr"),
        ({"stalenes": {}}, "stalenes: unknown key. Nearest known key: staleness"),
        ({"max_staleness": 1}, "max_staleness: unknown key. Nearest known key: staleness.max_staleness"),
        ({"evaluate": {"xyz": 1}}, "evaluate.xyz: unknown key. Known keys of evaluate: dtype, every, num_prompts"),
        ({"student": {"kind": "big"}}, "'kind' is 'big'; expected one of 'tiny', 'pretrained'"),
        ({"student": {"kind": "tiny", "num_layer": 2}}, "Nearest known key: student.num_layers"),
        ({"learner": {"lr": "fast"}}, "learner.lr: expected a number (found 'fast')"),
        ({"staleness": {"max_staleness": -1}}, "staleness.max_staleness: must be at least 0"),
        ({"rollout": {"shard_size": 48}}, "rollout.shard_size 48 must divide learner.batch_size 64"),
        ({"rollout": {"max_new_tokens": 254}}, "do not fit max_context 256"),
        ({"loss": {"name": "head_tial"}}, "Nearest: 'head_tail'"),
        ({"loss": "head_tail"}, "loss: estimator: expected a section with a `name`"),
        ({"loss": {"name": "head_tail", "head": 0}}, "loss.head: must be at least 1 (found 0)"),
        ({"kl_weight": 1}, "Nearest known key: loss.kl_weight"),
        ({"student": {"kind": "tiny", "hidden_size": 50}}, "must be a multiple of"),
    ],
)
def test_a_bad_value_is_refused_with_its_place_and_what_to_do(raw: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(raw)
    assert expected in str(refused.value)


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config({"seed": "x", "learner": {"lr": -1}, "task": {"kind": "walk", "q": 1}})
    assert str(refused.value).count("\n  - ") == 3


def test_the_oracle_cannot_teach_text() -> None:
    raw = {"task": {"kind": "text", "train_path": "x.jsonl"}, "student": {"kind": "tiny", "max_context": 2048}}
    with pytest.raises(ConfigError, match="oracle is the closed form"):
        load_config(raw)


def test_overrides_are_applied_last_and_parse_numbers() -> None:
    assert parse_override("learner.lr=1e-4")[0] == "learner.lr"
    config = load_config({}, dict([parse_override("learner.lr=1e-4"), parse_override("staleness.max_staleness=0")]))
    assert config.learner.lr == pytest.approx(1e-4)
    assert config.staleness.max_staleness == 0
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_override("learner.lr")


@pytest.mark.parametrize(
    ("key", "value"),
    [("student.hidden_size", 64), ("teacher.smoothing", 1e-3), ("task.eval_fraction", 0.2), ("loss.head", 8)],
)
def test_one_key_of_a_section_with_variants_can_be_overridden_alone(key: str, value: float) -> None:
    # Once refused with pydantic's "unable to extract tag": the section then had no kind, engine or name.
    section, _, field = key.partition(".")
    assert getattr(getattr(load_config({}, {key: value}), section), field) == value
    with pytest.raises(ConfigError, match=f"{field}"):
        load_config({}, {f"{key}x": value})


def test_what_is_not_yaml_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set learner\.lr: not valid YAML"):
        parse_override("learner.lr=[")
    (tmp_path / "a.yaml").write_text("base: [b.yaml]")
    with pytest.raises(ConfigError, match="expected the name of one YAML file"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"learner: {lr: 1}\nname: x\nlearner: {num_steps: 3}\n",
            "`learner:` stands in line 1 and again in line 3; expected it once",
        ),
        (b"learner:\n  lr: 1\n  lr: 2\n", "`lr:` stands in line 2 and again in line 3"),
        ("name: x\n".encode("utf-16"), "line 1: byte 0xff is no text in UTF-8; expected YAML in it"),
        (b"name: x\nseed: 1 # \xe9\n", "line 2: byte 0xe9 is no text in UTF-8"),
        (b"[" * 200_000, "not valid YAML: maximum recursion depth"),
        (b"name: 2026-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"seed: " + b"9" * 5000, "not valid YAML: Exceeds the limit"),
        (b'name: "a\\ud800"\n', "name: expected text that UTF-8 can hold (found 'a\\ud800')"),
        (b'base: "a\\0"\n', "no such configuration file (embedded null byte)"),
        (b"base: " + b"x" * 300 + b"\n", "no such configuration file ([Errno 36] File name too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_words(tmp_path: Path, content: bytes, expected: str) -> None:
    # Each was a raw traceback; of two equal sections the first was dropped without a word.
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert expected in str(refused.value)
    with pytest.raises(ConfigError, match="stands in line 1 and again in line 1"):
        parse_override("learner={lr: 1, lr: 2}")


def test_base_files_merge_deeply_and_a_new_variant_replaces_its_section(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({"learner": {"lr": 0.5, "num_steps": 7}, "loss": {"name": "head_tail", "head": 9}})
    )
    (tmp_path / "top.yaml").write_text(
        yaml.safe_dump({"base": "base.yaml", "learner": {"lr": 0.25}, "loss": {"name": "dense_reverse_kl"}})
    )
    config = load_config(tmp_path / "top.yaml")
    assert (config.learner.lr, config.learner.num_steps, config.loss.name) == (0.25, 7, "dense_reverse_kl")


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"no such configuration file.*quickstart\.yaml"):
        load_config(tmp_path / "quickstrat.yaml")


def test_a_base_that_comes_back_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigError, match="comes back to itself"):
        load_config(tmp_path / "a.yaml")


def test_digest_follows_every_value() -> None:
    assert load_config({}).digest() == load_config({}).digest()
    assert load_config({}).digest() != load_config({}, {"seed": 1}).digest()


def test_what_top_p_leaves_uncorrected_is_said_and_nothing_without_it() -> None:
    assert load_config({}).caveats == []
    told = load_config({}, {"rollout.top_p": 0.9}).caveats
    assert "up to 0.105 nats" in told[0]
    assert len(told) == 2
    *_, whole = load_config({"loss": {"name": "forward_kl"}, "rollout": {"top_p": 0.9}}).caveats
    assert "forward_kl trains the whole student" in whole
