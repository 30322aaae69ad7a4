"""What a person sees of a command: messages, panels and progress, redrawn on a terminal and plain lines elsewhere.

All of it goes through the loggers of the modules that say it, so that a run's log file has it too.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

EVERY = 30.0  # seconds between two lines about progress where nothing can be redrawn
WIDTH = 100  # columns of what is not a terminal

Rows = Sequence[tuple[str, str]]
"""Names and what belongs to them; a value may have several lines."""


def redraws() -> bool:
    """Whether standard output is a terminal that this process can redraw.

    Jobs that run side by side in processes of their own would redraw each other's lines.
    """
    capable = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    return capable and multiprocessing.parent_process() is None


def width() -> int:
    """Columns that a line may take."""
    return shutil.get_terminal_size((WIDTH, 24)).columns if redraws() else WIDTH


class Lines(logging.Handler):
    """Writes messages to standard output as it is at that moment, since a progress bar takes its place for a while.

    ``stream`` is what logging configurations name, and not used.
    """

    def __init__(self, stream: Any = None) -> None:
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            panel = getattr(record, "panel", None)
            if panel is not None and redraws():
                draw(*panel)
                return
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            source = "" if record.name.partition(".")[0] in ("povid", "__main__") else f"{record.name}: "
            print(f"{level}{source}{self.format(record)}", file=sys.stdout, flush=True)
        except Exception:
            self.handleError(record)


def show(log: logging.Logger, title: str, rows: Rows) -> None:
    """Show a panel; where there is no terminal, a line for the title and an indented one for each row."""
    log.info("%s", plain(title, rows), extra={"panel": (title, rows)})


def plain(title: str, rows: Rows) -> str:
    """A panel as text."""
    names = max((len(name) for name, _ in rows), default=0)
    lines = [title]
    for name, value in rows:
        first, *more = value.splitlines() or [""]
        lines += [f"  {name:{names}}  {first}", *(f"  {'':{names}}  {line}" for line in more)]
    return "\n".join(line.rstrip() for line in lines)


def draw(title: str, rows: Rows, console: Any = None) -> None:
    """Draw a panel between two rules.

    Words are wrapped in the column of the values. A path or command that does not fit there begins a line of its own
    and runs over the margin, where the terminal breaks it, so that it can be copied as it stands.
    """
    from rich import get_console
    from rich.rule import Rule
    from rich.text import Text

    console = console or get_console()
    names = max((len(name) for name, _ in rows), default=0)
    room = console.width - names - 4
    console.print(Rule(Text(title, style="bold"), align="left", characters="─"))
    for name, value in rows:
        lines: list[str] = []
        over: list[str] = []
        for line in value.splitlines():
            if len(line) > room and "/" in line:
                over.append(line)
            else:
                lines += textwrap.wrap(line, room) or [""]
        for number, line in enumerate(lines or [""]):
            console.print(
                Text(f"  {'' if number else name:{names}}  ", style="dim"), Text(line), sep="", soft_wrap=True
            )
        for line in over:
            console.print(Text(line), soft_wrap=True)
    console.print(Rule(characters="─"))


@contextmanager
def counted(log: logging.Logger, title: str, total: int, done: int = 0, unit: str = "answers") -> Iterator[Callable]:
    """Count from ``done`` to ``total``: call what this yields once for each.

    A bar on a terminal; elsewhere a line every ``EVERY`` seconds. A line says how many there are in the end.
    """
    start, since = time.monotonic(), done
    if redraws():
        from rich import get_console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)
        with Progress(*columns, TimeElapsedColumn(), Left(), console=get_console(), transient=True) as bar:
            task = bar.add_task(title, total=total, completed=done)

            def redraw() -> None:
                nonlocal done
                done += 1
                bar.advance(task)

            yield redraw
    else:
        said = start

        def say() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= EVERY and done < total:
                said = now
                left = spoken((now - start) / (done - since) * (total - done))
                log.info("%s: %d of %d %s, about %s left", title, done, total, unit, left)

        yield say
    log.info("%s: %d %s in %s", title, done, unit, spoken(time.monotonic() - start))


def spoken(seconds: float) -> str:
    """A duration in words: ``45 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = round(seconds)
    for large, small, size in (("d", "h", 3600), ("h", "min", 60), ("min", "s", 1)):
        ratio = {"d": 24, "h": 60, "min": 60}[large]
        if whole >= ratio * size:
            rest = whole // size % ratio
            return f"{whole // (ratio * size)} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
