"""The table of pictures and captions: what is marked, and that W&B accepts it."""

from __future__ import annotations

import functools

import pytest
from PIL import Image

from povid.report import dashboards
from povid.report.dashboards import mark, table_rows

NAMES = {"dog": "dog", "dogs": "dog", "hot dog": "hot dog", "cat": "cat", "kitten": "cat", "fork": "fork"}

NOISE = [["A ", False], ["dog & cat", True]]


def find(text: str) -> list[str]:
    """Objects of a tiny vocabulary in which two words may form one name, as in CHAIR."""
    words, found = text.lower().replace(".", "").replace(",", "").split(), []
    while words:
        size = 2 if " ".join(words[:2]) in NAMES and len(words) > 1 else 1
        name = NAMES.get(" ".join(words[:size]))
        found += [name] if name else []
        words = words[size:]
    return found


def test_mentions_of_absent_objects_are_marked():
    text = mark("A kitten, a hot dog and <two> Dogs.", {"cat", "dog"}, find)
    assert text == (f'A kitten, a <mark style="{dashboards.STYLE}">hot dog</mark> and &lt;two&gt; Dogs.')
    assert mark("A kitten and a fork.", {"fork"}, find).startswith(f'A <mark style="{dashboards.STYLE}">kitten</mark>')
    assert mark("Nothing here & now", set(), find) == "Nothing here &amp; now"
    assert mark("", set(), find) == ""


def test_rows_hold_pictures_texts_and_hallucinated_objects():
    picture = Image.new("RGB", (4, 4))
    record = {
        "id": 7,
        "image": picture,
        "noised": picture,
        "question": "What?",
        "preferred": "A cat.",
        "dispreferred": "A fork.",
        "before": "A cat, a fork, a fork.",
        "after": "A kitten.",
        "objects": ["cat"],
    }
    columns, rows = table_rows([record], find)
    row = dict(zip(columns, rows[0], strict=True))
    assert row["id"] == "7" and row["picture"] is picture
    assert row["preferred"] == "A cat." and row["before"].count("<mark") == 2 and "<mark" not in row["after"]
    assert (row["hallucinated before"], row["hallucinated after"]) == ("fork", "")


def test_without_known_objects_nothing_is_marked():
    columns, rows = table_rows([{"id": "a", "before": "A <fork>."}], find)
    row = dict(zip(columns, rows[0], strict=True))
    assert row["before"] == "A &lt;fork&gt;." and row["picture"] is None and row["hallucinated before"] == ""
    assert table_rows([])[1] == []


def test_marks_by_chairs_own_object_finder():
    chair = pytest.importorskip("povid.benchmarks.chair")
    synonyms = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "fork": "fork", "person": "person", "man": "person"}
    finder = functools.partial(chair.objects, synonyms=synonyms)
    text = mark("Two men eat hot dogs with forks near a puppy.", {"person", "dog"}, finder)
    assert text.count("<mark") == 2
    assert '">hot dogs</mark>' in text and '">forks</mark>' in text


def test_the_page_is_self_contained(tmp_path):
    table = table_rows(
        [{"id": "<7>", "image": Image.new("RGB", (4, 4), "red"), "before": "A fork.", "objects": []}], find
    )
    page = dashboards.write_page(table, tmp_path / "table.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and ">fork</mark>" in page and "&lt;7&gt;" in page


def test_wandb_accepts_the_table_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):  # else the table's media go to the home
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    picture = Image.new("RGB", (8, 8), "red")
    file = tmp_path / "picture.png"
    picture.save(file)
    records = [
        {"id": "a", "image": file, "noised": picture, "before": "A fork.", "objects": [], "noise": NOISE},
        {"id": "b", "image": file.read_bytes()},
    ]
    flip = {"image": file, "question": "Is there a fork?", "label": "no", "before": "Yes", "after": "No"}
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(x_disable_stats=True))
    try:
        run.log({"samples": dashboards.sample_table(records, find), "flips": dashboards.flip_table([flip])})
    finally:
        run.finish()
    made = {file.name.partition("_")[0]: file.read_text() for file in tmp_path.rglob("*.table.json")}
    staged = [file.read_bytes() for file in (tmp_path / "wandb_data_dir").rglob("*") if file.is_file()]
    assert any(b">fork</mark>" in content for content in staged)
    assert sum(content.startswith(b"\x89PNG") for content in staged) >= 1
    assert any(b"A " in content and b">dog &amp; cat</mark>" in content for content in staged)
    assert '"hallucinated before"' in made["samples"] and "Is there a fork?" in made["flips"]
