"""The page: one HTML shell for every path a person may open, and its assets from this package. Nothing external."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PAGES = ("/", "/runs/{run_id}", "/runs/{run_id}/trajectories/{index}", "/compare", "/sql", "/launch")
"""Kept equal to ROUTES of static/app.js."""

router = APIRouter(include_in_schema=False)


async def shell() -> FileResponse:
    """The shell; which view it shows is decided in the browser."""
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


for page in PAGES:
    router.add_api_route(page, shell, methods=["GET", "HEAD"])


def install(app: FastAPI) -> None:
    """Serve the page from `app`."""
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
