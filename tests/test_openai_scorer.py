"""OpenAIScorer's dealings with servers that fail; its scores are tested against a real server in test_engines.py."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hf_models import trajectory_of

from asyncopd.errors import EngineError
from asyncopd.ports import ScoreRequest
from asyncopd.tasks.tokenizers import ByteTokenizer
from asyncopd.teacher import openai
from asyncopd.teacher.openai import OpenAIScorer
from asyncopd.types import LOGPROB_FLOOR, Trajectory

VOCAB_SIZE = 24
REQUEST = ScoreRequest(top_k=2, num_teacher_draws=0, temperature=1.0, seed=0)


class FlakyServer(ThreadingHTTPServer):
    """Answers as vLLM does with a fixed law, log q(v) = −1 − v, after `failures` answers of status `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures, self.status = 0, 503
        self.is_vllm = True
        self.num_completions = 0
        self.edit: Callable[[list[Any]], None] = lambda rows: None
        """Changes the rows of prompt_logprobs of every answer."""
        self.special_ids = (256, 257, 258)
        """What the ids of ByteTokenizer's `<pad>`, `<bos>`, `<eos>` are here."""
        self.num_running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "m", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/tokenize":
            self._send(200, {"tokens": ByteTokenizer().encode(body["prompt"])})
            return
        if self.path == "/detokenize":
            meant = dict(zip(server.special_ids, (256, 257, 258), strict=True))
            self._send(200, {"prompt": ByteTokenizer().decode([meant.get(i, i) for i in body["tokens"]])})
            return
        with server.lock:
            server.num_completions += 1
            fails = server.failures > 0
            server.failures -= fails
            server.num_running += 1
            server.most_running = max(server.most_running, server.num_running)
        threading.Event().wait(0.02)
        with server.lock:
            server.num_running -= 1
        if fails:
            self._send(server.status, {"error": "try later"})
            return
        rows = [None, *({str(v): {"logprob": -1.0 - v, "rank": v + 1} for v in {i, 0, 1}} for i in body["prompt"][1:])]
        server.edit(rows)
        self._send(200, {"choices": [{"prompt_logprobs": rows} if server.is_vllm else {"text": "x"}]})

    def _send(self, status: int, body: Any) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(openai, "_FIRST_PAUSE_S", 0.01)
    made = FlakyServer()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def scorer(*urls: str, **changes: Any) -> OpenAIScorer:
    settings: dict[str, Any] = {
        "model": "m",
        "name": "t",
        "tokenizer": ByteTokenizer(),
        "vocab_size": VOCAB_SIZE,
        "max_context": 64,
        "compare_text": False,
        "max_retries": 3,
    }
    return OpenAIScorer(urls, **{**settings, **changes})


def plain(index: int, num_tokens: int = 5) -> Trajectory:
    return trajectory_of(index, num_tokens, head=0, num_draws=0, vocab_size=VOCAB_SIZE)


async def test_transient_failures_are_tried_again_and_change_no_score(server: FlakyServer) -> None:
    teacher = scorer(server.url)
    await teacher.check(2)
    server.failures = 3
    trajectory = plain(1)
    (scores,) = await teacher.score([trajectory], REQUEST)
    assert scores.sampled_logprobs_T.tolist() == [-1.0 - i for i in trajectory.response_ids]
    assert scores.topk_ids_TK.tolist() == [[0, 1]] * 5
    assert server.num_completions == 1 + 4
    await teacher.close()


async def test_a_server_that_stays_away_ends_with_what_it_last_said(server: FlakyServer) -> None:
    teacher = scorer(server.url)
    await teacher.check(2)
    server.failures = 99
    with pytest.raises(EngineError, match=r"teacher t did not answer in 4 tries; the last: .*status 503.*try later"):
        await teacher.score([plain(1)], REQUEST)
    await teacher.close()


async def test_a_refusal_is_not_tried_again(server: FlakyServer) -> None:
    teacher = scorer(server.url)
    await teacher.check(2)
    server.failures, server.status = 1, 400
    with pytest.raises(EngineError, match=r"index 7: teacher t refused .* tokens .*status 400"):
        await teacher.score([plain(7)], REQUEST)
    assert server.num_completions == 2
    await teacher.close()


@pytest.mark.parametrize("impossible", [-9999, -math.inf])
async def test_what_the_teacher_rules_out_is_stored_at_the_floor(server: FlakyServer, impossible: float) -> None:
    # vLLM writes -9999 for −inf: once a loss of 500 and a gradient norm of 5,000 from a single token.
    trajectory = plain(4)
    token = str(trajectory.response_ids[-1])
    server.edit = lambda rows: rows.__setitem__(-1, {"0": {"logprob": 0}, token: {"logprob": impossible}})
    teacher = scorer(server.url)
    (scores,) = await teacher.score([trajectory], REQUEST)
    assert scores.sampled_logprobs_T[-1] == LOGPROB_FLOOR
    assert scores.topk_logprobs_TK[-1].tolist() == [0.0, LOGPROB_FLOOR]
    await teacher.close()


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (None, "found None"),
        ({"0": None, "1": {"logprob": -2.0}}, "found {'0': None"),
        ({"0": {"logprob": None}, "1": {"logprob": -2.0}}, "id 0: .* found None"),
        ({"0": {"logprob": "-1"}, "1": {"logprob": -2.0}}, "id 0: .* found '-1'"),
        ({"0": {"logprob": math.nan}, "1": {"logprob": -2.0}}, "id 0: .* found nan"),
        ({"0": {"logprob": 7.5}, "1": {"logprob": -2.0}}, r"id 0: .* found 7\.5"),
        ({"token": {"logprob": -1.0}}, "found {'token'"),
        ({"22": {"logprob": -1.0}, "23": {"logprob": -2.0}}, "found 2 ids from 22 to 23; expected the token's own"),
        ({"24": {"logprob": -1.0}}, r"found \d ids from .* to 24; .* each below 24"),
    ],
)
async def test_what_is_no_logprob_names_url_request_and_index(server: FlakyServer, row: Any, found: str) -> None:
    # Once a raw TypeError or KeyError in the score process, or NaN in the learner, again after each restart.
    teacher = scorer(server.url)
    await teacher.check(2)
    trajectory = plain(4)
    server.edit = lambda rows: rows.__setitem__(-1, row)
    where = rf"^index 4: teacher t: {server.url}/v1/completions \(prompt_logprobs 2\): response token 4: "
    with pytest.raises(EngineError, match=where + ".*" + found):
        await teacher.score([trajectory], REQUEST)
    server.edit = list.clear
    with pytest.raises(EngineError, match=rf"^index 4: .*{server.url}/v1/completions .* answers 0 rows"):
        await teacher.score([trajectory], REQUEST)
    await teacher.close()


async def test_a_server_whose_special_tokens_have_other_ids_is_refused(server: FlakyServer) -> None:
    # All texts split alike, so the teacher once passed for one with the student's tokenizer.
    teacher = scorer(server.url, compare_text=True)
    await teacher.check(2)
    await teacher.close()
    server.special_ids = (256, 258, 257)
    teacher = scorer(server.url, compare_text=True)
    with pytest.raises(EngineError, match=r"the ids \[257\] are '<eos>', for the student's tokenizer '<bos>'"):
        await teacher.check(2)
    await teacher.close()


async def test_a_server_without_prompt_logprobs_is_refused_before_the_first_score(server: FlakyServer) -> None:
    server.is_vllm = False
    teacher = scorer(server.url)
    with pytest.raises(EngineError, match=r"teacher t: http\S+ answers no prompt_logprobs for 2 tokens. Expected"):
        await teacher.score([plain(1)], REQUEST)
    assert server.num_completions == 1
    await teacher.close()


async def test_every_request_moves_on_from_a_server_that_is_away(server: FlakyServer) -> None:
    teacher = scorer(server.url, max_retries=1)
    await teacher.check(2)
    # The discard port: nobody listens. Retries used to take turns with other requests and could meet it twice.
    teacher._urls.insert(0, "http://127.0.0.1:9")
    trajectories = [plain(index) for index in range(8)]
    assert [scores.index for scores in await teacher.score(trajectories, REQUEST)] == list(range(8))
    await teacher.close()


async def test_no_more_requests_run_at_once_than_allowed(server: FlakyServer) -> None:
    teacher = scorer(server.url, concurrency=3)
    await teacher.score([plain(index) for index in range(20)], REQUEST)
    assert server.most_running == 3
    await teacher.close()
