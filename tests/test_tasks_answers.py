from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncopd.tasks.answers import answers_match, extract_answer, normalised
from asyncopd.tasks.prompts import read_questions
from asyncopd.types import Split


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_gsm8k_reference_is_extracted_and_verifies_against_itself(split: Split) -> None:
    for question in read_questions("gsm8k", split):
        reference = question.answer
        reasoning, _, final = reference.rpartition("####")
        expected = extract_answer(reference)
        assert expected == final.strip()
        assert answers_match(expected, reference.split()[-1])
        # As other answer styles write the same thing.
        assert answers_match(extract_answer(f"{reasoning}So it is \\boxed{{{expected}}}."), expected)
        assert answers_match(extract_answer(f"{reasoning}So it is $\\boxed{{\\text{{{expected}}}}}$."), expected)
        assert answers_match(extract_answer(f"{reasoning}The answer is {expected}."), expected)
        assert answers_match(extract_answer(f"{reasoning}The answer is ${expected}.00 in total."), expected)
        assert not answers_match(extract_answer(f"{reasoning}#### {expected}1"), expected)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a 3\n#### 18", "18"),
        ("#### 18\n\nQuestion: another?\n#### 5", "18"),  # a model that rambles on
        ("####\n#### 5", "5"),
        ("####18", "18"),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{a{b{c}}d} and 7", "a{b{c}}d"),
        (r"\boxed{4} and \boxed{5", "4"),  # the second never closes
        (r"{ \boxed{4}", "4"),
        ("16-3-4=9", "9"),
        ("10-5", "5"),  # the minus subtracts
        ("it is -5.", "-5"),
        ("it is −5.", "−5"),
        ("they pay $1,234.50.", "$1,234.50"),
        ("they lose -$5 or $-5", "$-5"),
        ("half, 1/2, of it", "1/2"),
        (r"so $\frac{3}{4}$", "$3/4"),
        ("18km.", "18"),
        ("use v2.0", None),
        ("on 1/2/2024", None),
        ("1,2,3", "3"),
        ("= ...5", "5"),
        ("", None),
        ("no number", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "group",
    [
        ["70000", "70,000", "$70,000", "70000.00", "70000.", r"\$70{,}000", "70,000 dollars", "x = 70000", "+70000"],
        ["50", "50%", r"50\%", "50.0 %"],
        ["1/2", "0.5", ".5", r"\frac{1}{2}", r"\dfrac12", "2/4", r"$\frac{1}{2}$"],
        ["-3", "−3", "-3.0", "$-3", "-$3"],
        ["1/3", "2/6"],
        ["0.333"],
        ["blue", "Blue.", r"\text{blue}", " BLUE "],
        ["2x"],
        ["2*(3)"],
        ["10-x"],
        ["(3, 4)"],
        ["3, 4"],
        ["5^2"],
        ["1/0"],
        ["7 of 9"],
    ],
)
def test_equal_answers_are_equal_and_differ_from_all_others(group: list[str]) -> None:
    assert len({normalised(answer) for answer in group}) == 1
    assert all(answers_match(group[0], answer) for answer in group)
    assert not answers_match(group[0], "12345")
    assert not answers_match(group[0], None)
    assert not answers_match(None, group[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [("2x", "2"), ("10-x", "10"), ("1/2", "1"), ("1,2,3", "123"), ("0.333", "1/3"), ("7 of 9", "7"), ("5^2", "25")],
)
def test_answers_that_only_look_alike_differ(one: str, other: str) -> None:
    assert not answers_match(one, other)


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_survives_writing(value: Fraction) -> None:
    assert normalised(str(value)) == str(value)
    assert extract_answer(f"The answer is {value}.") == str(value)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_every_amount_of_money_survives_writing(cents: int, zeros: int) -> None:
    written = f"{cents:,}." + "0" * zeros
    assert answers_match(extract_answer(f"So they earn {written} dollars"), str(cents))


@given(st.lists(st.sampled_from([*"0123456789.,-−/$%\\{}#() \nabx", "\\boxed{", "\\frac", "####"]), max_size=40))
def test_no_text_makes_extraction_or_comparison_raise(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = extract_answer(text)
    if found is not None:
        assert answers_match(found, found)
    normalised(text)


@pytest.mark.parametrize(
    "piece", ["9", "1,", "1/", "\\boxed{", "\\frac", "#### ", "$", "-", " ", "1,234", "{", "}", "\\text{", "("]
)
def test_a_model_stuck_in_a_loop_costs_no_more_than_a_moment(piece: str) -> None:
    # Nested unclosed boxes once took half a minute, and Python refuses to convert 5000 digits.
    text = piece * (60_000 // len(piece))
    start = time.process_time()
    normalised(text)
    extract_answer(text)
    assert time.process_time() - start < 2
