"""The law, its random numbers and its candidates: what is stored is what was really sampled from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asyncopd.errors import ConfigError
from asyncopd.models.sampling import (
    LOGPROB_FLOOR,
    CandidateRule,
    check_law,
    draw,
    inverse_cdf,
    lane_uniforms,
    law_logprobs,
    policy_key,
    teacher_key,
)

torch.set_num_threads(1)
NUM_ROWS = 20_000


def keys(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return np.array([policy_key(seed, index) for index in range(count)], np.uint64)


def repeated_logits(vocab_size: int = 12, seed: int = 0) -> torch.Tensor:
    """[NUM_ROWS, V]: one distribution, many independent rows."""
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 1.5
    return logits_V.expand(NUM_ROWS, vocab_size)


def assert_follows(ids: NDArray[np.int64], logprobs_V: NDArray[np.float64]) -> None:
    """Chi-square of i.i.d. draws against a law; the bound is exceeded once in about 10^5 right samples."""
    expected_V = np.exp(logprobs_V) * len(ids)
    counts_V = np.bincount(ids, minlength=len(logprobs_V))
    possible_V = expected_V > 0
    assert counts_V[~possible_V].sum() == 0
    chi_square = ((counts_V - expected_V) ** 2)[possible_V] / expected_V[possible_V]
    degrees = possible_V.sum() - 1
    assert chi_square.sum() < degrees + 4.3 * np.sqrt(2 * degrees) + 10


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.5, 0.6)])
def test_tokens_and_policy_draws_follow_the_stored_law(temperature: float, top_p: float) -> None:
    logprobs_AV = law_logprobs(repeated_logits(), temperature=temperature, top_p=top_p)
    rule = CandidateRule(head=0, num_draws=3, law="policy")
    draws = draw(logprobs_AV, keys(NUM_ROWS), np.full(NUM_ROWS, 4), rule)
    law_V = logprobs_AV[0].double().numpy()
    assert np.exp(law_V).sum() == pytest.approx(1.0, abs=1e-6)
    for column in range(4):
        assert_follows(draws.ids_AC[:, column].numpy(), law_V)
    # The emitted token is draw 0, the other draws are independent of it.
    assert (draws.ids_AC[:, 0] == draws.ids_AC[:, 1]).all()
    pairs = draws.ids_AC[:, 1].numpy() * 12 + draws.ids_AC[:, 2].numpy()
    assert_follows(pairs, (law_V[:, None] + law_V[None, :]).ravel())
    stored = logprobs_AV.gather(1, draws.ids_AC)
    assert torch.equal(draws.logprobs_AC, stored)


def test_tail_draws_follow_the_law_outside_the_head_and_keep_unrestricted_logprobs() -> None:
    logprobs_AV = law_logprobs(repeated_logits(), temperature=1.0, top_p=1.0)
    draws = draw(logprobs_AV, keys(NUM_ROWS), np.zeros(NUM_ROWS, np.int64), CandidateRule(4, 2, "tail"))
    law_V = logprobs_AV[0].double().numpy()
    head = np.argsort(-law_V)[:4]
    assert draws.ids_AC[0, 1:5].tolist() == head.tolist()
    tail_V = law_V.copy()
    tail_V[head] = -np.inf
    logmass = np.log(np.exp(tail_V).sum())
    assert draws.tail_logmass_A[0].item() == pytest.approx(logmass, abs=1e-5)
    assert_follows(draws.ids_AC[:, 0].numpy(), law_V)
    for column in (5, 6):
        assert_follows(draws.ids_AC[:, column].numpy(), tail_V - logmass)
    assert torch.equal(draws.logprobs_AC, logprobs_AV.gather(1, draws.ids_AC))


def test_emitted_tokens_do_not_depend_on_the_candidates_recorded() -> None:
    logprobs_AV = law_logprobs(repeated_logits()[:500], temperature=1.0, top_p=1.0)
    emitted = [
        draw(logprobs_AV, keys(500), np.arange(500), rule).ids_AC[:, 0].tolist()
        for rule in (CandidateRule(0, 0), CandidateRule(4, 4, "tail"), CandidateRule(2, 16, "policy"))
    ]
    assert emitted[0] == emitted[1] == emitted[2]


def test_a_head_that_leaves_nothing_has_a_finite_floor_and_weightless_draws() -> None:
    logits_AV = repeated_logits()[:8]
    whole = draw(
        law_logprobs(logits_AV, temperature=1.0, top_p=1.0),
        keys(8),
        np.zeros(8, np.int64),
        CandidateRule(12, 2, "tail"),
    )
    truncated = draw(
        law_logprobs(logits_AV, temperature=1.0, top_p=0.05),
        keys(8),
        np.zeros(8, np.int64),
        CandidateRule(3, 2, "tail"),
    )
    for draws in (whole, truncated):
        assert (draws.tail_logmass_A == LOGPROB_FLOOR).all()
        assert torch.isfinite(draws.logprobs_AC).all()
        assert (draws.ids_AC[:, -2:] == draws.ids_AC[:, 1:2]).all()
    # top_p 0.05 keeps one id: the rest of the head has probability 0, stored as the floor.
    assert truncated.logprobs_AC[0].tolist() == [0.0, 0.0, LOGPROB_FLOOR, LOGPROB_FLOOR, 0.0, 0.0]


def test_top_p_keeps_the_id_that_crosses_and_the_first_always() -> None:
    logits_AV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.85, 3), (0.99, 4)):
        probs_V = law_logprobs(logits_AV, temperature=1.0, top_p=top_p).exp()[0]
        assert (probs_V > 0).sum() == kept
        assert probs_V.sum().item() == pytest.approx(1.0)
        assert (probs_V[0] / probs_V[kept - 1]).item() == pytest.approx(
            (logits_AV[0, 0] - logits_AV[0, kept - 1]).exp()
        )


@pytest.mark.parametrize("vocab_size", [7, 4096, 4097, 50_000])
def test_inverse_cdf_of_small_and_blocked_vocabularies(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weights_AV = torch.rand(5, vocab_size, generator=generator).pow(8)
    weights_AV[:, torch.rand(vocab_size, generator=generator) < 0.5] = 0.0
    weights_AV[:, 3] = 0.5
    uniforms_AN = torch.rand(5, 400, generator=generator, dtype=torch.float64)
    uniforms_AN[:, 0], uniforms_AN[:, 1] = 0.0, 1.0 - 2.0**-53
    ids_AN = inverse_cdf(weights_AV, uniforms_AN)
    assert (weights_AV.gather(1, ids_AN) > 0).all()
    cdf_AV = weights_AV.double().cumsum(-1) / weights_AV.double().sum(-1, keepdim=True)
    upper = cdf_AV.gather(1, ids_AN)
    lower = upper - weights_AV.double().gather(1, ids_AN) / weights_AV.double().sum(-1, keepdim=True)
    # Block sums are float32, so a uniform may land beside its id by that much.
    assert (uniforms_AN < upper + 1e-6).all()
    assert (uniforms_AN > lower - 1e-6).all()


def test_random_numbers_are_a_function_of_their_address() -> None:
    keys_A = keys(50)
    positions_A = np.arange(50)
    wide = lane_uniforms(keys_A, positions_A, 9)
    assert np.array_equal(wide[:, :3], lane_uniforms(keys_A, positions_A, 3))
    assert np.array_equal(wide[7:8], lane_uniforms(keys_A[7:8], positions_A[7:8], 9))
    assert len(np.unique(wide)) == wide.size
    assert len({policy_key(0, 1), policy_key(1, 0), teacher_key(0, 1), teacher_key(1, 0)}) == 4


def test_settings_that_name_no_law_are_refused() -> None:
    rule = CandidateRule(2, 2)
    with pytest.raises(ConfigError, match="temperature"):
        check_law(temperature=0.0, top_p=1.0, rule=rule, vocab_size=9)
    with pytest.raises(ConfigError, match="top_p"):
        check_law(temperature=1.0, top_p=0.0, rule=rule, vocab_size=9)
    with pytest.raises(ConfigError, match="head 10"):
        check_law(temperature=1.0, top_p=1.0, rule=CandidateRule(10, 2), vocab_size=9)
