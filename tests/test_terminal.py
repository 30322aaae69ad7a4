"""Panels, messages and counts, on a terminal of any width and where nothing can be redrawn."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from povid import terminal

ROWS = [
    ("scores", "CHAIR_S ↓  POPE ↑\n     66.8   91.83"),
    (
        "memory",
        "weights 9.6 MiB, gradients 1.9 MiB, a step of the longest records 0.2 GiB; the device has 19.6 of 23.5 GiB",
    ),
    ("folder", "outputs/sweeps/2026-11-28_07-56-17-648423/3_both_seed0"),
    ("W&B", "to upload:\nwandb sync outputs/sweeps/2026-11-28_07-56-17-648423/3_both_seed0/wandb/offline-run-*"),
]


@pytest.mark.parametrize("columns", [80, 140])
def test_a_panel_wraps_words_and_never_breaks_a_path(columns):
    out = io.StringIO()
    terminal.draw("both, seed 0", ROWS, Console(file=out, width=columns, color_system=None))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("both, seed 0 ─") and len(lines[0]) == len(lines[-1]) == columns
    assert "  scores  CHAIR_S ↓  POPE ↑" in lines and "               66.8   91.83" in lines
    command = ROWS[-1][1].splitlines()[1]
    assert command in (line.strip() for line in lines), "a command can be copied"
    assert all(len(line) <= columns for line in lines if line != command)
    memory = [line.strip() for line in lines if "iB" in line]
    assert " ".join(memory) == f"memory  {ROWS[1][1]}" and len(memory) == (2 if columns == 80 else 1)
    assert "\x1b" not in out.getvalue()


def test_without_a_terminal_there_are_plain_lines(capsys):
    def record(level, message, name="povid.somewhere"):
        return logging.LogRecord(name, level, "", 0, message, (), None)

    handler = terminal.Lines(stream="ext://sys.stdout")
    assert not terminal.redraws()
    panel = record(logging.INFO, terminal.plain("both, seed 0", ROWS[:2]))
    panel.panel = ("both, seed 0", ROWS[:2])
    for each in (panel, record(logging.WARNING, "no judge"), record(logging.ERROR, "gone", "openai")):
        handler.handle(each)
    assert capsys.readouterr().out.splitlines() == [
        "both, seed 0",
        "  scores  CHAIR_S ↓  POPE ↑",
        "               66.8   91.83",
        f"  memory  {ROWS[1][1]}",
        "warning: no judge",
        "error: openai: gone",
    ]


def test_messages_go_where_output_goes_at_the_moment(monkeypatch):
    """A progress bar puts itself in the place of sys.stdout, and messages must go through it."""
    handler, taken = terminal.Lines(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", taken)
    handler.handle(logging.LogRecord("povid", logging.INFO, "", 0, "half-way", (), None))
    assert taken.getvalue() == "half-way\n"


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for kind, able in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", kind)
        assert terminal.redraws() is able
    monkeypatch.setattr(terminal.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setenv("TERM", "xterm")
    assert not terminal.redraws(), "a job of a sweep beside others"


def test_counting_says_how_far_it_is_now_and_then(caplog, monkeypatch):
    """Answers take 10 s each and a line is due every 30: after the 3rd of 3 to 8, with 5 more to come, and the 6th."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    log = logging.getLogger("povid.benchmarks")
    with caplog.at_level("INFO"), terminal.counted(log, "pope", 10, 2) as count:
        for _ in range(8):
            count()
    assert caplog.messages == [
        "pope: 5 of 10 answers, about 50 s left",
        "pope: 8 of 10 answers, about 20 s left",
        "pope: 10 answers in 1 min 30 s",
    ]


def test_durations():
    pairs = {0.4: "0 s", 59.4: "59 s", 59.6: "1 min", 200: "3 min 20 s", 7500: "2 h 5 min", 273600: "3 d 4 h"}
    assert {seconds: terminal.spoken(seconds) for seconds in pairs} == pairs
