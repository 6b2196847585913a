from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncopd.config.tasks import TextConfig
from asyncopd.errors import ConfigError
from asyncopd.tasks.build import build_task
from asyncopd.tasks.prompts import Question, ShuffledStream, read_questions, split_questions
from asyncopd.tasks.text import TextTask
from asyncopd.tasks.tokenizers import ByteTokenizer

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(40)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_task(tmp_path: Path, rows: list[Any] = ROWS, *, seed: int = 0, **settings: Any) -> TextTask:
    train_path = write_jsonl(tmp_path / "train.jsonl", rows)
    task = build_task(TextConfig(train_path=train_path, **settings), seed)
    assert isinstance(task, TextTask)
    return task


# -- reading ----------------------------------------------------------------------------------------------------------


def test_jsonl_and_parquet_hold_the_same_questions(tmp_path: Path) -> None:
    jsonl = read_questions(write_jsonl(tmp_path / "a.jsonl", ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    parquet = read_questions(str(tmp_path / "a.parquet"))
    assert [(q.question, q.answer) for q in jsonl] == [(q.question, q.answer) for q in parquet]
    assert jsonl[2].where == f"{tmp_path / 'a.jsonl'}:3"


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    line = json.dumps(ROWS[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n\n" + line + b"\n   \n")
    assert [q.where[-2:] for q in read_questions(str(tmp_path / "a.jsonl"))] == [":1", ":3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the data set is empty"),
        ("\n\n", "the data set is empty"),
        ('{"question": "a", "answer": "b"}\n{broken\n', r"a\.jsonl:2: not a JSON object"),
        ('["question", "answer"]\n', r"a\.jsonl:1: expected an object with fields, found list"),
        ('{"question": "a", "solution": "b"}\n', r"a\.jsonl:1: no field 'answer'; found \['question', 'solution'\]"),
        ('{"question": "a", "answer": 5}\n', r"a\.jsonl:1: field 'answer' is int '5'; expected text"),
        ('{"question": null, "answer": "b"}\n', r"field 'question' is NoneType"),
        ('{"question": "  ", "answer": "b"}\n', r"field 'question' is blank"),
        ("[" * 200_000, r"a\.jsonl:1: not a JSON object in UTF-8: maximum recursion depth"),
        ('{"question": ' + "9" * 5000 + "}", r"a\.jsonl:1: not a JSON object.*limit"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_questions(str(tmp_path / "a.jsonl"))


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: .*UTF-8"):
        read_questions(str(tmp_path / "a.jsonl"))


def test_a_missing_file_names_what_is_there_instead(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"no such file\. In .* there is \['train\.jsonl'\]"):
        read_questions(str(tmp_path / "trian.jsonl"))
    (tmp_path / "train.csv").touch()
    with pytest.raises(ConfigError, match=r"ending in \.jsonl, \.jsonl\.gz or \.parquet"):
        read_questions(str(tmp_path / "train.csv"))
    with pytest.raises(ConfigError, match=r"a directory; expected one file\. In .* there is \['train\.jsonl'\]"):
        read_questions(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot be read: .*File name too long"):
        read_questions("x" * 300 + ".jsonl")
    with pytest.raises(ConfigError, match=r"cannot be read: .*home directory"):
        read_questions("~nobody-of-that-name/a.jsonl")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: not a readable Parquet file"):
        read_questions(str(tmp_path / "a.parquet"))
    pq.write_table(pa.Table.from_pylist([{"question": "a", "text": "b"}]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: no field 'answer'; found \['question', 'text'\]"):
        read_questions(str(tmp_path / "b.parquet"))


def test_columns_that_are_not_asked_for_need_not_be_readable(tmp_path: Path) -> None:
    # A time in ns is more than Python's datetime holds: reading the whole row was a raw ValueError.
    table = pa.table({**pa.Table.from_pylist(ROWS).to_pydict(), "made": pa.array([1] * 40, pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(read_questions(str(tmp_path / "a.parquet"))) == 40
    with pytest.raises(ConfigError, match=r"a\.parquet:1: columns \('question', 'made'\): .*Expected text"):
        read_questions(str(tmp_path / "a.parquet"), answer_field="made")


def test_half_a_character_is_named_with_its_row(tmp_path: Path) -> None:
    # Once a raw UnicodeEncodeError in the tokenizer.
    bad = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"question": "a\ud800b", "answer": "b"}])
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: field 'question' has half .*, \\ud800, at character 2"):
        read_questions(bad)
    whole = write_jsonl(tmp_path / "b.jsonl", [{"question": "\U0001f986?", "answer": "b"}])
    assert "\\ud83e\\udd86" in Path(whole).read_text()
    assert read_questions(whole)[0].question == "\U0001f986?"
    binary = pa.array([b"a", b"\xed\xa0\x80"])
    text = pa.StringArray.from_buffers(2, *binary.buffers()[1:])
    pq.write_table(pa.table({"question": text, "answer": ["a", "b"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match=r"c\.parquet:2: .*can't decode byte 0xed.*Expected text in UTF-8"):
        read_questions(str(tmp_path / "c.parquet"))


def test_a_gz_file_is_read_and_a_cut_one_named(tmp_path: Path) -> None:
    packed = gzip.compress(Path(write_jsonl(tmp_path / "a.jsonl", ROWS)).read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert read_questions(str(tmp_path / "a.jsonl.gz"))[39].where.endswith("a.jsonl.gz:40")
    for broken in (packed[:-20], packed[:40] + bytes(20) + packed[60:], b"no gzip"):
        (tmp_path / "b.jsonl.gz").write_bytes(broken)
        with pytest.raises(ConfigError, match=r"b\.jsonl\.gz.*Expected"):
            read_questions(str(tmp_path / "b.jsonl.gz"))


def test_field_names_can_be_chosen(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "1+1?", "solution": r"\boxed{2}"}])
    (question,) = read_questions(path, question_field="problem", answer_field="solution")
    assert (question.question, question.answer) == ("1+1?", r"\boxed{2}")


def stand_in_for_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.__spec__ = ModuleSpec("datasets", None)
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("hf:openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
        ("hf:openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
        ("hf:some/set::validation", ("some/set", None, "validation")),
    ],
)
def test_a_hugging_face_source_names_data_set_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]
) -> None:
    calls: list[tuple[str, str | None, str]] = []

    class Rows(list[dict[str, Any]]):
        column_names = ("question", "answer", "image")

        def select_columns(self, names: list[str]) -> Rows:
            return Rows({name: row[name] for name in names} for row in self)

    def load(name: str, config: str | None, *, split: str) -> Rows:
        calls.append((name, config, split))
        return Rows(ROWS[:3])

    stand_in_for_datasets(monkeypatch, load)
    questions = read_questions(source)
    assert calls == [asked]
    assert [q.where for q in questions] == [f"{source}:{n}" for n in (1, 2, 3)]


def test_a_hugging_face_source_without_network_or_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong traceback")

    stand_in_for_datasets(monkeypatch, offline)
    with pytest.raises(ConfigError, match=r"hf:a/b: could not be loaded: ConnectionError.*export it to JSONL"):
        read_questions("hf:a/b")
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        read_questions("hf:a/b")


# -- splitting and order ----------------------------------------------------------------------------------------------


def questions(*texts: str) -> list[Question]:
    return [Question(text, "#### 1", f"file:{number}") for number, text in enumerate(texts, 1)]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1), st.floats(0.01, 0.99), st.integers(0, 5))
def test_the_held_out_fraction_shares_no_question_text(texts: list[str], fraction: float, split_seed: int) -> None:
    if len(set(texts)) < 2:
        with pytest.raises(ConfigError, match="expected at least one each"):
            split_questions(questions(*texts), None, eval_fraction=fraction, split_seed=split_seed)
        return
    train, held_out = split_questions(questions(*texts), None, eval_fraction=fraction, split_seed=split_seed)
    assert not {q.question for q in train} & {q.question for q in held_out}
    assert sorted(q.question for q in train + held_out) == sorted(texts)
    assert train
    assert held_out


def test_training_questions_that_are_evaluated_elsewhere_are_left_out() -> None:
    train, held_out = split_questions(questions("a", "b", "c"), questions("b", "x"), eval_fraction=0.1, split_seed=0)
    assert [q.question for q in train] == ["a", "c"]
    assert [q.question for q in held_out] == ["b", "x"]
    with pytest.raises(ConfigError, match="0 are left for training"):
        split_questions(questions("a"), questions("a"), eval_fraction=0.1, split_seed=0)


@given(st.integers(0, 2**64 - 1), st.integers(1, 50), st.integers(0, 40))
def test_every_epoch_asks_every_question_once_in_an_order_of_its_own(key: int, count: int, epoch: int) -> None:
    stream = ShuffledStream(key, count)
    order = [stream.item(epoch * count + place) for place in range(count)]
    assert sorted(order) == list(range(count))
    assert order == [ShuffledStream(key, count).item(epoch * count + place) for place in range(count)]
    if count > 20:
        assert order != [stream.item((epoch + 1) * count + place) for place in range(count)]


# -- the task ---------------------------------------------------------------------------------------------------------


def test_prompts_resume_at_any_index(tmp_path: Path) -> None:
    task, again = make_task(tmp_path), make_task(tmp_path)
    for index in (0, 5, 36, 10_000):
        for split in ("train", "eval"):
            first, second = task.prompt(index, split), again.prompt(index, split)
            assert (first.prompt_id, first.ids.tolist()) == (second.prompt_id, second.ids.tolist())
    assert Counter(task.prompt(i, "train").prompt_id for i in range(36 * 3)) == dict.fromkeys(
        {task.prompt(i, "train").prompt_id for i in range(36)}, 3
    )


def test_another_seed_reorders_training_but_not_evaluation(tmp_path: Path) -> None:
    task, other = make_task(tmp_path), make_task(tmp_path, seed=1)
    assert [task.prompt(i, "train").prompt_id for i in range(36)] != [
        other.prompt(i, "train").prompt_id for i in range(36)
    ]
    assert [task.prompt(i, "eval").prompt_id for i in range(4)] == [other.prompt(i, "eval").prompt_id for i in range(4)]


def test_a_prompt_is_the_filled_template_and_its_reference_the_final_answer(tmp_path: Path) -> None:
    task = make_task(tmp_path, template="Use \\boxed{}.\nQ: {question}\nA:")
    prompt = task.prompt(0, "train")
    text = task.tokenizer.decode(prompt.ids)
    assert text.startswith("<bos>Use \\boxed{}.\nQ: What is ")
    number = int(text.split()[-2].rstrip("?"))
    assert prompt.reference == str(2 * number)


def test_a_question_cannot_fill_the_template_a_second_time(tmp_path: Path) -> None:
    rows = [{"question": f"What does {{question}} mean? {n}", "answer": "#### 1"} for n in range(2)]
    text = make_task(tmp_path, rows).tokenizer.decode(make_task(tmp_path, rows).prompt(0, "train").ids)
    assert text.count("What does {question} mean?") == 1


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("so 6\n#### {n}<eos>", True),
        ("it is \\boxed{{{n}.0}}<eos>", True),
        ("The answer is ${n}.<eos>", True),
        ("The answer is {n}", True),  # hit the length limit
        ("#### {n}<eos>#### 7", True),  # nothing after EOS counts
        ("#### {n}7<eos>", False),
        ("no idea<eos>", False),
        ("<eos>", False),
        ("", False),
    ],
)
def test_the_verdict_is_about_the_final_answer(tmp_path: Path, response: str, right: bool) -> None:
    task = make_task(tmp_path)
    prompt = task.prompt(0, "train")
    ids: list[int] = []
    for number, part in enumerate(response.format(n=prompt.reference).split("<eos>")):
        ids += ([task.tokenizer.eos_id] if number else []) + task.tokenizer.encode(part)
    assert task.verify(prompt, ids) is right


@pytest.fixture(scope="module")
def task_of_module(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    return make_task(tmp_path_factory.mktemp("text"))


@given(ids=st.lists(st.integers(-5, 300)))
def test_the_verdict_never_raises(task_of_module: TextTask, ids: list[int]) -> None:
    task = task_of_module
    assert task.verify(task.prompt(0, "train"), ids) in (True, False)


def test_a_reference_in_words_is_matched_as_a_whole(tmp_path: Path) -> None:
    rows = [{"question": f"Capital of France? {n}", "answer": "Paris"} for n in range(3)]
    task = make_task(tmp_path, rows)
    assert task.verify(task.prompt(0, "train"), [*task.tokenizer.encode(" paris."), task.tokenizer.eos_id])
    assert task.verify(task.prompt(0, "train"), task.tokenizer.encode("#### Paris"))
    assert not task.verify(task.prompt(0, "train"), task.tokenizer.encode(" Rome"))


def test_a_demonstration_is_the_reference_answer_and_verifies(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    by_ids = {tuple(task.prompt(i, "train").ids): task.prompt(i, "train") for i in range(36)}
    for index in range(40):
        demo = task.demonstration(index, "train")
        assert demo.response_ids[-1] == task.tokenizer.eos_id
        assert task.tokenizer.decode(demo.response_ids).startswith(" ")
        assert task.verify(by_ids[tuple(demo.prompt_ids)], demo.response_ids)


def test_long_demonstrations_are_left_out_of_the_stream(tmp_path: Path) -> None:
    rows = [*ROWS[:5], *({"question": f"Long {n}", "answer": "x" * 200 + " #### 3"} for n in range(5))]
    task = make_task(tmp_path, rows, max_demo_tokens=40)
    assert all(len(task.demonstration(index, "train").response_ids) <= 40 for index in range(50))
    assert max(len(make_task(tmp_path, rows).demonstration(i, "train").response_ids) for i in range(50)) > 200
    with pytest.raises(ConfigError, match="max_demo_tokens 3: no train demonstration is that short; the shortest has"):
        make_task(tmp_path, rows, max_demo_tokens=3).demonstration(0, "train")


def test_long_prompts_are_refused_with_their_line_or_dropped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "x" * 300, "answer": "#### 1"}]
    with pytest.raises(ConfigError, match=r"train\.jsonl:41: the prompt has 319 tokens; expected 1 to 100"):
        make_task(tmp_path, rows, max_prompt_tokens=100)
    task = make_task(tmp_path, rows, max_prompt_tokens=100, long_prompts="drop")
    assert sum(task.num_dropped.values()) == 1
    assert all(len(task.prompt(index, "train").ids) <= 100 for index in range(80))
    with pytest.raises(ConfigError, match="dropping left none"):
        make_task(tmp_path, rows, max_prompt_tokens=5, long_prompts="drop")


def test_prompt_ids_cannot_be_changed_by_who_received_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_task(tmp_path).prompt(0, "train").ids[0] = 1


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "train_path"),
        ({"train_path": "a", "template": "Question:"}, "lacks {question}"),
        ({"train_path": "a", "answer_template": "x"}, "lacks {answer}"),
        ({"train_path": "a", "prompt_format": "chat"}, "tokenizer bytes has none"),
        ({"train_path": "a", "chat_options": {"enable_thinking": False}}, "no effect"),
        ({"train_path": "a", "path": "b"}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig.model_validate(settings)


def test_a_foreign_tokenizer_has_to_be_handed_in() -> None:
    with pytest.raises(ConfigError, match="no tokenizer was handed in"):
        build_task(TextConfig(train_path="a.jsonl", tokenizer="Qwen/Qwen3-0.6B"), seed=0)


class ChattyBytes(ByteTokenizer):
    def encode_chat(self, question: str, template: str, options: Any) -> list[int]:
        return self.encode(f"<user>{template.replace('{question}', question)}<assistant>{options}")


def test_chat_prompts_go_through_the_tokenizers_template(tmp_path: Path) -> None:
    config = TextConfig(
        train_path=write_jsonl(tmp_path / "a.jsonl", ROWS),
        template="{question}",
        tokenizer="chatty",
        prompt_format="chat",
        chat_options={"enable_thinking": False},
    )
    task = build_task(config, 0, ChattyBytes())
    text = task.tokenizer.decode(task.prompt(0, "train").ids)
    assert text.startswith("<user>What is")
    assert text.endswith("?<assistant>{'enable_thinking': False}")


# -- the real questions ------------------------------------------------------------------------------------------------


def test_gsm8k_comes_with_the_package_and_every_reference_answer_is_right() -> None:
    train, test = read_questions("gsm8k"), read_questions("gsm8k", "eval")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].question.startswith("Natalia sold clips to 48 of her friends in April, and then she sold half as")
    assert train[0].answer.endswith("\n#### 72")
    assert test[0].question.startswith("Janet’s ducks lay 16 eggs per day.")
    config = TextConfig(name="gsm8k", train_path="gsm8k", eval_path="gsm8k", max_prompt_tokens=1024, max_demo_tokens=0)
    task = build_task(config, seed=0)
    for split, num in (("train", 7473), ("eval", 1319)):
        prompts = {tuple(p.ids): p for p in (task.prompt(index, split) for index in range(num))}
        assert len(prompts) == num
        for index in range(num):
            demo = task.demonstration(index, split)
            assert task.verify(prompts[tuple(demo.prompt_ids)], demo.response_ids)
    assert max(len(task.prompt(index, "train").ids) for index in range(7473)) <= 1024
