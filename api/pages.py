"""The page: one HTML shell for every path a person may open, its assets, and `/v1/configs`, which its form needs."""

from __future__ import annotations

import functools
import threading
from itertools import takewhile
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from api.deps import Launches, Reader
from api.problems import responses
from api.schemas import Config, ConfigList
from asyncopd.config import RunConfig, load_config

STATIC = Path(__file__).parent / "static"
PAGES = ("/", "/runs/{run_id}", "/runs/{run_id}/trajectories/{index}", "/compare", "/sql", "/launch")
"""Kept equal to ROUTES of static/app.js."""

router = APIRouter()


def install(app: FastAPI) -> None:
    """Serve the page from `app`."""
    for page in PAGES:
        app.add_api_route(page, shell, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")


async def shell() -> FileResponse:
    """The shell; which view it shows is decided in the browser."""
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/v1/configs", operation_id="list_configs", tags=["configs"], dependencies=[Reader], responses=responses())
def list_configs(launches: Launches) -> ConfigList:
    """Configurations of this service, every value resolved, and the schema a form can be made from."""
    with _turn:
        return _listed(launches.files())


# One at a time, and once for each state of the files: it takes a second of CPU.
_turn = threading.Lock()


@functools.lru_cache(maxsize=4)
def _listed(files: tuple[tuple[Path, int], ...]) -> ConfigList:
    found = [
        Config(name=path.stem, about=_about(path), config=load_config(path).model_dump(mode="json"))
        for path, _ in files
    ]
    return ConfigList(data=found, json_schema=RunConfig.model_json_schema())


def _about(path: Path) -> str:
    """The comment a file opens with, as one line."""
    comments = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.lstrip("# ").strip() for line in comments)
