"""One request behind three doors: the command line, Prefect and REST take the same and refuse it in the same words."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prefect.utilities.callables import parameter_schema
from service_world import DONE, Prefect, client_of, make_root, prefect_stand_in, settings_of
from synthetic_run import weights_of

from asyncopd import cli
from asyncopd.config.requests import BackfillRequest, CounterfactualRequest, ReplayRequest, Request
from asyncopd.errors import AsyncOPDError
from flows import offline, requests
from storage.runs import open_run
from storage.stores import open_store

FLAGS = {"overrides": "set", "num_prompts": "prompts", "num_teacher_draws": "teacher-draws"}
FLOWS = {"replay": requests.replay, "backfill": requests.backfill, "counterfactual": requests.counterfactual}


@pytest.fixture
def prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefect]:
    with prefect_stand_in() as found:
        monkeypatch.setenv("PREFECT_API_URL", found.url)
        yield found


@pytest.fixture
def root(tmp_path: Path) -> str:
    found = make_root(tmp_path / "runs")
    for version in (0, 2, 4, 12):
        open_run(open_store(found), DONE).publish_policy(weights_of(version), worker="learn-0")
    return found


@pytest.fixture
def client(root: str, tmp_path: Path) -> TestClient:
    return client_of(settings_of(root, tmp_path))


def typed(verb: str, root: str, fields: dict[str, Any]) -> list[str]:
    """The command line that says `fields`, whose values are texts."""
    options = [
        f"--{FLAGS.get(name, name).replace('_', '-')}={text}"
        for name, value in fields.items()
        for text in (value if isinstance(value, list) else [value])
    ]
    return [verb, DONE, "--root", root, *options]


def said_by_prefect(verb: str, root: str, fields: dict[str, Any]) -> str:
    """The flow's refusal of its parameters, or that of the process it starts."""
    child: list[list[str]] = []

    class Stop(Exception):
        pass

    async def start(*command: str, **_: Any) -> None:
        child.append(list(command))
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", start)
        patch.setattr(requests, "get_run_logger", lambda: logging.getLogger("flow"))
        try:
            asyncio.run(FLOWS[verb].fn(DONE, root=root, **fields))
        except AsyncOPDError as refusal:
            return str(refusal)
        except Stop:
            pass
    ((python, _, module, *arguments),) = child
    assert (python, module) == (sys.executable, "flows.offline")
    with pytest.raises(SystemExit) as ended:
        offline.main([argument for argument in arguments if argument != "--watch-parent"])
    assert ended.value.code == 2
    return "refused by the child"


REFUSED = [
    # What needs no log …
    ("replay", {"steps": "3"}, "steps '3': expected FIRST:LAST, either side of which may be left out, like 40:100."),
    ("replay", {"overrides": ["scores={a: 0}"]}, "scores={'a': 0}: expected NAME or {NAME: WEIGHT, …} with weights"),
    ("replay", {"overrides": ["9=x"]}, "'9': 'x' is no setting; expected a dotted key, for example loss.name."),
    ("replay", {"overrides": ["loss.head"]}, "--set 'loss.head': expected KEY=VALUE"),
    ("replay", {"overrides": ["a={b: &x [1], c: *x}"]}, "expected a value without YAML aliases (*name); write it out."),
    ("replay", {"overrides": ["a=2026-99-99"]}, "'a=2026-99-99': its value cannot be read: month must be in 1..12"),
    ("replay", {"overrides": ["a=" + "[" * 3000]}, "its value cannot be read: "),
    ("replay", {"compare": ["loss.name=npd loss.top_k=4"]}, "compare 'loss.name=npd loss.top_k=4': a comparison needs"),
    ("backfill", {"top_k": "many"}, "top_k 'many': expected a number of ids, or all."),
    (
        "backfill",
        {"candidates": "head=2,heads=4"},
        "candidates 'head=2,heads=4': 'heads=4' is not understood",
    ),
    ("counterfactual", {"staleness": "8:2"}, "'8:2': expected FIRST:LAST with FIRST <= LAST."),
    ("counterfactual", {"staleness": "0,x"}, "'0,x': expected bounds in versions, like 0,2,8, or FIRST:LAST"),
    ("counterfactual", {"order": "index,alphabetical"}, "order.1: Input should be 'index' or 'arrival'"),
    # … and what only the log can tell.
    ("replay", {"steps": "9:3"}, "steps 9:3: expected FIRST:LAST with 0 <= FIRST < LAST <= 12, the steps that the run"),
    ("replay", {"steps": ":7", "from_version": "8"}, "steps 8:7: expected FIRST:LAST"),
    ("replay", {"overrides": ["rollout.shard_size=2"]}, "rollout.shard_size: the log was made with it and cannot be"),
    ("replay", {"overrides": ["scores=x"]}, f"run {DONE} has no scores x; it has oracle."),
    ("replay", {"overrides": ["loss.name=forward_kl"]}, f"run {DONE}: the log does not hold what the loss needs."),
    ("backfill", {}, "there is nothing to back-fill: the run has its own teacher's scores with these widths already."),
    ("backfill", {"teacher": ["smoothing=0.5"]}, "teacher smoothing=0.5: this is another teacher than the run's own"),
    ("backfill", {"top_k": "1000"}, "top_k 1000: the vocabulary has"),
]


@pytest.mark.parametrize(("verb", "fields", "sentence"), REFUSED)
def test_every_door_refuses_in_the_same_words(
    root: str,
    client: TestClient,
    prefect: Prefect,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    fields: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("the process that loads torch was started"))
    with pytest.raises(SystemExit) as ended:
        cli.main(typed(verb, root, fields))
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    by_prefect = said_by_prefect(verb, root, fields)
    assert sentence in by_prefect + capsys.readouterr().err
    if verb != "counterfactual":  # which REST does not offer
        answer = client.post(f"/v1/runs/{DONE}/{verb}", json=fields)
        assert answer.status_code == 422
        assert sentence in answer.json()["detail"]
    assert prefect.flow_runs == {}


ASKED = [
    (
        "replay",
        {"steps": "2:8", "overrides": ["loss.name=cross_entropy", "scores={oracle: 2}"], "start": "weights"},
        ReplayRequest(steps="2:8", start="weights", overrides={"loss.name": "cross_entropy", "scores": {"oracle": 2}}),
    ),
    (
        "replay",
        {"from_version": "4", "compare": ["loss.name=cross_entropy", "learner.lr=0.1 loss.name=cross_entropy"]},
        ReplayRequest(
            from_version=4, compare=({"loss.name": "cross_entropy"}, {"learner.lr": 0.1, "loss.name": "cross_entropy"})
        ),
    ),
    (
        "backfill",
        {"teacher": ["name=hard", "smoothing=0.5"], "top_k": "all", "candidates": "head=2,law=tail"},
        BackfillRequest.of(
            {
                "teacher": {"name": "hard", "smoothing": 0.5},
                "top_k": "all",
                "candidates": {"head": 2, "law": "tail"},
            }
        ),
    ),
    (
        "counterfactual",
        {"staleness": "0:5", "order": "arrival", "lag": "3"},
        CounterfactualRequest(staleness=(0, 1, 2, 4, 5), order=("arrival",), lag=3),
    ),
]


@pytest.mark.parametrize(("verb", "fields", "expected"), ASKED)
def test_every_door_makes_the_same_request_of_the_same_texts(
    root: str,
    client: TestClient,
    prefect: Prefect,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    fields: dict[str, Any],
    expected: Request,
) -> None:
    started: list[list[str]] = []

    class Started:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Started)
    with pytest.raises(SystemExit):
        cli.main(typed(verb, root, fields))
    assert started == [expected.command(root, DONE)]
    assert type(expected).of(fields) == expected
    if verb != "counterfactual":
        assert client.post(f"/v1/runs/{DONE}/{verb}", json=fields).status_code == 202
        ((_, asked),) = prefect.flow_runs.items()
        assert asked["deployment"] == f"{verb}-run"
        parameters = asked["parameters"]
        assert (parameters.pop("run_id"), parameters.pop("root")) == (DONE, open_store(root).url)
        assert type(expected).of(parameters) == expected


@pytest.mark.parametrize("request_type", [ReplayRequest, BackfillRequest, CounterfactualRequest])
def test_prefect_shows_a_request_field_by_field(request_type: type[Request]) -> None:
    shown = parameter_schema(FLOWS[request_type.verb]).properties
    fields = request_type.model_json_schema()["properties"]
    assert list(shown)[-len(fields) :] == list(fields)
    assert {"run_id", "root"} <= set(shown)
    for name, field in fields.items():
        assert shown[name]["description"] == " ".join(field["description"].split())
        same = {"anyOf", "type", "enum", "default", "items"} & set(field)
        for key in same - {"anyOf", "items"}:
            assert shown[name][key] == field[key], (name, key)
        assert ("anyOf" in field) == ("anyOf" in shown[name])


@pytest.mark.parametrize("request_type", [ReplayRequest, BackfillRequest])
def test_the_openapi_document_shows_a_request_field_by_field(client: TestClient, request_type: type[Request]) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"][f"/v1/runs/{{run_id}}/{request_type.verb}"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{request_type.__name__}"}
    shown = document["components"]["schemas"][request_type.__name__]["properties"]
    assert list(shown) == list(request_type.model_fields)
    assert all(field["description"] for field in shown.values())


@pytest.mark.parametrize("verb", ["replay", "backfill", "counterfactual"])
def test_help_has_an_option_for_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    (request_type,) = (one for one in (ReplayRequest, BackfillRequest, CounterfactualRequest) if one.verb == verb)
    for name in request_type.model_fields:
        if name != "scores":  # which is said with --set
            assert f"--{FLAGS.get(name, name).replace('_', '-')}" in shown
