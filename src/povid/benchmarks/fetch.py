"""Download the official files of benchmarks, and say what is left to do by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from povid.benchmarks import wording
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.suite import check_images
from povid.fault import Fault
from povid.fetching import download, hub
from povid.preferences.fetch import named_pictures, report

Choice = Literal["named", "all", "none"]


def main(
    selection: Mapping[str, Benchmark],
    *,
    pictures: Choice = "named",
    say: Callable[[str], None] = print,
) -> bool:
    """Download what can be of each benchmark, one after another, and say of each what is missing.

    One that fails does not stop the others. Returns whether nothing is missing.
    """
    failed: dict[str, str] = {}
    shared: dict[str, Path] = {}  # archive → the folder in which it is unpacked
    for name, benchmark in selection.items():
        say(f"{name}: {benchmark.data}")
        try:
            _one(benchmark, pictures, shared, say)
        except Fault as fault:
            failed[name] = str(fault)
            say(f"  {fault}")
        if benchmark.notice:
            say(f"  {benchmark.notice.format(data=benchmark.data)}")
    say("")
    width = max(map(len, selection))
    for name, benchmark in selection.items():
        failed.setdefault(name, _missing(name, benchmark, pictures))
        say(f"{name:{width}}  {failed[name] or 'complete'}")
    return not any(failed.values())


def _one(
    benchmark: Benchmark,
    pictures: Choice,
    shared: dict[str, Path],
    say: Callable[[str], None],
) -> None:
    """Download the files of a benchmark: archives of pictures late, and of these only what is asked for.

    The judge's official prompt is read in the official script as soon as that is there. The official gradings, which
    only ``calibrate`` needs, come last.
    """
    if not benchmark.sources:
        say(f"  it names no files to download; put its files into {benchmark.data}")
    plain = [source for source in (*benchmark.sources, *benchmark.prompt_sources) if source.each is None]
    for file in hub.download_files(plain, benchmark.data):
        say(f"  {file} is complete")
    if (prompt := wording.store(type(benchmark), benchmark.data)) is not None:
        say(f"  {prompt} has the judge's official prompt, word for word")
    for source in benchmark.sources:
        if source.each is None or pictures == "none" or benchmark.images is not None:
            continue
        if not download.is_complete(source, benchmark.data):
            if pictures == "named":
                wanted = {
                    question.image: question.image.name
                    for question in benchmark.loaded()
                    if isinstance(question.image, Path)
                }
                outcome = named_pictures(source.each, wanted, title=benchmark.name)
                report(outcome, lambda line: say(f"  {line}"))
                continue
            if source.url in shared:
                download.link(source, shared[source.url], benchmark.data)
            else:
                download.fetch([source], benchmark.data)
        shared.setdefault(source.url, benchmark.data)
        say(f"  the pictures of {source.file} are complete")
    for file in hub.download_files(getattr(benchmark, "graded", ()), benchmark.data):
        say(f"  {file} is complete")


def _missing(name: str, benchmark: Benchmark, pictures: Choice) -> str:
    """Why a run could not ask the benchmark now; empty if it could."""
    try:
        questions = benchmark.loaded()
        if pictures != "none":
            check_images(name, questions)
    except Fault as fault:
        return str(fault)
    return ""
