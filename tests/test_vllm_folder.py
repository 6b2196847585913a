"""Folders of weights for vLLM's engine processes: what becomes of them when their owner is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from asyncopd.vllm.model_folder import ModelFolder

OWNER = """
import sys, time
from pathlib import Path
from asyncopd.vllm.model_folder import ModelFolder
folder = ModelFolder(0, Path(sys.argv[1]))
folder.write({"model_type": "qwen3"}, b"weights")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_a_killed_owners_weights_are_removed_by_the_next_one_and_a_living_owners_are_not(tmp_path: Path) -> None:
    # Engines load from /dev/shm: every kill -9 of a role used to cost the machine a model's size of memory for good.
    unrelated = tmp_path / "asyncopd-vllm-notes"
    unrelated.mkdir()
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        owned = Path(owner.stdout.readline().strip())
        ModelFolder(0, tmp_path).remove()
        assert (owned / "model.safetensors").read_bytes() == b"weights"
        owner.kill()
    ModelFolder(0, tmp_path).remove()
    assert list(tmp_path.iterdir()) == [unrelated]


def test_weights_go_and_the_description_stays_once_they_are_loaded(tmp_path: Path) -> None:
    folder = ModelFolder(0, tmp_path)
    folder.write({"model_type": "gpt2"}, b"old")
    folder.write({"model_type": "gpt2"}, b"new")
    assert (folder.path / "model.safetensors").read_bytes() == b"new"
    folder.drop_weights()
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]
    assert "GPT2LMHeadModel" in (folder.path / "config.json").read_text()
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_weights_without_room_in_memory_go_to_the_disk() -> None:
    folder = ModelFolder(1 << 60)
    assert Path("/dev/shm") not in folder.path.parents
    folder.remove()
