from __future__ import annotations

import time
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncopd.config.tasks import WalkConfig
from asyncopd.errors import ConfigError
from asyncopd.models.random import derive, permutation, stream_key, uniform, uniforms
from asyncopd.tasks.build import build_task
from asyncopd.tasks.walk import WalkTask
from asyncopd.tasks.walk_rules import EOS_ID, PAD_ID
from asyncopd.types import Prompt, Split

TASK = WalkTask(seed=0)
SAME_TASK = WalkTask(seed=0)
RULES = TASK.rules
WEIGHTS = {"noise 0.05": 0.5, "noise 0.35": 0.28, "noise 0.65": 0.15, "noise 0.85": 0.07}


def question(text: str) -> Prompt:
    return Prompt(0, "q", np.array(TASK.tokenizer.encode(text), np.int32), "")


def demo_lengths(num: int) -> np.ndarray:
    return np.array([len(TASK.demonstration(index, "train").response_ids) for index in range(num)])


# -- draws ------------------------------------------------------------------------------------------------------------


def test_draws_never_change_between_releases_and_machines() -> None:
    # Every stored run depends on these: a change here changes what index 0 means.
    assert stream_key("walk prompts", 0) == 5859055938933254972
    assert derive(5859055938933254972, 3) == 15213205163986674155
    # The first output of the published SplitMix64 with seed 0.
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    assert TASK.tokenizer.decode(TASK.demonstration(3, "train").response_ids) == "-1 4 ×2 8 <eos>"


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_vectorised_draws_are_the_scalar_draws(key: int, counter: int) -> None:
    drawn = uniforms(np.array([key], np.uint64), np.array([counter]))
    assert drawn[0] == uniform(key, counter)
    assert 0 <= drawn[0] < 1


def test_draws_are_uniform_and_streams_are_unrelated() -> None:
    keys = np.array([derive(stream_key("test", 0), part) for part in range(200)], np.uint64)
    drawn = uniforms(keys[:, None], np.arange(500))
    assert np.histogram(drawn, bins=20, range=(0, 1))[0] == pytest.approx(5000, abs=5 * 5000**0.5)
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert sorted(permutation(1, 50)) == list(range(50))
    assert list(permutation(1, 50)) != list(permutation(2, 50))


# -- rules ------------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_breadth_first_search() -> None:
    for goal in range(31):
        distance = {goal: 0}
        queue = deque([goal])
        while queue:
            there = queue.popleft()
            for here in range(31):
                if here not in distance and there in (
                    (here + 1) % 31,
                    (here - 1) % 31,
                    2 * here % 31,
                    (here + 11) % 31,
                ):
                    distance[here] = distance[there] + 1
                    queue.append(here)
        assert [distance[state] for state in range(31)] == RULES.distances_GS[goal].tolist()


def test_vocabulary_is_the_documented_one() -> None:
    text = "<pad> <eos> ~0.05 ~0.35 ~0.65 ~0.85 +1 -1 ×2 +11 0 1 2"
    assert TASK.tokenizer.encode(text) == list(range(13))
    assert RULES.vocab_size == 2 + 4 + 4 + 31
    assert (TASK.tokenizer.pad_id, TASK.tokenizer.eos_id) == (PAD_ID, EOS_ID)


# -- prompts ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_a_prompt_is_a_pure_function_of_seed_split_and_index(index: int, split: Split) -> None:
    first, again = TASK.prompt(index, split), SAME_TASK.prompt(index, split)
    assert (first.prompt_id, first.group, first.ids.tolist()) == (again.prompt_id, again.group, again.ids.tolist())
    assert first.index == index
    assert first.group in TASK.groups
    assert first.ids[1] != first.ids[2]
    assert TASK.tokenizer.decode(first.ids).split()[0] == first.group.replace("noise ", "~")


def test_equal_questions_have_equal_prompt_ids_and_different_questions_different_ones() -> None:
    seen: dict[str, tuple[int, ...]] = {}
    for index in range(5000):
        prompt = TASK.prompt(index, "train")
        assert seen.setdefault(prompt.prompt_id, tuple(prompt.ids)) == tuple(prompt.ids)
    assert len(set(seen.values())) == len(seen) > 1500


def test_training_and_evaluation_share_no_question() -> None:
    def pairs(prompts: list[np.ndarray]) -> set[tuple[int, int]]:
        return {(int(ids[1]), int(ids[2])) for ids in prompts}

    train = pairs([TASK.prompt(index, "train").ids for index in range(20_000)])
    train |= pairs([TASK.demonstration(index, "train").prompt_ids for index in range(5000)])
    held_out = pairs([TASK.prompt(index, "eval").ids for index in range(1000)])
    held_out |= pairs([TASK.demonstration(index, "eval").prompt_ids for index in range(1000)])
    assert not train & held_out
    assert len(held_out) == 93
    assert len(train) == 930 - 93


def test_another_seed_gives_other_training_prompts_but_the_same_held_out_questions() -> None:
    # A model pre-trained under one seed is evaluated under another: the split may not depend on the seed.
    other = WalkTask(seed=1)
    assert [TASK.prompt(i, "train").prompt_id for i in range(20)] != [
        other.prompt(i, "train").prompt_id for i in range(20)
    ]
    assert [TASK.prompt(i, "eval").prompt_id for i in range(500)] == [
        other.prompt(i, "eval").prompt_id for i in range(500)
    ]
    resplit = WalkTask(seed=0, split_seed=1)
    assert {resplit.prompt(i, "eval").prompt_id for i in range(500)} != {
        TASK.prompt(i, "eval").prompt_id for i in range(500)
    }


def test_the_first_evaluation_prompts_have_the_mix_of_the_weights() -> None:
    for num in (100, 300, 1000):
        counts = Counter(TASK.prompt(index, "eval").group for index in range(num))
        assert counts == {group: round(weight * num) for group, weight in WEIGHTS.items()}
    counts = Counter(TASK.prompt(index, "eval").group for index in range(37))
    assert all(abs(counts[group] - 37 * weight) <= 1 for group, weight in WEIGHTS.items())


def test_evaluation_asks_no_question_twice_before_it_asked_all_of_that_level() -> None:
    quiet = [TASK.prompt(i, "eval").prompt_id for i in range(400) if TASK.prompt(i, "eval").group == "noise 0.05"]
    assert len(set(quiet[:93])) == 93
    assert quiet[93:186] == quiet[:93]


def test_training_prompts_have_the_mix_of_the_weights() -> None:
    counts = Counter(TASK.prompt(index, "train").group for index in range(20_000))
    for group, weight in WEIGHTS.items():
        assert counts[group] / 20_000 == pytest.approx(weight, abs=0.015)


def test_prompts_are_cheap() -> None:
    # Target 20 µs; the bound leaves room for a loaded machine.
    start = time.process_time()
    for index in range(5000):
        TASK.prompt(index, "train")
    assert (time.process_time() - start) / 5000 < 60e-6


# -- demonstrations ---------------------------------------------------------------------------------------------------


def test_lengths_are_heavy_tailed_as_documented() -> None:
    lengths = demo_lengths(20_000)
    assert lengths.mean() == pytest.approx(11.0, abs=0.4)
    assert np.percentile(lengths, 99) == pytest.approx(69, abs=6)
    assert np.median(lengths) == 7
    assert 140 <= lengths.max() <= 192


def test_a_demonstration_longer_than_the_cap_is_drawn_again_for_the_same_question() -> None:
    capped = WalkTask(seed=0, max_demo_tokens=21)
    redrawn = 0
    for index in range(500):
        free, short = TASK.demonstration(index, "train"), capped.demonstration(index, "train")
        assert free.prompt_ids.tolist() == short.prompt_ids.tolist()
        assert len(short.response_ids) <= 21
        if len(free.response_ids) <= 21:
            assert free.response_ids.tolist() == short.response_ids.tolist()
        else:
            redrawn += 1
    assert redrawn > 20


def test_a_cap_below_the_longest_shortest_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_demo_tokens 9.*has 11 tokens"):
        WalkTask(seed=0, max_demo_tokens=9)
    assert WalkTask(seed=0, max_demo_tokens=11).demonstration(0, "train")


@pytest.mark.parametrize("p", [5, 11, 12, 101])
def test_other_moduli_work(p: int) -> None:
    # +11 is no move on Z_11 and equals −1 on Z_12.
    task = WalkTask(seed=0, p=p)
    for index in range(50):
        for split in ("train", "eval"):
            demo = task.demonstration(index, split)
            assert task.verify(Prompt(0, "q", demo.prompt_ids, ""), demo.response_ids)


# -- verifier ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.sampled_from(["train", "eval"]))
def test_the_verifier_accepts_every_demonstration(index: int, split: Split) -> None:
    demo = TASK.demonstration(index, split)
    assert TASK.verify(Prompt(index, "q", demo.prompt_ids, ""), demo.response_ids)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("+1 4 +1 5 <eos>", True),
        ("+11 14 -1 13 +1 14 +11 25 +11 5 <eos>", True),
        ("+1 4 +1 5", False),  # no EOS
        ("+1 4 +1 5 <eos> <eos>", False),  # something after EOS
        ("+1 4 +1 5 <eos> <pad>", False),
        ("+1 4 +1 5 +1 6 <eos>", False),  # walks on at the goal
        ("+1 4 +1 5 +1 6 -1 5 <eos>", False),  # comes back to the goal
        ("+1 4 <eos>", False),  # stops early
        ("+1 5 <eos>", False),  # wrong state
        ("+1 4 5 <eos>", False),  # operation missing
        ("+1 +1 5 <eos>", False),  # state missing
        ("4 +1 5 +1 <eos>", False),  # order swapped
        ("+1 4 +1 <eos>", False),  # cut in a pair
        ("~0.05 4 +1 5 <eos>", False),  # no operation
        ("<eos>", False),
        ("", False),
    ],
)
def test_the_verifier_is_exact(response: str, right: bool) -> None:
    assert TASK.verify(question("~0.05 3 5"), TASK.tokenizer.encode(response)) is right


def test_doubling_zero_is_a_legal_non_move() -> None:
    assert TASK.verify(question("~0.85 0 1"), TASK.tokenizer.encode("×2 0 ×2 0 +1 1 <eos>"))


@given(st.data())
def test_the_verifier_rejects_every_mutation_of_one_token(data: st.DataObject) -> None:
    demo = TASK.demonstration(data.draw(st.integers(0, 10**5)), "train")
    response = demo.response_ids.tolist()
    prompt = Prompt(0, "q", demo.prompt_ids, "")
    place = data.draw(st.integers(0, len(response) - 1))
    token_id = data.draw(st.integers(0, RULES.vocab_size - 1))
    kind = data.draw(st.sampled_from(["replace", "delete", "insert", "append", "truncate"]))
    mutated = {
        "replace": [*response[:place], token_id, *response[place + 1 :]],
        "delete": [*response[:place], *response[place + 1 :]],
        "insert": [*response[:place], token_id, *response[place:]],
        "append": [*response, token_id],
        "truncate": response[:place],
    }[kind]
    if mutated == response:
        return
    if kind == "replace" and place % 2 == 0 and place < len(response) - 1:
        # Another operation with the same result is as right as the first: on 0, for example, −1 and ... or 1·2 = 1+1.
        if TASK.verify(prompt, mutated):
            state = TASK.tokenizer.token_text(response[place + 1])
            before = TASK.tokenizer.token_text(response[place - 1] if place else int(demo.prompt_ids[1]))
            effects = {"+1": 1 + int(before), "-1": int(before) - 1, "×2": 2 * int(before), "+11": int(before) + 11}
            assert effects[TASK.tokenizer.token_text(token_id)] % 31 == int(state)
        return
    assert not TASK.verify(prompt, mutated)


@given(st.lists(st.integers(-5, 10**6), max_size=30))
def test_the_verifier_never_raises(ids: list[int]) -> None:
    assert TASK.verify(question("~0.35 3 5"), ids) is False or ids[-1] == EOS_ID


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_build_the_task_they_describe() -> None:
    config = WalkConfig(p=13, noise_levels=(0.0, 1.0), noise_weights=(0.5, 0.5), max_demo_tokens=400)
    task = build_task(config, seed=3)
    assert task.groups == ("noise 0", "noise 1")
    assert task.max_prompt_tokens == config.max_prompt_tokens == len(task.prompt(0, "train").ids)
    default = build_task(WalkConfig(), seed=0)
    assert default.prompt(7, "train").prompt_id == TASK.prompt(7, "train").prompt_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_weights": (0.5, 0.5)}, "equal lengths"),
        ({"noise_levels": (0.1, 0.1, 0.2, 0.3)}, "distinct"),
        ({"noise_weights": (0.5, 0.3, 0.1, 0.2)}, "add up to 1.1"),
        ({"p": 3}, "greater than or equal to 5"),
        ({"modulus": 31}, "Extra inputs"),
        ({"eval_fraction": 0.0}, "greater than 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WalkConfig.model_validate(settings)
