from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict, deque
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from asyncopd.errors import ConfigError, EngineError
from asyncopd.ports import Demonstration, ScoreRequest
from asyncopd.tasks.walk import WalkTask
from asyncopd.tasks.walk_rules import PAD_ID, WalkOracle
from asyncopd.teacher.oracle import OracleScorer
from asyncopd.teacher.rows import RowTable
from asyncopd.types import Candidates, IntArray, ScoredTrajectory, TeacherScores, Trajectory, VersionRun

TASK = WalkTask(seed=0)
ORACLE = WalkOracle(TASK.rules, smoothing=1e-2)
SCORER = OracleScorer(TASK.rules)
V = TASK.rules.vocab_size
EPSILONS = {"~0.05": 0.05, "~0.35": 0.35, "~0.65": 0.65, "~0.85": 0.85}
MOVES = {
    "+1": lambda x: (x + 1) % 31,
    "-1": lambda x: (x - 1) % 31,
    "×2": lambda x: 2 * x % 31,
    "+11": lambda x: (x + 11) % 31,
}


def next_logprobs_V(oracle: WalkOracle, prompt_ids: IntArray, prefix_ids: IntArray) -> NDArray[np.float64]:
    """[V] float64, nats: log q of the token after `prefix_ids`, which may be empty."""
    padded_ids = np.append(np.asarray(prefix_ids, np.int32), np.int32(PAD_ID))
    return np.asarray(oracle.logprobs_TV(prompt_ids, padded_ids)[-1])


# -- the same law, written again slowly from the recipe, in words instead of ids ---------------------------------------


@cache
def slow_distance(state: int, goal: int) -> int:
    queue, seen = deque([(state, 0)]), {state}
    while queue:
        here, steps = queue.popleft()
        if here == goal:
            return steps
        for move in MOVES.values():
            if move(here) not in seen:
                seen.add(move(here))
                queue.append((move(here), steps + 1))
    raise AssertionError("unreachable")


def slow_good_moves(state: int, goal: int) -> list[str]:
    return [name for name, move in MOVES.items() if slow_distance(move(state), goal) == slow_distance(state, goal) - 1]


def slow_law(prompt: list[str], prefix: list[str]) -> dict[str, float]:
    """Probability of every next word after a prefix, unsmoothed."""
    if len(prompt) != 3 or prompt[0] not in EPSILONS or not (prompt[1].isdigit() and prompt[2].isdigit()):
        return {"<eos>": 1.0}
    epsilon, state, goal = EPSILONS[prompt[0]], int(prompt[1]), int(prompt[2])
    pending: str | None = None
    for word in prefix:
        if word in MOVES:
            pending = word
        elif word.isdigit():
            state, pending = int(word), None
        elif word == "<eos>":
            return {"<eos>": 1.0}
    if pending is not None:
        return {str(MOVES[pending](state)): 1.0}
    if state == goal:
        return {"<eos>": 1.0}
    good = slow_good_moves(state, goal)
    return {name: epsilon / 4 + (1 - epsilon) * (name in good) / len(good) for name in MOVES}


def slow_demonstration(prompt: list[str], rng: random.Random) -> list[str]:
    epsilon, state, goal = EPSILONS[prompt[0]], int(prompt[1]), int(prompt[2])
    words: list[str] = []
    while state != goal:
        name = rng.choice(list(MOVES) if rng.random() < epsilon else slow_good_moves(state, goal))
        state = MOVES[name](state)
        words += [name, str(state)]
    return [*words, "<eos>"]


@cache
def task_demonstrations() -> list[Demonstration]:
    return [TASK.demonstration(index, "train") for index in range(20_000)]


def ids_of(words: list[str]) -> np.ndarray:
    return np.array(TASK.tokenizer.encode(" ".join(words)), np.int32)


def trajectory(index: int, *, prompt_ids=None, response_ids=None, head=0, draws=0, seed=0) -> Trajectory:
    demo = TASK.demonstration(index, "train")
    prompt_ids = demo.prompt_ids if prompt_ids is None else np.asarray(prompt_ids, np.int32)
    response_ids = demo.response_ids if response_ids is None else np.asarray(response_ids, np.int32)
    num_tokens = len(response_ids)
    rng = np.random.default_rng([seed, index])
    return Trajectory(
        index=index,
        prompt_id="q",
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        behaviour_logprobs_T=np.zeros(num_tokens, np.float32),
        version_runs=(VersionRun(0, num_tokens),),
        finish_reason="stop",
        candidates=Candidates(
            head_ids_TK=rng.integers(0, V, (num_tokens, head)).astype(np.int32),
            head_logprobs_TK=np.zeros((num_tokens, head), np.float32),
            tail_logmass_T=np.zeros(num_tokens, np.float32),
            draw_ids_TN=rng.integers(0, V, (num_tokens, draws)).astype(np.int32),
            draw_logprobs_TN=np.zeros((num_tokens, draws), np.float32),
        ),
    )


def score(trajectories: list[Trajectory], scorer: OracleScorer = SCORER, **request: object) -> list[TeacherScores]:
    settings = {"top_k": 0, "num_teacher_draws": 0, "temperature": 1.0, "seed": 0, **request}
    return asyncio.run(scorer.score(trajectories, ScoreRequest(**settings)))  # type: ignore[arg-type]


# -- the closed form --------------------------------------------------------------------------------------------------

words = st.sampled_from([TASK.tokenizer.token_text(token_id) for token_id in range(V)])
operation_or_any = st.one_of(st.sampled_from(list(MOVES)), words)
state_or_any = st.one_of(st.integers(0, 30).map(str), words)


@given(
    prompt=st.one_of(
        st.tuples(st.sampled_from(list(EPSILONS)), st.integers(0, 30).map(str), st.integers(0, 30).map(str)).map(list),
        st.lists(words, min_size=1, max_size=5),
    ),
    pairs=st.lists(st.tuples(operation_or_any, state_or_any), max_size=6),
    cut=st.booleans(),
)
def test_the_closed_form_is_the_recipe_for_every_prefix(
    prompt: list[str], pairs: list[tuple[str, str]], cut: bool
) -> None:
    response = [word for pair in pairs for word in pair]
    response = response[:-1] if cut else response
    law = slow_law(prompt, response)
    expected_V = np.full(V, 1e-2 / V)
    for word, probability in law.items():
        expected_V[TASK.tokenizer.encode(word)[0]] += (1 - 1e-2) * probability
    found_V = next_logprobs_V(ORACLE, ids_of(prompt), ids_of(response))
    np.testing.assert_allclose(np.exp(found_V), expected_V, atol=1e-12)


def test_every_row_of_every_question_is_the_recipe() -> None:
    for noise in EPSILONS:
        for goal in range(31):
            for state in range(0, 31, 3):
                row_V = np.exp(next_logprobs_V(ORACLE, ids_of([noise, str(state), str(goal)]), ids_of([])))
                for word, probability in slow_law([noise, str(state), str(goal)], []).items():
                    assert row_V[TASK.tokenizer.encode(word)[0]] == pytest.approx(0.99 * probability + 0.01 / V)


def test_rows_of_one_response_agree_with_its_prefixes_and_do_not_depend_on_the_batch() -> None:
    demos = [TASK.demonstration(index, "train") for index in range(30)]
    batch = ORACLE.rows([demo.prompt_ids for demo in demos], [demo.response_ids for demo in demos])
    for demo, rows_T in zip(demos, batch, strict=True):
        alone_TV = ORACLE.logprobs_TV(demo.prompt_ids, demo.response_ids)
        np.testing.assert_array_equal(alone_TV, np.log(ORACLE.probabilities_RV[rows_T]))
        for position in range(len(demo.response_ids)):
            prefix_V = next_logprobs_V(ORACLE, demo.prompt_ids, demo.response_ids[:position])
            np.testing.assert_array_equal(alone_TV[position], prefix_V)


@given(st.lists(st.integers(-3, 10**6), min_size=1, max_size=5), st.lists(st.integers(-3, 10**6), max_size=12))
def test_the_closed_form_never_fails_on_what_ids_say(prompt: list[int], response: list[int]) -> None:
    row_V = next_logprobs_V(ORACLE, np.array(prompt, np.int32), np.array(response, np.int32))
    assert np.exp(row_V).sum() == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [1e-2, 1e-4])
def test_all_rows_are_distributions(smoothing: float) -> None:
    table_RV = WalkOracle(TASK.rules, smoothing).probabilities_RV
    np.testing.assert_allclose(table_RV.sum(-1), 1, atol=1e-12)
    assert table_RV.min() == pytest.approx(smoothing / V)


@pytest.mark.parametrize("prompt", ["~0.35 3 20", "~0.65 20 7", "~0.85 0 30"])
def test_frequencies_of_slow_demonstrations_are_the_closed_form(prompt: str) -> None:
    rng = random.Random(1)
    following: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for _ in range(20_000):
        demo = slow_demonstration(prompt.split(), rng)
        for position in range(min(len(demo), 7)):
            following[tuple(demo[:position])][demo[position]] += 1
    sharp = WalkOracle(TASK.rules, smoothing=1e-12)
    checked = 0
    for prefix, counts in following.items():
        total = counts.total()
        if total < 400:
            continue
        row_V = np.exp(next_logprobs_V(sharp, ids_of(prompt.split()), ids_of(list(prefix))))
        for token_id in range(V):
            expected = row_V[token_id]
            error = abs(counts[TASK.tokenizer.token_text(token_id)] / total - expected)
            assert error < 5 * math.sqrt(expected * (1 - expected) / total) + 1e-6
        checked += 1
    assert checked >= 7


def test_frequencies_of_the_tasks_demonstrations_are_the_closed_form() -> None:
    sharp = WalkOracle(TASK.rules, smoothing=1e-12)
    demos = task_demonstrations()
    rows = np.concatenate(sharp.rows([demo.prompt_ids for demo in demos], [demo.response_ids for demo in demos]))
    emitted = np.concatenate([demo.response_ids for demo in demos])
    frequencies_RV = np.zeros_like(sharp.probabilities_RV)
    np.add.at(frequencies_RV, (rows, emitted), 1)
    total_R1 = frequencies_RV.sum(-1, keepdims=True)
    often = np.flatnonzero(total_R1[:, 0] >= 50)
    expected_RV = total_R1 * sharp.probabilities_RV
    possible = sharp.probabilities_RV > 1e-6
    assert not frequencies_RV[~possible].any()
    residual = (frequencies_RV - expected_RV) / np.sqrt(expected_RV * (1 - sharp.probabilities_RV) + 1e-9)
    residual = residual[often][possible[often] & (sharp.probabilities_RV[often] < 1 - 1e-6)]
    assert len(residual) > 1000
    assert residual.std() == pytest.approx(1, abs=0.1)
    assert np.abs(residual).max() < 6


def test_the_teachers_entropy_is_the_documented_one() -> None:
    demos = task_demonstrations()
    for smoothing, per_token in ((1e-12, 0.445), (1e-4, 0.446), (1e-2, 0.529)):
        oracle = WalkOracle(TASK.rules, smoothing)
        entropy_R = -(oracle.probabilities_RV * np.log(oracle.probabilities_RV)).sum(-1)
        rows = oracle.rows([demo.prompt_ids for demo in demos], [demo.response_ids for demo in demos])
        assert entropy_R[np.concatenate(rows)].mean() == pytest.approx(per_token, abs=0.01)


# -- the scorer -------------------------------------------------------------------------------------------------------


def test_scores_are_the_rows_at_the_asked_ids() -> None:
    trajectories = [trajectory(index, head=3, draws=index % 3) for index in range(20)]
    for source, scores in zip(trajectories, score(trajectories, top_k=5, num_teacher_draws=2), strict=True):
        ScoredTrajectory(source, scores)
        logprobs_TV = ORACLE.logprobs_TV(source.prompt_ids, source.response_ids)
        rows = np.arange(len(logprobs_TV))[:, None]
        for found, ids in (
            (scores.sampled_logprobs_T[:, None], source.response_ids[:, None]),
            (scores.topk_logprobs_TK, scores.topk_ids_TK),
            (scores.head_logprobs_TK, source.candidates.head_ids_TK),
            (scores.draw_logprobs_TN, source.candidates.draw_ids_TN),
            (scores.teacher_draw_logprobs_TM, scores.teacher_draw_ids_TM),
        ):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, logprobs_TV[rows, ids], atol=1e-5)


def test_top_k_is_descending_and_ties_go_to_the_smaller_id() -> None:
    (scores,) = score([trajectory(3)], top_k=V)
    assert (np.diff(scores.topk_logprobs_TK, axis=-1) <= 0).all()
    tied = np.diff(scores.topk_logprobs_TK, axis=-1) == 0
    assert (np.diff(scores.topk_ids_TK, axis=-1)[tied] > 0).all()
    assert tied.any()
    np.testing.assert_array_equal(np.sort(scores.topk_ids_TK, axis=-1), np.tile(np.arange(V), (len(tied), 1)))
    np.testing.assert_allclose(np.exp(scores.topk_logprobs_TK).sum(-1), 1, atol=1e-5)
    (fewer,) = score([trajectory(3)], top_k=4)
    np.testing.assert_array_equal(fewer.topk_ids_TK, scores.topk_ids_TK[:, :4])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_logprobs_and_renormalises(temperature: float) -> None:
    (scores,) = score([trajectory(5)], top_k=V, temperature=temperature)
    source = trajectory(5)
    powered_TV = np.exp(ORACLE.logprobs_TV(source.prompt_ids, source.response_ids)) ** (1 / temperature)
    expected_TV = np.log(powered_TV / powered_TV.sum(-1, keepdims=True))
    found_TV = np.take_along_axis(expected_TV, scores.topk_ids_TK, axis=-1)
    np.testing.assert_allclose(scores.topk_logprobs_TK, found_TV, atol=1e-4)
    assert scores.temperature == temperature


def test_scores_do_not_depend_on_what_is_scored_beside() -> None:
    trajectories = [trajectory(index, head=2, draws=2) for index in range(12)]
    together = score(trajectories, top_k=4, num_teacher_draws=6, seed=9)
    alone = [score([one], top_k=4, num_teacher_draws=6, seed=9)[0] for one in trajectories]
    assert [repr(scores) for scores in together] == [repr(scores) for scores in alone]


def test_teacher_draws_follow_seed_and_index_and_are_draws_from_q() -> None:
    source = trajectory(0, response_ids=ids_of(["+1", "4", "+1", "5", "<eos>"]), prompt_ids=ids_of(["~0.65", "3", "5"]))
    (scores,) = score([source], num_teacher_draws=40_000, seed=1)
    (other,) = score([source], num_teacher_draws=40_000, seed=2)
    assert (scores.teacher_draw_ids_TM != other.teacher_draw_ids_TM).any()
    probabilities_TV = np.exp(ORACLE.logprobs_TV(source.prompt_ids, source.response_ids))
    for drawn_M, expected_V in zip(scores.teacher_draw_ids_TM, probabilities_TV, strict=True):
        frequencies_V = np.bincount(drawn_M, minlength=V) / len(drawn_M)
        np.testing.assert_allclose(
            frequencies_V, expected_V, atol=1e-4 + 5 * float(np.sqrt(expected_V.max() * 0.25 / 40_000))
        )


def test_nothing_to_score_gives_nothing() -> None:
    assert score([]) == []


@pytest.mark.parametrize(
    ("request_settings", "message"),
    [({"top_k": V + 1}, "vocabulary size"), ({"temperature": 0.0}, "above 0"), ({"num_teacher_draws": -1}, ">= 0")],
)
def test_impossible_requests_are_refused(request_settings: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        score([trajectory(0)], **request_settings)


def test_foreign_ids_are_refused_rather_than_wrapped_around() -> None:
    for token_id in (-1, V):
        with pytest.raises(EngineError, match="share one tokenizer"):
            score([trajectory(0, response_ids=[token_id, 1])])


def test_the_digest_follows_every_setting() -> None:
    digests = {
        OracleScorer(TASK.rules).digest,
        OracleScorer(TASK.rules, smoothing=1e-4).digest,
        OracleScorer(WalkTask(seed=0, p=29).rules).digest,
        OracleScorer(WalkTask(seed=0, noise_levels=(0.05, 0.35, 0.65, 0.86)).rules).digest,
    }
    assert len(digests) == 4
    # The seed orders prompts; it is no setting of the teacher.
    assert OracleScorer(WalkTask(seed=5).rules, name="other").digest == OracleScorer(TASK.rules).digest
    assert OracleScorer(TASK.rules).tokenizer_digest == TASK.tokenizer.digest


@pytest.mark.parametrize("smoothing", [0.0, 1.0, -0.1, math.nan])
def test_a_smoothing_that_is_no_weight_is_refused(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.smoothing"):
        OracleScorer(TASK.rules, smoothing=smoothing)


def test_draws_at_the_edges_of_a_row_stay_in_the_row() -> None:
    table = RowTable(np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])), temperature=1.0)
    edges_TM = np.array([[0.0, 0.25, 1 - 2.0**-53]] * 3)
    assert table.draws(np.arange(3), edges_TM).tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 1]]
