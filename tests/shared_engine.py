"""A pytest plugin of one fixture: the vLLM sampler that test modules share, because it takes half a minute to start."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from engine_models import byte_model, sampler_of


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_sampler() -> AsyncIterator[Any]:
    """Any weights, any version: a test gives it its own. Ended by the last test of test_vllm_engines.py."""
    async with sampler_of("vllm", byte_model()) as sampler:
        yield sampler
