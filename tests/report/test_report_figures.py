"""Figures show what was measured and logged, and are omitted without it."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from povid.report import figures
from povid.report.runs import find_runs


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures in the order in which they are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: saved.append(figure) or save(figure, *a, **k))
    return saved


def log(folder, text, stage="stage_1", version=""):
    place = folder / stage / version
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.csv").write_text(text)


def points(line) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_training_curves_have_a_column_per_row_and_stage(write, outputs, tmp_path, drawn):
    for seed in range(2):
        log(write("text", seed), "step,loss\n0,0.7\n10,0.5\n")
        both = write("both", seed)
        log(both, "step,loss,rewards/margins\n0,0.7,0\n10,0.5,1\n")
        log(both, "step,loss,rewards/rejected_noise\n0,0.7,0.0\n10,0.5,-1\n", stage="stage_2")
    file = figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    axes = drawn[0].axes
    assert [a.get_title() for a in axes if a.get_title()] == ["text, stage 1", "both, stage 1", "both, stage 2"]
    assert [a.get_ylabel() for a in axes if a.get_ylabel()] == ["loss", "reward", "margin over"]
    assert points(axes[0].get_lines()[-1]) == [(0.0, 0.7), (10.0, 0.5)]
    with Image.open(file) as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_rewards_of_any_response_are_drawn(write, outputs, tmp_path, drawn):
    names = ("rejected_image", "rejected_text", "chosen", "rejected_caption")
    log(write("text", 0), f"step,{','.join(f'rewards/{name}' for name in names)}\n0,1,2,3,4\n1,1,2,3,4\n")
    figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): (line.get_ydata()[0], line.get_color()) for line in axes.get_lines()}
    assert {name: value for name, (value, _) in lines.items()} == {"chosen": 3, "text": 2, "caption": 4, "image": 1}
    assert len({colour for _, colour in lines.values()}) == 4


def test_blanks_in_metrics_are_not_drawn(write, outputs, tmp_path, drawn):
    """The later of two values of one step counts; without a step column, lines are counted."""
    log(write("text", 0), "epoch,step,loss,note\n0,5,0.7,a\n0,9,,\n0,9,0.6,\n0,9,0.5,\n0,11,nan,\n", version="v0")
    log(write("both", 0), "loss\n0.7\n0.5\n")
    figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    assert [points(axes.get_lines()[-1]) for axes in drawn[0].axes] == [[(5, 0.7), (9, 0.5)], [(0, 0.7), (1, 0.5)]]


def test_of_an_earlier_version_the_loss_is_drawn_alone(write, outputs, tmp_path, drawn, caplog):
    log(write("text", 0), "step,train/loss,train/reward_text\n0,0.7,1\n1,0.5,2\n")
    figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == "loss" and points(axes.get_lines()[-1]) == [(0, 0.7), (1, 0.5)]
    assert "metrics.csv is of an earlier version" in caplog.text


def test_long_curves_are_averaged_in_bins(write, outputs, tmp_path, drawn):
    """1000 points of value = step: bins of five, the first the mean of 0..4 = 2."""
    log(write("text", 0), "step,loss\n" + "".join(f"{step},{step}\n" for step in range(1000)))
    figures.training_curves(find_runs(outputs), tmp_path / "curves.png")
    found = points(drawn[0].axes[0].get_lines()[-1])
    assert len(found) == 200 and found[:2] == [(2.0, 2.0), (7.0, 7.0)]


def test_no_training_curves_without_metrics(write, outputs, tmp_path):
    for text in ("", "epoch,step\n0,1\n", "lr,step\n1e-3,1\n", "\x00\x01"):
        log(write("text", 0), text)
        assert figures.training_curves(find_runs(outputs), tmp_path / "curves.png") is None
    assert not list(tmp_path.glob("*.png*"))


def test_chair_against_coverage_shows_seeds_and_means(write, outputs, tmp_path, drawn):
    """Text at (coverage, CHAIR_I) = (51, 27) and (53, 29), so its mean is (52, 28)."""
    for seed in range(2):
        write("none", seed)
        write("text", seed, 2.0 * seed)
    file = figures.chair_against_coverage(find_runs(outputs), tmp_path / "chair.png")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none (n = 2)", "text (n = 2)"]
    assert [(52.0, 28.0)] in [points(line) for line in axes.get_lines()]
    assert [[51.0, 27.0], [53.0, 29.0]] in [dots.get_offsets().tolist() for dots in axes.collections]
    with Image.open(file) as picture:
        assert picture.width > 800


def test_no_chair_figure_without_coverage(write, outputs, tmp_path):
    folder = write("none", 0)
    found = json.loads((folder / "results.json").read_text())
    del found["benchmarks"]["chair"]["coverage"]
    (folder / "results.json").write_text(json.dumps(found))
    assert figures.chair_against_coverage(find_runs(outputs), tmp_path / "chair.png") is None
