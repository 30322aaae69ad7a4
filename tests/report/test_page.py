"""The page of all runs: what it holds, that it is whole whatever a run folder holds, and that nothing is mixed."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import pytest
from pages import EVIL, fill, find, log, record
from PIL import Image

from povid.fault import Fault
from povid.report import curves, figures, samples
from povid.report.__main__ import main
from povid.report.command import write_tables
from povid.report.page import write_page
from povid.report.runs import find_runs, group

VOID = ("meta", "img", "input", "line", "rect", "br")


class Page(HTMLParser):
    """Elements of a page, each closed where it has to be, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def page_of(outputs) -> Page:
    return Page(write_page(outputs).read_text())


def data_of(page) -> dict:
    packed = re.search(r'id="curves-data">([^<]+)', page.read_text())[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_run_is_shown_whole_and_nothing_of_it_is_markup(write, outputs):
    evil = record(1, "A dog.", EVIL, id=EVIL, question=EVIL, preferred=EVIL, dispreferred=EVIL, objects=["cat", EVIL])
    fill(write("both", 0, model=EVIL, data="scenes"), evil, config=f"model: {EVIL}\n")
    page = page_of(outputs)
    assert EVIL in page.words and len(page.all("script")) == 4  # two of the page's own, data and library
    assert [attrs["src"][:22] for attrs in page.all("img") if not attrs["src"].startswith("data:image/png")] == []
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)
        assert all(value.startswith(("#", "data:")) for name, value in attrs.items() if name in ("src", "href")), attrs
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    for part in ("Table 3", "66.8", "48.0", "torch 2.13.0", "config.yaml", "stage 1: rewards", "hallucinated 1 → 0"):
        assert part in page.words, part


def test_curves_have_a_line_per_run_and_the_mean_of_a_row(write, outputs):
    for seed in range(3):
        log(write("text", seed), 1, "loss,rewards/chosen,brand_new/metric", lines=4 if seed else 3)
    write("none", 0)
    data = data_of(write_page(outputs))
    assert [panel["name"] for panel in data["panels"]] == ["loss", "rewards/chosen", "brand_new/metric"]
    text = next(row["number"] for row in data["rows"] if row["label"] == "text")
    *seeds, mean = data["panels"][0]["lines"]
    assert [(row, name) for row, name, *_ in seeds] == [(text, f"seed {seed}") for seed in range(3)]
    assert mean[:2] == [text, "mean of 3 seeds"] and mean[4] is True
    assert data["steps"][mean[2]] == [0, 1, 2] and mean[3] == [0.7, 0.69, 0.68]  # steps that all seeds logged
    assert [row["used"] for row in data["rows"] if row["label"] == "none"] == [False]


def test_a_long_curve_is_thinned(tmp_path):
    log(tmp_path, 1, lines=1000)
    points, problem = curves.metrics(tmp_path / "stage_1")
    assert not problem and len(points["loss"]) == 1000
    thin = curves.binned(points["loss"], 40)
    assert len(thin) == 40 and thin[0] == (12.0, pytest.approx(0.58))


def test_no_two_rows_look_alike(write, outputs):
    for row in ("none", "text", "noise", "both", "preferred_only", "swaps_only"):
        for rate in (1, 2):
            log(write(row, 0, folder=f"{row}{rate}", settings={"rate": rate}), 1)
    rows = group(find_runs(outputs))
    styles = curves.curves(
        [(row, row.label, ink) for row, ink in zip(rows, figures.colors(rows))], find_runs(outputs), [], outputs
    ).rows
    assert len(rows) == 12 and len({(style["color"], style["dash"]) for style in styles}) == 12


def simulated(color: str, kind: str) -> tuple[float, ...]:
    """A colour as protanopes or deuteranopes see it (Viénot, Brettel and Mollon 1999), linear RGB of 0 to 1."""
    rgb = [(int(color[at : at + 2], 16) / 255) ** 2.2 for at in (1, 3, 5)]
    weights = {"protan": (0.112, 0.888, 0.0), "deutan": (0.293, 0.707, 0.0)}[kind]
    both = sum(weight * part for weight, part in zip(weights, rgb))
    blue = {"protan": (0.004, -0.004, 1.0), "deutan": (-0.021, 0.021, 1.0)}[kind]
    return both, both, max(0.0, sum(weight * part for weight, part in zip(blue, rgb)))


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_the_four_rows_differ_for_the_colour_blind(kind):
    seen = {row: simulated(color, kind) for row, color in figures.COLORS.items()}
    for one in seen:
        for other in seen:
            if one < other:
                apart = sum((a ** (1 / 2.2) - b ** (1 / 2.2)) ** 2 for a, b in zip(seen[one], seen[other]))
                assert apart**0.5 > 0.15, (one, other)


def test_captions_share_a_card_only_where_everything_else_is_equal(write, outputs):
    first = record(1, "A dog.", "A cat.")
    fill(write("text", 0), first)
    fill(write("both", 0), first | {"after": "A dog and a fork."})
    fill(write("both", 1), first | {"noised": Image.new("RGB", (8, 6), "blue")})
    fill(write("noise", 0), first | {"before": "A bus."})
    fill(write("none", 0), first | {"image": Image.new("RGB", (8, 6), "green")})
    page = write_page(outputs).read_text()
    cards = re.findall(r'<article class="sample">.*?</article>', page, re.DOTALL)
    who = [re.findall(r'<span class="who">([^<]+?) <', card) for card in cards]
    assert sorted(who) == [["noise, seed 0"], ["none, seed 0"], ["text, seed 0", "both, seed 0", "both, seed 1"]]
    shared = next(card for card in cards if "text, seed 0" in card)
    assert re.findall(r'data-change="(\w+)"', shared) == ["better", "worse", "better"]
    assert shared.count("<img") == 3 and "noised, seed 1" in shared  # each noise is drawn by its seed


def test_bad_run_folders_are_named_and_the_rest_is_shown(write, outputs, tmp_path):
    good = fill(write("both", 0), record(1, "A dog.", "A cat."))
    log(good, 2)
    died = outputs / "died"
    died.mkdir()
    (died / "packages.txt").write_text("")
    log(died, 1, lines=38)
    log(died, 2, lines=7)
    (outputs / "cut").mkdir()
    (outputs / "cut" / "results.json").write_text('{"row": "both", "bench')
    damaged = fill(write("text", 0), record(1, "A dog.", "A cat."))
    (damaged / "stage_1" / "metrics.csv").write_text('step,loss\n0,0.5\n1,"' + "x" * 200_000 + '"\n')
    (damaged / "samples" / "samples.json").write_text('{"samples": [{"id": 1}]}')
    moved = fill(write("noise", 0), record(1, "A dog.", "A cat."), record(2, "A dog.", "A cat."), record(3, "A.", "B."))
    (moved / "samples" / "0_picture.png").unlink()
    (moved / "samples" / "1_picture.png").write_bytes(b"<svg onload=alert(1)>")
    kept = json.loads((moved / "samples" / "samples.json").read_text())
    (tmp_path / "secret.png").write_bytes((moved / "samples" / "2_picture.png").read_bytes())
    kept["samples"][2]["picture"] = "../../../../../secret.png"
    kept["samples"][2]["after"]["text"] += "\ud800"
    (moved / "samples" / "samples.json").write_text(json.dumps(kept))
    page = page_of(outputs)
    for part in (
        "Not counted: cut/results.json: it is not valid JSON",
        "Not finished, so in no table: died (stage 2, step 6).",
        "stage_1/metrics.csv is damaged (field larger than field limit (131072)); its curves end early",
        "samples/samples.json is damaged (KeyError: 'picture')",
        "Of an earlier version, told apart by its recorded settings alone: sweep/both/0",
        "0_picture.png is missing from 0/samples",
        "1_picture.png in 0/samples is not a small PNG or JPEG",
        "secret.png leads out of 0/samples and is not shown",
        "hallucinated 1 → 0",
    ):
        assert part in page.words, part
    assert len(page.all("article")) == 4
    assert {file.name for file in write_tables(outputs)} >= {"table3.md", "training_curves.png"}


def test_figures_are_shown_for_the_runs_that_they_were_made_of(write, outputs):
    """That of ``both`` is of an older state of its run, and one comparison has a run that is no longer there."""
    for row, digest in (("text", "abc"), ("both", "def")):
        identity = {"digest": digest, "row": {"model": "m"}, "named": {"settings": {}, "places": {}}}
        write(row, 0, identity=identity, stages={})

    def draw(folder, name, *digests):
        (folder / "analysis").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / f"analysis/{name}.png")
        made_of = [{"digest": digest, "row": "x", "seed": 0} for digest in digests]
        note = {"caption": f"caption of {name} and {digests}", "rows": {"x": {"runs": made_of}}}
        (folder / f"analysis/{name}.json").write_text(json.dumps(note))

    draw(outputs / "sweep/text/0", "attention", "abc")
    draw(outputs / "sweep/both/0", "attention", "old")
    draw(outputs / "sweep/both/0", "copied", "abc")
    draw(outputs, "compared", "abc", "def")
    draw(outputs, "outdated", "abc", "old")
    draw(outputs, "unsigned")
    page = page_of(outputs)
    assert len(re.findall(r"caption of \w+", page.words)) == 2
    assert "text, seed 0: caption of attention and ('abc',)" in page.words and "caption of compared" in page.words
    for place in (
        "sweep/both/0/analysis/attention",
        "sweep/both/0/analysis/copied",
        "analysis/outdated",
        "analysis/unsigned",
    ):
        assert f"{place}.png is not shown" in page.words


def test_thousands_of_runs_are_counted_and_the_newest_shown(write, outputs, monkeypatch):
    monkeypatch.setattr("povid.report.page.MOST_RUNS", 3)
    for seed in range(9):
        fill(write("text", seed), record(1, "A dog.", "A cat."), config=f"marker: {seed}x\n")
    page = page_of(outputs)
    assert "n = 9" in page.words and "newest 3 of 9 runs" in page.words
    assert [seed for seed in range(9) if f"marker: {seed}x" in page.words] == [6, 7, 8]


def test_the_command_prints_the_address(write, outputs, capsys):
    assert main(["page", str(outputs)]) == 2 and "is not a folder" in capsys.readouterr().err
    write("text", 0)
    assert main(["page", str(outputs), "--out", str(outputs / "a page.html")]) == 0
    assert capsys.readouterr().out.strip().endswith("outputs/a%20page.html")
    (outputs / "folder").mkdir()
    assert main(["page", str(outputs), "--out", str(outputs / "folder")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_samples_come_back_as_they_were_written(tmp_path):
    samples.write(tmp_path, [record(1, "A cat, a dog.", "A fork.", image=None)], find)
    (found,) = samples.read(tmp_path)
    assert found.before.pieces == [("A cat, a ", ""), ("dog", "bad"), (".", "")] and found.before.true == ("cat",)
    assert found.after.hallucinated == ("fork",) and found.picture is None and found.noised.startswith(b"\x89PNG")
    samples.write(tmp_path, [record(1, "A dog.", "A fork.", objects=None, noise=[(" A", False), (" cat", True)])])
    (found,) = samples.read(tmp_path)
    assert found.after.pieces == [("A fork.", "")] and found.after.hallucinated is None and found.objects is None
    assert found.noise == [("A", ""), (" ", ""), ("cat", "other")]
    assert [card.entries[0].change for card in samples.cards([(0, "x", "", (), [found])])] == ["unknown"]
    (tmp_path / "samples" / "samples.json").write_text("[" * 100_000)
    with pytest.raises(Fault, match="is damaged"):
        samples.read(tmp_path)
