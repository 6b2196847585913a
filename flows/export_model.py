"""A version of a run's student as a folder that transformers and vLLM load: `asyncopd export-model`.

run log --config.json, weights--> DIR/{config.json, model.safetensors, generation_config.json}
its tokenizer, copied or (of a GGUF file) written -----------------------------------------> DIR/tokenizer…
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from asyncopd.config import PretrainedModel, RunConfig
from asyncopd.errors import ConfigError
from asyncopd.models.files import ModelFiles
from asyncopd.tasks.tokenizers_hf import HfTokenizer
from asyncopd.types import PolicyVersion
from flows.preflight import tokenizer_files
from storage.run_log import StoredRunLog

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def export_model(log: StoredRunLog, number: int | None, output: Path) -> PolicyVersion:
    """Write version `number` of the student (None: the latest) to the new folder `output`, whole or not at all.

    Raises:
        ConfigError: `output` exists, the run has no such version, or its tokenizer is not where it was.
    """
    version = log.latest_policy() if number is None else log.find_policy(number)
    if version is None:
        latest = log.latest_policy()
        raise ConfigError(
            f"run {log.run_id} has not published version {'any' if number is None else number}; its latest is "
            f"{latest.number if latest else 'none'}."
        )
    config, weights = RunConfig.model_validate(log.config()), log.read_policy(version).safetensors
    architecture = json.loads(log.read_architecture()["config.json"])
    # Ours: how many rows of the head have an id. Other programs get that from the tokenizer.
    architecture.pop("num_ids", None)
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    found = next(entry["dtype"] for name, entry in header.items() if name != "__metadata__")
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture["model_type"]]
    architecture |= {"architectures": [class_name], "dtype": _DTYPES[found]}
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        stop_ids = _write_tokenizer(config, temporary) or [architecture["eos_token_id"]]
        generation = {name: architecture[name] for name in ("bos_token_id", "pad_token_id") if name in architecture}
        for name, described in {
            "config": architecture,
            "generation_config": generation | {"eos_token_id": stop_ids},
        }.items():
            (temporary / f"{name}.json").write_text(json.dumps(described, indent=1))
        (temporary / "model.safetensors").write_bytes(weights)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return version


def _write_tokenizer(config: RunConfig, folder: Path) -> list[int]:
    """Put the student's tokenizer into a folder; returns all ids that end a response. None of both for the walk task
    and for bytes, whose ids need no files."""
    task = config.task
    if task.kind != "text" or task.tokenizer == "bytes":
        return []
    files = tokenizer_files(config)
    stop_ids = ModelFiles(config.student, "student").stop_ids if isinstance(config.student, PretrainedModel) else ()
    if files.gguf:
        AutoTokenizer.from_pretrained(files.local_folder(), gguf_file=files.settings.gguf_file).save_pretrained(folder)
    for name in () if files.gguf else TOKENIZER_FILES:
        if path := files.find(name):
            shutil.copyfile(path, folder / name)
    return sorted(HfTokenizer(files, stop_ids=stop_ids, stop_tokens=task.stop_tokens).stop_ids)
