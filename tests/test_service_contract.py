"""The OpenAPI document: complete, and true of what the service answers to requests nobody thought of."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS
from service_world import DONE, make_root, prefect_stand_in, settings_of

from api.deps import Scope, TokenStore
from api.main import create_app
from api.schemas import RUN_ID_PATTERN

FOLDER = Path(tempfile.mkdtemp(prefix="asyncopd-contract-"))
SETTINGS = settings_of(make_root(FOLDER / "runs"), FOLDER, host="0.0.0.0")
TOKEN = TokenStore(SETTINGS.tokens).create("contract", Scope.ADMIN)
APP = create_app(SETTINGS)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
PATIENT = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
UNFIT = [
    # Valid by schema is not valid by meaning: a configuration, an id that exists, one SELECT.
    check
    for check in CHECKS.get_all()
    if check.__name__ in ("positive_data_acceptance",)
]


@pytest.fixture(scope="module", autouse=True)
def prefect() -> Iterator[None]:
    with prefect_stand_in() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", found.url)
        yield


def asked(case: Any) -> None:
    run_id = str(case.path_parameters.get("run_id", ""))
    if re.fullmatch(RUN_ID_PATTERN, run_id) and len(run_id) % 2:
        case.path_parameters["run_id"] = DONE  # otherwise nearly every request ends at 404
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=UNFIT)


@SCHEMA.exclude(operation_id=["stream_events", "run_sql"]).parametrize()
@settings(PATIENT, max_examples=20)
def test_no_request_breaks_the_service_or_its_schema(case: Any) -> None:
    asked(case)


@SCHEMA.include(operation_id="run_sql").parametrize()
@settings(PATIENT, max_examples=4)  # each of them starts a process
def test_no_query_breaks_the_service_or_its_schema(case: Any) -> None:
    asked(case)


def test_every_field_has_a_description_and_an_example() -> None:
    schemas = APP.openapi()["components"]["schemas"]
    missing = [
        f"{name}.{key}"
        for name, schema in schemas.items()
        for key, field in schema.get("properties", {}).items()
        if not field.get("description") or "examples" not in field
    ]
    assert len(schemas) > 30
    assert missing == []


def test_every_operation_says_what_it_does_what_it_takes_and_how_it_refuses() -> None:
    for path, methods in APP.openapi()["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["description"], where
            assert operation["operationId"], where
            for parameter in operation.get("parameters", []):
                assert parameter.get("description"), f"{where}: {parameter['name']}"
                assert "examples" in parameter or "example" in parameter or "examples" in parameter["schema"], (
                    f"{where}: {parameter['name']}"
                )
            if path.startswith("/v1"):
                refusals = [status for status in operation["responses"] if status >= "400"]
                assert {"400", "401", "403", "422", "429", "503"} <= set(refusals), where
                for status in refusals:
                    content = operation["responses"][status]["content"]
                    assert list(content) == ["application/problem+json"], f"{where}: {status}"
                    assert "$ref" in content["application/problem+json"]["schema"], f"{where}: {status}"


def test_the_document_names_no_path_of_this_machine() -> None:
    assert os.getcwd() not in str(APP.openapi())
