"""Figures: they exist only for what was measured, and draw what was logged."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from povid.report import figures
from povid.report.runs import find_runs


def log(folder, text, stage="stage_1", version=""):
    place = folder / stage / version
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(text)


def test_metrics_are_read_whatever_columns_there_are(tmp_path):
    """Blanks and NaN are no points; a missing step column counts lines; two values of one step keep the later."""
    log(tmp_path, "epoch,step,train/loss,train/reward/text,note\n0,5,0.7,,a\n0,9,,-0.5,\n0,9,0.6,nan,\n", version="v0")
    assert figures._metrics(tmp_path / "stage_1") == {
        "train/loss": [(5.0, 0.7), (9.0, 0.6)],
        "train/reward/text": [(9.0, -0.5)],
    }
    log(tmp_path, "train/loss\n0.7\n0.5\n", stage="stage_2")
    assert figures._metrics(tmp_path / "stage_2") == {"train/loss": [(0.0, 0.7), (1.0, 0.5)]}
    assert figures._metrics(tmp_path / "stage_3") == {}


def test_long_curves_are_averaged_in_bins():
    """1000 points of value = step: bins of five, the first the mean of 0..4 = 2."""
    short = figures._binned([(float(step), float(step)) for step in range(1000)])
    assert len(short) == 200 and short[:2] == [(2.0, 2.0), (7.0, 7.0)]
    assert figures._binned([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_columns_go_by_any_of_their_names():
    assert figures._column(("train/reward/text", "train/reward_text"), {"train/reward_text"}) == "train/reward_text"
    assert figures._column(("train/loss",), {"train/loss_step", "train/loss_epoch"}) == "train/loss_step"
    assert figures._column(("train/loss",), {"val/loss"}) is None


@pytest.mark.parametrize("text", ["", "epoch,step\n0,1\n", "lr,step\n1e-3,1\n", "\x00\x01"])
def test_no_curve_without_what_it_shows(write, outputs, tmp_path, text):
    log(write("text", 0), text)
    assert figures.training_curves(find_runs(outputs), tmp_path / "curves.png") is None
    assert not list(tmp_path.glob("*.png*"))


def test_training_curves_have_a_column_per_row_and_stage(write, outputs, tmp_path, monkeypatch):
    for seed in range(2):
        log(write("text", seed), "step,train/loss\n0,0.7\n10,0.5\n")
        both = write("both", seed)
        log(both, "step,train/loss,train/margin/text\n0,0.7,0\n10,0.5,1\n")
        log(both, "step,train/loss,train/reward/noise\n0,0.7,0.0\n10,0.5,-1\n", stage="stage_2")
    drawn = {}
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, file: drawn.update(axes=figure.axes) or save(figure, file))
    file = figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    titles = [axes.get_title() for axes in drawn["axes"] if axes.get_title()]
    assert titles == ["text, stage 1", "both, stage 1", "both, stage 2"]
    labels = [axes.get_ylabel() for axes in drawn["axes"] if axes.get_ylabel()]
    assert labels == ["loss", "reward", "margin"]
    mean = drawn["axes"][0].get_lines()[-1]
    assert list(mean.get_xdata()) == [0.0, 10.0] and list(mean.get_ydata()) == [0.7, 0.5]
    with Image.open(file) as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_chair_against_coverage_draws_each_row_and_its_way_there(write, outputs, tmp_path, monkeypatch):
    for seed in range(2):
        write("none", seed)
        write(
            "text",
            seed,
            2.0 * seed,
            curve=[
                {"step": 0, "CHAIR_I": 34.0, "coverage": 65.0},
                {"step": 9},
                {"step": 25, "CHAIR_I": 27.0, "coverage": 51.0},
                "broken",
            ],
        )
    drawn = {}
    save = figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, file: drawn.update(axes=figure.axes) or save(figure, file))
    file = figures.chair_against_coverage(find_runs(outputs), tmp_path / "chair.png")
    (axes,) = drawn["axes"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none (n = 2)", "text (n = 2)"]
    ways = [line for line in axes.get_lines() if list(line.get_xdata()) == [65.0, 51.0]]
    assert len(ways) == 2 and list(ways[0].get_ydata()) == [34.0, 27.0]
    assert any(list(line.get_xdata()) == [52.0] and list(line.get_ydata()) == [28.0] for line in axes.get_lines())
    with Image.open(file) as picture:
        assert picture.width > 800


def test_no_chair_figure_without_coverage(write, outputs, tmp_path):
    folder = write("none", 0)
    found = json.loads((folder / "results.json").read_text())
    del found["benchmarks"]["chair"]["coverage"]
    (folder / "results.json").write_text(json.dumps(found))
    assert figures.chair_against_coverage(find_runs(outputs), tmp_path / "chair.png") is None
