"""A draft becomes its place as a whole, or not at all."""

from __future__ import annotations

import pytest

from povid.files import draft, write_text


def write(folder, text):
    folder.mkdir()
    (folder / "file").write_text(text)


def test_a_draft_becomes_its_place_when_the_block_ends(tmp_path):
    place = tmp_path / "parent" / "folder"
    with draft(place) as beside:
        write(beside, "one")
        assert not place.exists()
    with draft(place) as beside:
        write(beside, "two")
        assert (place / "file").read_text() == "one"
    assert (place / "file").read_text() == "two" and list(place.parent.iterdir()) == [place]


def test_an_exception_leaves_what_was_there(tmp_path):
    place = tmp_path / "folder"
    write(place, "old")
    with pytest.raises(KeyboardInterrupt), draft(place) as beside:
        write(beside, "new")
        raise KeyboardInterrupt
    assert (place / "file").read_text() == "old" and list(tmp_path.iterdir()) == [place]


def test_the_first_of_several_writers_wins_where_nothing_is_replaced(tmp_path):
    place = tmp_path / "folder"
    with draft(place, replace=False) as beside:
        write(beside, "second")
        write(place, "first")
    assert (place / "file").read_text() == "first" and list(tmp_path.iterdir()) == [place]


def test_text_that_utf_8_cannot_hold_is_written_all_the_same(tmp_path):
    assert write_text(tmp_path / "a", "a \ud83d b").read_text() == "a ? b"
