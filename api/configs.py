"""`/v1/configs`: what can be launched by name, and the schema of a configuration."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

from fastapi import APIRouter, Response

from api.deps import Launches, Reader
from api.observe import json_response
from api.problems import responses
from api.schemas import Config, ConfigList
from asyncopd.config import RunConfig, load_config

router = APIRouter(prefix="/v1/configs", tags=["configs"], dependencies=[Reader])


@router.get("", operation_id="list_configs", response_model=ConfigList, responses=responses())
def list_configs(launches: Launches) -> Response:
    """Configurations of this service, every value resolved, and the schema a form can be made from."""
    with _turn:
        return json_response(_listed(launches.files()))


# One at a time, and once for each state of the files: it takes a second of CPU.
_turn = threading.Lock()


@functools.lru_cache(maxsize=4)
def _listed(files: tuple[tuple[Path, int], ...]) -> bytes:
    found = [
        Config(name=path.stem, about=_about(path), config=load_config(path).model_dump(mode="json"))
        for path, _ in files
    ]
    return ConfigList(data=found, json_schema=RunConfig.model_json_schema()).model_dump_json().encode()


def _about(path: Path) -> str:
    """The comment a file opens with, as one line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)
