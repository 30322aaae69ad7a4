"""Run folders with everything that a page shows, in small."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from povid.report import samples

NAMES = ("cat", "dog", "fork", "bus")
EVIL = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def find(text: str) -> list[str]:
    return [word for word in text.lower().replace(".", "").replace(",", "").split() if word in NAMES]


def record(number: int, before: str, after: str, noised: str = "grey", **changes) -> dict:
    return {
        "id": f"r{number}",
        "image": Image.new("RGB", (8, 6), "red"),
        "noised": Image.new("RGB", (8, 6), noised),
        "question": "What is it?",
        "preferred": "A cat.",
        "dispreferred": "A cat and a fork.",
        "before": before,
        "after": after,
        "objects": ["cat"],
        **changes,
    }


def log(folder: Path, stage: int, names: str = "loss,rewards/chosen", lines: int = 5) -> None:
    place = folder / f"stage_{stage}"
    place.mkdir(exist_ok=True)
    rows = [f"0,{step}," + ",".join(str(0.7 - 0.01 * step) for _ in names.split(",")) for step in range(lines)]
    (place / "metrics.csv").write_text("\n".join([f"epoch,step,{names}", *rows]) + "\n")


def fill(folder: Path, *records: dict, config: str = "seed: 0\n") -> Path:
    """Add samples, a configuration and the curves of stage 1 to a run folder with results.json."""
    (folder / "config.yaml").write_text(config)
    (folder / "packages.txt").write_text("torch==2.13.0\n")
    log(folder, 1)
    samples.write(folder, records, find)
    return folder
