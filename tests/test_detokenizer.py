"""Texts as tokens come: the same as decoded at once, and never a part of a stop text."""

from __future__ import annotations

import itertools
import random

import pytest
from transformers import AutoTokenizer

from vattn.engine.detokenizer import Detokenizer


class Letters:
    """A tokenizer whose tokens are the UTF-8 bytes of a text."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def shown(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    """The texts that a stream shows, up to the token that stops it."""
    texts = []
    for token in tokens:
        stopped = detokenizer.add([token]) is not None
        texts.append(detokenizer.text(finished=stopped))
        if stopped:
            return texts
    detokenizer.finish()
    return [*texts, detokenizer.text(finished=True)]


@pytest.mark.parametrize("text", ["plain", "ein Übermaß", "日本語のテキスト", "🙂 faces 🙃🙂", "a\nb\n\nc", ""])
def test_a_stream_ends_with_the_text(text):
    texts = shown(Detokenizer(Letters(), (), False), list(text.encode()))
    assert texts[-1] == text
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)
        assert "\ufffd" not in before  # a part of a character


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("one END two", ["END"], "one ", "END"),
        ("one ENTER END", ["END"], "one ENTER ", "END"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcabd", ["abd", "bc"], "a", "bc"),
        ("xyz", ["z", "yz"], "x", "yz"),
        ("nothing", ["none"], "nothing", None),
        ("ends with a part of EN", ["END"], "ends with a part of EN", None),
        ("日本語", ["本"], "日", "本"),
    ],
)
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_text_ends_it_and_is_never_shown_in_part(text, stop, expected, found, include):
    detokenizer = Detokenizer(Letters(), stop, include)
    texts = shown(detokenizer, list(text.encode()))
    assert detokenizer.stopped_at == found
    assert texts[-1] == expected + (found if include and found else "")
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)


def test_no_stop_text_counts_before_it_may():
    detokenizer = Detokenizer(Letters(), ["ab"], False)
    found = [detokenizer.add([token], may_stop=place >= 4) for place, token in enumerate(b"xabyabz")]
    assert found == [None, None, None, None, None, "ab", None]
    assert detokenizer.text(finished=True).startswith("xaby")


def test_a_part_of_a_character_at_the_end_is_shown_in_the_end():
    texts = shown(Detokenizer(Letters(), (), False), list("aé".encode())[:-1])
    assert texts[:-1] == ["a", "a"]
    assert texts[-1] == "a\ufffd"


def test_a_real_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chance = random.Random(1)
    for case in range(60):
        if case % 2:
            tokens = tokenizer(
                "Zwölf Boxkämpfer jagen Eva quer über den Sylter Deich. 日本 🙂!  def f(x):\n    return x"
            )
            tokens = tokens["input_ids"][: chance.randrange(1, 60)]
        else:
            tokens = [chance.randrange(5, len(tokenizer)) for _ in range(chance.randrange(1, 40))]
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        detokenizer = Detokenizer(tokenizer, (), False, skip_special_tokens=True)
        assert shown(detokenizer, tokens)[-1] == whole
        if len(whole) > 6:
            stop = whole[3:6]
            detokenizer = Detokenizer(tokenizer, (stop,), False, skip_special_tokens=True)
            assert shown(detokenizer, tokens)[-1] == whole[: whole.index(stop)]
