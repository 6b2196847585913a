from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncopd.config import PretrainedModel
from asyncopd.errors import ConfigError
from asyncopd.models.files import ModelFiles
from asyncopd.tasks.tokenizers import ByteTokenizer, VocabTokenizer
from asyncopd.tasks.tokenizers_hf import HfTokenizer

BYTES = ByteTokenizer()
WORDS = VocabTokenizer(["<pad>", "<eos>", "go", "stop"])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_give_every_text_back(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.encode_prompt(text, "{question}") == [BYTES.bos_id, *BYTES.encode(text)]


@given(st.lists(st.integers(-10, 10**6)))
def test_decoding_never_fails(ids: list[int]) -> None:
    assert isinstance(BYTES.decode(ids), str)
    assert isinstance(WORDS.decode(ids), str)


def test_bytes_show_specials_and_broken_characters() -> None:
    assert BYTES.decode([72, 105, 258]) == "Hi<eos>"
    # A special between the bytes of one character does not join them.
    assert BYTES.decode([0xE2, 0x82, 256, 0xAC]) == "\ufffd<pad>\ufffd"
    assert [BYTES.token_text(i) for i in (65, 0xE2, 256, 257, 258, 999)] == [
        *("A", "<0xE2>", "<pad>", "<bos>", "<eos>", "<?999>")
    ]


def test_ids_may_come_as_an_array() -> None:
    # bytes(array) once decoded the array's memory.
    assert BYTES.decode(np.array([72, 105], np.int32)) == "Hi"  # type: ignore[arg-type]
    assert WORDS.decode(np.array([2, 3], np.int32)) == "go stop"  # type: ignore[arg-type]


def test_text_never_becomes_a_special_byte_token() -> None:
    assert max(BYTES.encode("<eos>")) < 256


def test_bytes_have_no_chat_template() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        BYTES.encode_chat("hello", "{question}", {})


def test_words_go_both_ways_and_unknown_words_are_named() -> None:
    assert WORDS.decode(WORDS.encode("go stop <eos>")) == "go stop <eos>"
    assert WORDS.decode([2, 99, -1]) == "go <?99> <?-1>"
    with pytest.raises(ConfigError, match="'run' is not one of the 4 words"):
        WORDS.encode("go run")


@pytest.mark.parametrize(
    "words", [["<pad>", "<eos>", "a", "a"], ["<pad>", "<eos>", "a b"], ["<pad>", "a"], ["", "<eos>"]]
)
def test_a_vocabulary_that_could_not_be_read_back_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="distinct words"):
        VocabTokenizer(words)


def test_digests_tell_vocabularies_apart_and_are_equal_in_every_process() -> None:
    code = "from asyncopd.tasks.tokenizers import *; print(VocabTokenizer(['<pad>','<eos>','go','stop']).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == WORDS.digest
    assert len({WORDS.digest, BYTES.digest, VocabTokenizer(["<pad>", "<eos>", "stop", "go"]).digest}) == 3


def test_importing_the_tasks_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, asyncopd.tasks.build, asyncopd.teacher.oracle; print({'torch', 'transformers'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def save_tokenizer(path: Path, *, eos: str | None = "<|end|>", chat: bool = False, extra: str = "") -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if extra:
        backend.add_tokens([extra])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}{% if thinking %}<think>{% endif %}"
        )
    tokenizer.save_pretrained(path)
    return str(path)


def hf_tokenizer(path: str, **options: Any) -> HfTokenizer:
    return HfTokenizer(ModelFiles(PretrainedModel(path=path)), **options)


def test_a_hugging_face_tokenizer_gives_text_back_and_shows_specials(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(save_tokenizer(tmp_path))
    text = "Janet’s ducks, 16 − 3 = 13.\n"
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text + "<|end|>"
    assert tokenizer.encode_prompt("a", "{question}") == tokenizer.encode("a")
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.vocab_size - 1
    assert tokenizer.decode([*tokenizer.encode("a"), 10**6, -1]) == "a<?1000000><?-1>"
    assert tokenizer.token_text(tokenizer.eos_id) == "<|end|>"


def test_a_hugging_face_digest_is_of_the_mapping(tmp_path: Path) -> None:
    first = hf_tokenizer(save_tokenizer(tmp_path / "a"))
    same = hf_tokenizer(save_tokenizer(tmp_path / "b", chat=True))
    other = hf_tokenizer(save_tokenizer(tmp_path / "c", extra="<tool>"))
    assert first.digest == same.digest != other.digest
    first._tokenizer(["a", "bc"], padding=True, truncation=True, max_length=4) if first._tokenizer.pad_token else None
    assert hf_tokenizer(str(tmp_path / "a")).digest == first.digest


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    tokenizer = hf_tokenizer(save_tokenizer(tmp_path / "chat", chat=True))
    assert tokenizer.decode(tokenizer.encode_chat("hi", "{question}", {})) == "<user>hi<assistant>"
    assert (
        tokenizer.decode(tokenizer.encode_chat("hi", "{question}", {"thinking": True})) == "<user>hi<assistant><think>"
    )
    with pytest.raises(ConfigError, match="has no chat template"):
        hf_tokenizer(save_tokenizer(tmp_path / "plain")).encode_chat("hi", "{question}", {})


def test_a_missing_tokenizer_or_eos_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        hf_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no EOS token"):
        hf_tokenizer(save_tokenizer(tmp_path / "endless", eos=None))
