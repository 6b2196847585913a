"""`/v1/configs`: what can be launched by name, and the schema of a configuration."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter

from api.problems import responses
from api.schemas import Config, ConfigList
from api.security import Reader
from api.state import Launches
from asyncopd.config import RunConfig

router = APIRouter(prefix="/v1/configs", tags=["configs"], dependencies=[Reader])


@router.get("", operation_id="list_configs", responses=responses())
def list_configs(launches: Launches) -> ConfigList:
    """Configurations of this service, every value resolved, and the schema a form can be made from."""
    found = [
        Config(name=name, about=_about(launches.path(name)), config=launches.config(name).model_dump(mode="json"))
        for name in launches.config_names()
    ]
    return ConfigList(data=found, json_schema=RunConfig.model_json_schema())


def _about(path: Path) -> str:
    """The comment a file opens with, as one line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)
