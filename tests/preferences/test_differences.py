"""Comparing two texts: exact for captions of any real length, and in linear time for texts made to take forever.

Each text below took from seconds to hours when time grew with the square of its length.
"""

from __future__ import annotations

import difflib
import random

import pytest

from povid.dispreference.parse import LONGEST_REPLY, Unusable, parse
from povid.fault import Fault
from povid.preferences.differences import changes, compared_whole, overlap, segments, words
from povid.preferences.pictures import find_picture


def test_captions_are_compared_word_by_word():
    draw = random.Random(0)
    known = "a dog and two cats sit on the red mat near it".split()
    for _ in range(200):
        first, second = (" ".join(draw.choices(known, k=draw.randint(0, 40))) for _ in range(2))
        whole = difflib.SequenceMatcher(None, words(first), words(second), autojunk=False)
        assert overlap(first, second) == whole.ratio()
        assert compared_whole(first, second)


def test_texts_too_long_to_compare_are_compared_at_both_ends():
    first, second = "*" * 90_000 + "a dog" + "*" * 9_000, "*" * 90_000 + "a cat" + "*" * 9_000
    assert not compared_whole(first, second)
    assert [(good, bad) for good, bad, same in segments(first, second) if not same] == [("dog", "cat")]
    assert changes("a dog " * 16_000, "a dog " * 15_999 + "a cat ").objects == ("cat",)
    assert overlap("a " * 16_000, "a " * 15_999 + "b") == pytest.approx(15_999 / 16_000)
    assert overlap(" ".join(f"a x{n}" for n in range(15_000)), "a " * 15_000) < 0.01


def test_replies_of_one_repeated_character():
    for filler in ("*", "\n", " ", "_*", '"', "- ", "#", "`"):
        many = filler * (40_000 // len(filler))
        assert parse("captioning", f"Answer: A dog.\n{many}b").dispreferred.startswith("A dog.")
        assert parse("reasoning", f"{many} Answer: A dog.").dispreferred == "A dog."
        assert parse("captioning", f"A dog. answer{many}x").dispreferred.startswith("A dog.")
    with pytest.raises(Unusable, match="too long"):
        parse("captioning", "*" * (LONGEST_REPLY + 1))


def test_a_picture_named_by_spaces(tmp_path):
    with pytest.raises(Fault, match="is a path with"):
        find_picture("a" * 64 + " " * 99_000 + "!", tmp_path, "record 1")
