"""Mistakes that the command line refuses with status 2, before a server starts or a model loads."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pipeline
import pytest
import yaml
from hf_models import save_model, tiny_model
from synthetic_run import config_of, new_log, publish_run, weights_of

from asyncopd import cli
from asyncopd.config import load_config
from asyncopd.errors import StoreUnusableError
from asyncopd.local import stack
from flows.preflight import preflight
from storage.stores import open_store

QUESTION = json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"


@pytest.fixture(autouse=True)
def _no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCOPD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")

    def spawn(name: str, argv: list[str]) -> Path:
        raise AssertionError(f"{name} would have been started")

    monkeypatch.setattr(stack, "_spawn", spawn)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which the command was refused; asserts status 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def write_config(tmp_path: Path, **sections: Any) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**pipeline.SMALL, "storage": {"root": str(tmp_path / "runs")}, **sections}))
    return str(path)


def write_model(folder: Path, *, context: int = 2048, vocabulary: str = "a") -> dict[str, str]:
    """A tiny model in Hugging Face format, and the section that names it."""
    save_model(folder, tiny_model(max_position_embeddings=context), first=ord(vocabulary))
    return {"kind": "pretrained", "path": str(folder)}


def text_task(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    (tmp_path / "train.jsonl").write_text(QUESTION * 2 + QUESTION.replace("1 + 1", "2 + 0"))
    return {"kind": "text", "train_path": str(tmp_path / "train.jsonl"), "max_prompt_tokens": 64, **settings}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("learner.lrr=1", "learner.lrr: unknown key. Nearest known key: learner.lr"),
        ("rollout.shard_size=3", "rollout.shard_size 3 must divide learner.batch_size 8"),
        (
            "staleness.max_staleness=-1",
            "staleness.max_staleness: must be at least 0 (found -1)",
        ),
        ("rollout.max_new_tokens=254", "do not fit max_context 256. Raise student max_context or lower rollout."),
        ("storage.min_free_bytes=1000000000000000000", "MiB free, expected at least 953674316406 MiB. Free some space"),
    ],
)
def test_values_that_cannot_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, assignment: str, expected: str
) -> None:
    assert expected in refusal(capsys, "train", write_config(tmp_path), "--set", assignment)


def test_a_missing_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refusal(capsys, "train", str(tmp_path / "nothing.yaml"))
    assert "nothing.yaml: no such configuration file" in message


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    student = {"kind": "pretrained", "path": str(tmp_path / "nowhere")}
    message = refusal(capsys, "train", write_config(tmp_path, student=student))
    assert f"student.path: there is no directory {tmp_path / 'nowhere'}. Expected a model in Hugging Face" in message


def test_a_model_whose_context_is_too_short(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    student = write_model(tmp_path / "model", context=80)
    task = text_task(tmp_path, tokenizer=student["path"])
    teacher = {"engine": "hf", "model": student}
    message = refusal(capsys, "train", write_config(tmp_path, student=student, teacher=teacher, task=task))
    assert "has a context of 80 tokens, and task.max_prompt_tokens + rollout.max_new_tokens = 96" in message


def test_tokenizers_that_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", vocabulary="a")
    teacher = {"engine": "hf", "model": write_model(tmp_path / "teacher", vocabulary="b")}
    task = text_task(tmp_path, tokenizer=student["path"])
    message = refusal(capsys, "train", write_config(tmp_path, student=student, teacher=teacher, task=task))
    assert "tokenizers differ: {'task.tokenizer': " in message
    assert "must share one tokenizer" in message


@pytest.mark.parametrize("own_tokenizer", [False, True])
@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "questions.jsonl: no such file. In "), ("", "questions.jsonl: the data set is empty")],
)
def test_a_dataset_that_is_missing_or_empty(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, expected: str, own_tokenizer: bool
) -> None:
    if content is not None:
        (tmp_path / "questions.jsonl").write_text(content)
    student = write_model(tmp_path / "model") if own_tokenizer else pipeline.SMALL["student"]
    tokenizer = student["path"] if own_tokenizer else "bytes"
    task = text_task(tmp_path, train_path=str(tmp_path / "questions.jsonl"), tokenizer=tokenizer)
    teacher = {"engine": "hf", "model": student}
    config = write_config(tmp_path, student=student, teacher=teacher, task=task)
    assert expected in refusal(capsys, "train", config)


def test_a_storage_root_that_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(capsys, "train", write_config(tmp_path), "--root", str(tmp_path / "file" / "runs"))
    assert f"{tmp_path / 'file'} is a file, expected a directory. Choose another storage root." in message


def test_an_s3_root_whose_server_is_down(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{(port := free_port())}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-so-secret")
    message = refusal(capsys, "train", write_config(tmp_path), "--root", "s3://runs/x")
    assert f"no S3 server answers at http://127.0.0.1:{port}" in message
    assert "not-so-secret" not in message


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A directory on a file system of 64 KiB without any room left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left"):
            (folder / "filler").write_bytes(bytes(2**20))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tmp_path: Path, full_disk: Path) -> None:
    config = load_config(pipeline.SMALL, {"storage.root": str(full_disk / "runs")})
    with pytest.raises(StoreUnusableError, match=r"cannot be used as storage root.*choose another storage root"):
        preflight(config)


@pytest.mark.parametrize(
    "command", ["train --run-id", "status", "worker rollout", "replay", "backfill", "counterfactual"]
)
def test_a_run_that_does_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    message = refusal(capsys, *command.split(), "no-such-run", "--root", str(tmp_path / "runs"))
    assert f"there is no run no-such-run in {tmp_path / 'runs'}. Existing runs: none." in message


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("replay --steps 5:3", "expected FIRST:LAST with 0 <= FIRST < LAST <= 12"),
        ("replay --set rollout.slots=4", "the log was made with it"),
        ("replay --set scores=nobody", "run parent has no scores nobody; it has oracle"),
        ("replay --set loss.name=forward_kl", "asyncopd backfill parent --top-k"),
        ("replay --compare loss.name=reverse_kl", "at least two arms"),
        ("replay --compare loss.nome=a --compare loss.name=b", "has no option 'nome'"),
        ("backfill", "there is nothing to back-fill"),
        ("backfill --teacher smoothing=0.5", "Give it a name"),
        ("backfill --candidates heads=4", "head=K"),
        ("backfill --top-k many", "expected a number of ids, or all"),
        ("counterfactual --staleness 0,x", "'0,x': expected bounds in versions, like 0,2,8"),
        ("counterfactual --staleness 8:2", "expected FIRST:LAST with FIRST <= LAST"),
    ],
)
def test_work_on_a_log_is_refused_before_a_model_could_be_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    log = new_log(open_store(str(tmp_path / "runs")), config_of(), "parent")
    publish_run(log, config_of())
    log.publish_policy(weights_of(12), worker="learn-0")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("the process that loads torch was started"))
    name, *options = command.split(" ", 1)
    message = refusal(capsys, name, "parent", "--root", str(tmp_path / "runs"), *" ".join(options).split())
    assert said in " ".join(message.split())


def test_a_hub_name_that_is_neither_cached_nor_reachable(tmp_path: Path) -> None:
    # In a child: the library reads the variable when it is imported.
    code = "\n".join(
        [
            "from asyncopd.config import load_config",
            "from flows.preflight import preflight",
            "model = {'kind': 'pretrained', 'path': 'nobody/no-such-model'}",
            f"preflight(load_config({{'student': model, 'storage': {{'root': {str(tmp_path)!r}}}}}))",
        ]
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "student.path: nobody/no-such-model (revision main) is no directory here, is not in the" in ended.stderr
    assert "hf download nobody/no-such-model" in ended.stderr


def test_a_port_that_another_program_listens_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{other.server_port}/api")
        message = refusal(capsys, "up")
        other.shutdown()
    assert f"port {other.server_port} of 127.0.0.1 is in use by something that is not a Prefect server" in message
    assert f"PREFECT_API_URL=http://127.0.0.1:{other.server_port + 1}/api asyncopd up" in message


def test_a_remote_server_that_does_not_answer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.invalid:4200/api")
    assert "only a local one can be started here" in refusal(capsys, "up")


def test_status_and_down_without_a_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["status"])
    assert ended.value.code == 3
    assert "server: none" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["down"])
    assert ended.value.code == 0
    assert "nothing runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
        ("maintain audti run", 'Unknown command "audti". Did you mean "audit"?'),
        ("train --run-di x", "Unknown option: --run-di. Did you mean --run-id?"),
        ("train a.yaml b.yaml", "Unused Tokens: ['b.yaml']"),
        ("worker sampler run", 'Invalid value "sampler"'),
        ("serve --nice 20", "Must be <= 19"),
        ("study staleness", "--out"),
        ("status --root", "--root"),
    ],
)
def test_a_line_that_cannot_be_understood(capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    assert said in refusal(capsys, *line.split())


def test_a_command_without_its_subcommand_shows_them_and_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for line, shown in (([], "counterfactual"), (["maintain"], "quarantine"), (["token"], "revoke")):
        with pytest.raises(SystemExit) as ended:
            cli.main(line)
        assert ended.value.code == 2
        assert shown in capsys.readouterr().out


def test_every_command_that_help_lists_can_be_imported_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    families = {name: commands for (_, name, _), commands in cli.FAMILIES.items()}
    lines = [[path] for commands in cli.COMMANDS.values() for path in commands]
    lines += [[family, path] for family, commands in families.items() for path in commands]
    for line in lines:
        words = [word.partition(":")[2].rstrip("_").replace("_", "-") or word for word in line]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--help"])
        assert ended.value.code == 0
        assert f"Usage: asyncopd {' '.join(words)}" in capsys.readouterr().out
