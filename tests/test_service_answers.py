"""Many who ask and watch cost what one costs, and are told the same and the truth."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from pathlib import Path

import httpx
import pytest
from service_world import DONE, LIVE, client_of, make_root, served, settings_of
from synthetic_run import config_of, evaluation, new_log, train_step

from api import events as hub
from api import reader
from api.events import Cursor, Feed, Hub
from api.main import create_app
from api.observe import means, stretches
from api.reader import FRESH_S, RunReader
from asyncopd.types import Span, TrainStep
from storage.history import NUM_TOKENS, Columns, History
from storage.run_log import StoredRunLog
from storage.run_view import RunView
from storage.stores import open_store


@pytest.fixture
def log(tmp_path: Path) -> StoredRunLog:
    log = new_log(open_store(str(tmp_path / "runs")), config_of(), "watched")
    log.record_state("running", by="flow")
    return log


def view_of(log: StoredRunLog) -> RunView:
    view = RunReader(log.store).find(log.run_id)
    assert view is not None
    return view


# -- answers ------------------------------------------------------------------------------------------------------
def test_a_view_is_as_new_as_the_last_look_and_the_end_of_a_run_is_never_withheld(
    log: StoredRunLog, tmp_path: Path
) -> None:
    # A client that was told of the end reads the curves a last time; a remembered answer would miss the last steps.
    client = client_of(settings_of(log.store.url, tmp_path))
    path = f"/v1/runs/{log.run_id}/metrics"
    for number in range(2):
        log.publish_step(train_step(number))
        time.sleep(FRESH_S)
        assert client.get(path).json()["steps"] == [float(n) for n in range(number + 1)]
    log.publish_step(train_step(2))
    log.record_state("completed", by="flow")
    time.sleep(FRESH_S)
    assert client.get(path).json()["steps"] == [0.0, 1.0, 2.0]


def test_other_parameters_are_another_answer(tmp_path: Path) -> None:
    client = client_of(settings_of(make_root(tmp_path / "runs"), tmp_path))
    found = [
        client.get(f"/v1/runs/{run}/metrics", params={"to_step": n}).json() for run in (DONE, LIVE) for n in (2, 4)
    ]
    assert [len(answer["steps"]) for answer in found] == [2, 4, 2, 4]
    assert found[0]["tokens"] == found[1]["tokens"][:2]


# -- columns ------------------------------------------------------------------------------------------------------
def slow_series(steps: list[TrainStep], name: str, max_points: int) -> list[float | None]:
    stride = max(1, -(-len(steps) // max_points))
    groups = [steps[start : start + stride] for start in range(0, len(steps), stride)]
    values = [[s.metrics[name] for s in group if math.isfinite(s.metrics.get(name, math.nan))] for group in groups]
    return [sum(found) / len(found) if found else None for found in values]


def test_columns_that_grew_and_were_rewound_equal_those_of_the_steps_that_are_left() -> None:
    draw = random.Random(0)
    columns, steps = Columns(), list[TrainStep]()
    for rewind in range(30):
        num_kept = draw.randint(0, len(steps))
        steps = steps[:num_kept]
        for number in range(num_kept, num_kept + draw.randint(0, 9)):
            names = draw.sample(["train/a", "train/b", "eval/c"], draw.randint(1, 3))
            values = {name: draw.choice([draw.random(), math.nan, math.inf]) for name in names}
            steps.append(train_step(number, rewind=rewind, num_tokens=draw.randint(1, 99), metrics=values))
        before, was = columns, columns.values("train/a")
        columns = columns.extended(steps, num_kept)
        # Whoever still reads the older ones is not disturbed.
        assert before.num == len(was)
        assert before.values("train/a").tolist() == pytest.approx(was.tolist(), nan_ok=True)
        assert columns.values(NUM_TOKENS).tolist() == [step.num_tokens for step in steps]
        for name in {name for step in steps for name in step.metrics}:
            for max_points in (2, 5, 500):
                found = means(columns.values(name), stretches(len(steps), max_points))
                assert found == pytest.approx(slow_series(steps, name, max_points))


# -- the feed and its clients -------------------------------------------------------------------------------------
def test_a_place_in_the_feed_is_found_again_from_any_cursor() -> None:
    feed = Feed()
    feed.extend(History(steps=[train_step(n, finished=float(n)) for n in range(5)]))
    late = [evaluation(2, finished=2.5), evaluation(4, finished=4.5)]
    feed.extend(History(steps=[train_step(n, finished=float(n)) for n in range(9)], evaluations=late))
    whole, more = feed.page(Cursor(), 100)
    assert (len(whole), more) == (11, False)
    for limit in (1, 3, 10):
        seen, cursor = [], Cursor()
        while True:
            page, more = feed.page(cursor, limit)
            seen += page
            if not more:
                break
            cursor = Cursor.parse(json.loads(page[-1])["id"])
        assert seen == whole
    # Of a service that read the same run in another order: no event has this id.
    stranger = Cursor(step=(0, 3), evaluation=(4500, 4))
    assert feed.start(stranger) == 0
    assert [b'"kind":"step"' in event for event in feed.page(stranger, 100)[0]] == [True] * 6


async def test_a_client_misses_and_repeats_nothing_when_its_run_is_read_anew(
    log: StoredRunLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = RunReader(log.store)
    watching, seen = Hub(runs, poll_s=0.01), []

    async def follow() -> None:
        async for frames in watching.stream(log.run_id, Cursor()):
            seen.extend(line for line in frames.split(b"\n") if line.startswith(b"id: "))

    client = asyncio.create_task(follow())
    for number in range(8):
        if number == 4:
            # Memory is short: the run leaves it, and comes back with the next look.
            monkeypatch.setattr(reader, "MAX_STEPS", 0)
            new_log(log.store, config_of(), "another")
            runs.find("another")
            assert runs.held(log.run_id) is None
            monkeypatch.undo()
        log.publish_step(train_step(number, finished=float(number)))
        await asyncio.sleep(FRESH_S + 0.1)
    log.record_state("completed", by="flow")
    await asyncio.wait_for(client, 10)
    assert len(seen) == len(set(seen)) == 10  # 8 steps, 2 states


async def test_an_event_that_a_list_found_first_reaches_the_streams_too(log: StoredRunLog) -> None:
    # A look that added nothing itself woke nobody.
    runs = RunReader(log.store)
    watching = Hub(runs, poll_s=1.0)
    stream = watching.stream(log.run_id, Cursor())
    while b"event: state" not in await anext(stream):
        pass
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(FRESH_S)
    log.publish_step(train_step(0))
    view = runs.held(log.run_id)
    assert view is not None
    await watching.feed(await asyncio.to_thread(view.refresh))  # between two looks of the stream's own
    assert b"event: step" in await asyncio.wait_for(waiting, 5)
    await stream.aclose()


async def test_a_client_that_does_not_read_is_only_behind(log: StoredRunLog) -> None:
    # It must neither hold up the others nor make the service remember for it.
    watching = Hub(RunReader(log.store), poll_s=0.01)
    sleeper, reading = watching.stream(log.run_id, Cursor()), watching.stream(log.run_id, Cursor())
    await anext(sleeper)
    for number in range(600):
        log.publish_step(train_step(number, finished=float(number)))
    log.record_state("completed", by="flow")
    quick = [frames async for frames in reading]
    late = [frames async for frames in sleeper]
    assert b"".join(late).count(b"event: step") == b"".join(quick).count(b"event: step") == 600
    assert max(frames.count(b"\nid: ") for frames in (*quick, *late)) <= 256


async def test_a_silent_stream_says_that_it_lives(log: StoredRunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "KEEP_ALIVE_S", 0.05)
    stream = Hub(RunReader(log.store), poll_s=0.01).stream(log.run_id, Cursor(state=1))
    assert [await anext(stream) for _ in range(3)] == [b": nothing new\n\n"] * 3
    await stream.aclose()


async def test_the_last_client_that_leaves_ends_the_looking(log: StoredRunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(RunView, "refresh", lambda view: looks.append(view) or view)
    watching = Hub(RunReader(log.store), poll_s=0.01)
    first, second = (watching.stream(log.run_id, Cursor()) for _ in range(2))
    for stream in (first, second):
        await anext(stream)
    await first.aclose()
    await asyncio.sleep(0.1)
    assert looks
    await second.aclose()
    await asyncio.sleep(0.1)
    num_looks = len(looks)
    await asyncio.sleep(0.1)
    assert len(looks) == num_looks


async def test_a_stream_of_a_launch_that_nobody_started_ends_when_it_is_cancelled(log: StoredRunLog) -> None:
    runs = RunReader(log.store)
    launch = {"config": config_of().model_dump(mode="json"), "body_sha256": "x"}
    runs.launches.record_launch("waiting", launch)
    stream = Hub(runs, poll_s=0.01).stream("waiting", Cursor())
    assert await anext(stream) == b": nothing new\n\n"
    runs.launches.record_request("waiting", "cancelled")
    (last,) = [frames async for frames in stream]
    assert last.startswith(b"event: end\n")
    assert b'"status":"cancelled"' in last


def test_the_event_loop_goes_on_while_answers_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = RunView.spans

    def slow(view: RunView) -> list[Span]:
        time.sleep(1.0)
        return read(view)

    monkeypatch.setattr(RunView, "spans", slow)
    with served(create_app(settings_of(make_root(tmp_path / "runs"), tmp_path))) as url:
        httpx.get(f"{url}/v1/runs/{DONE}/metrics", timeout=30)
        asking = threading.Thread(target=httpx.get, args=(f"{url}/v1/runs/{DONE}/timeline",), kwargs={"timeout": 30})
        asking.start()
        time.sleep(0.2)
        httpx.get(f"{url}/v1/runs/{DONE}/metrics", timeout=30)
        assert asking.is_alive()  # the others were answered first
        asking.join()
