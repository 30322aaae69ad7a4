"""What benchmark files name as pictures stays inside their folder: it may be sent to a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.mm_vet import MMVet
from povid.benchmarks.pope import POPE
from povid.benchmarks.science_qa import ScienceQA
from povid.fault import Fault


def pope(data: Path, name: object) -> Benchmark:
    row = {"question_id": 1, "image": name, "text": "Is there a dog in the image?", "label": "no"}
    (data / "coco_pope_random.json").write_text(json.dumps(row))
    return POPE(data=data)


def chair(data: Path, name: object) -> Benchmark:
    (data / "synonyms.txt").write_text("dog, puppy\n")
    (data / "objects.json").write_text(json.dumps({str(name): ["dog"]}))
    return CHAIR(data=data)


def mm_vet(data: Path, name: object) -> Benchmark:
    record = {"imagename": name, "question": "What?", "answer": "A dog", "capability": ["rec"]}
    (data / "mm-vet.json").write_text(json.dumps({"v1_0": record}))
    return MMVet(data=data)


def science_qa(data: Path, name: object) -> Benchmark:
    problem = {"question": "What?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": name, "subject": "x"}
    (data / "problems.json").write_text(json.dumps({"1": problem}))
    (data / "pid_splits.json").write_text(json.dumps({"test": ["1"]}))
    return ScienceQA(data=data)


@pytest.mark.parametrize("make", [pope, chair, mm_vet, science_qa])
def test_no_picture_outside_the_folder_is_used(make, tmp_path):
    data = tmp_path / "data"
    inside = data / "images" / ("1" if make is science_qa else "")
    inside.mkdir(parents=True)
    private = tmp_path / "private.png"
    Image.new("RGB", (4, 4)).save(private)
    Image.new("RGB", (4, 4)).save(inside / "dog.png")
    (inside / "link.png").symlink_to(private)

    assert make(data, "dog.png").questions()[0].image == inside / "dog.png"
    names = ["../../private.png", "../../../private.png", "..\\private.png", "link.png"]
    if make is not science_qa:  # there the question's folder stands before it
        names.append(str(private))
    for name in names:
        with pytest.raises(Fault, match="a picture outside"):
            make(data, name).questions()
