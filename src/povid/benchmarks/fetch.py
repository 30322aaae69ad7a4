"""Downloads the official files of a benchmark, or says what must be done by hand."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from povid.benchmarks.answer_file import write_text
from povid.fault import Fault

BLOCK = 1 << 20
RECORD = "fetched.json"  # in the data folder: address, size and sha256 of what came

_GITHUB = "https://raw.githubusercontent.com"
_HUB = "https://huggingface.co/datasets"
_COCO = "http://images.cocodataset.org"


@dataclass(frozen=True, slots=True)
class Source:
    """One official file: where it is, where it goes, what is known of it (bytes, sha256), and what to unpack it for.

    ``unpack`` is None, or the folder (below the data folder, "." for itself) that an archive is unpacked into; with
    ``only``, just the members that end so.
    """

    url: str
    file: str
    size: int | None = None
    sha256: str | None = None
    unpack: str | None = None
    only: tuple[str, ...] = ()


_VAL2014 = Source(f"{_COCO}/zips/val2014.zip", "val2014.zip", unpack="images")
_HEAD = "master"

SOURCES: Mapping[str, Sequence[Source]] = {
    "chair": [
        Source(
            f"{_GITHUB}/LisaAnne/Hallucination/{_HEAD}/data/synonyms.txt",
            "synonyms.txt",
            size=3577,
            sha256="b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2",
        ),
        Source(
            f"{_COCO}/annotations/annotations_trainval2014.zip",
            "annotations_trainval2014.zip",
            unpack=".",
            only=(
                "instances_train2014.json",
                "instances_val2014.json",
                "captions_train2014.json",
                "captions_val2014.json",
            ),
        ),
        _VAL2014,
    ],
    "pope": [
        *(
            Source(f"{_GITHUB}/RUCAIBox/POPE/main/output/coco/coco_pope_{split}.json", f"coco_pope_{split}.json")
            for split in ("random", "popular", "adversarial")
        ),
        _VAL2014,
    ],
    "mmhal": [
        Source(f"{_HUB}/Shengcao1006/MMHal-Bench/resolve/main/response_template.json", "response_template.json"),
        Source(f"{_HUB}/Shengcao1006/MMHal-Bench/resolve/main/test_data.zip", "test_data.zip", unpack="."),
    ],
    "science_qa": [
        Source(f"{_GITHUB}/lupantech/ScienceQA/main/data/scienceqa/problems.json", "problems.json"),
        Source(f"{_GITHUB}/lupantech/ScienceQA/main/data/scienceqa/pid_splits.json", "pid_splits.json"),
        Source("https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip", "test.zip", unpack="images"),
    ],
    "mme": [
        Source(
            f"{_GITHUB}/BradyFU/Awesome-Multimodal-Large-Language-Models/Evaluation/tools/eval_tool.zip",
            "eval_tool.zip",
            size=107320,
            sha256="b8125e2a7c3418e5761c12b3cfe4f1624b3c53ba44009e75b7d3f797d3d8acee",
            unpack=".",
        ),
        Source(
            f"{_HUB}/darkyarding/MME/resolve/main/MME_Benchmark_release_version.zip",
            "MME_Benchmark_release_version.zip",
            unpack=".",
        ),
    ],
    "mmbench": [
        Source(
            "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv",
            "mmbench_dev_20230712.tsv",
        ),
    ],
    "mm_vet": [
        Source("https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip", "mm-vet.zip", unpack="."),
    ],
    "llava_bench": [
        *(
            Source(f"{_HUB}/liuhaotian/llava-bench-in-the-wild/resolve/main/{name}", name)
            for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
        ),
        *(
            Source(
                f"{_HUB}/liuhaotian/llava-bench-in-the-wild/resolve/main/images/{number:03d}.jpg",
                f"images/{number:03d}.jpg",
            )
            for number in range(1, 25)
        ),
    ],
}

BY_HAND: Mapping[str, str] = {
    "science_qa": "The prompts themselves (llava_test_CQM-A.json) are in LLaVA's eval.zip, behind Google Drive: open "
    "https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy in a browser, download it, and "
    "put scienceqa/llava_test_CQM-A.json into {data}; without it the prompts are built in that form.",
    "mm_vet": "MM-Vet's data is CC BY-NC 4.0: for research, not for commercial use.",
    "mme": "If the pictures cannot be fetched, ask for them as the readme of "
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation says and unpack "
    "MME_Benchmark_release_version into {data}; answers can be scored without them.",
    "mmbench": "If that address is closed, download MMBench_DEV_EN_legacy.tsv as "
    "https://github.com/open-compass/MMBench says and put it into {data}.",
    "chair": "Pictures take 6 GB; where they lie elsewhere already, set benchmarks.chair.images instead.",
    "pope": "Pictures take 6 GB; where they lie elsewhere already, set benchmarks.pope.images instead.",
}


def main(name: str, data: Path) -> int:
    """Fetch, report, and say what is left to do by hand; returns the exit status 0."""
    for file in fetch(name, data):
        print(f"{file} is there")
    if name in BY_HAND:
        print(BY_HAND[name].format(data=data))
    return 0


def fetch(
    name: str, data: Path, sources: Sequence[Source] | None = None, *, tries: int = 5, pause: float = 1.0
) -> list[Path]:
    """Bring the files of benchmark ``name`` into ``data``; those that are there and recorded are left alone.

    What a broken connection has brought is kept as FILE.part and continued; a file appears under its name only when
    it is whole and checked. Address, size and sha256 of what came are written to ``data/fetched.json``.

    Raises:
        Fault: no connection after ``tries``, an address that answers with an error, a wrong size or hash, a full disk,
            an archive that is broken or would write outside ``data``.
    """
    data = Path(data)
    sources = SOURCES[name] if sources is None else sources
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{data} cannot be made ({error.strerror}); choose another folder.") from error
    record = data / RECORD
    try:
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    except ValueError as error:
        raise Fault(f"{record} is not JSON ({error}); remove it and run again.") from error
    files = []
    for source in sources:
        file = data / source.file
        if known.get(source.file, {}).get("url") != source.url or not (file.is_file() or source.unpack):
            size, digest = _download(source, file, tries, pause)
            if source.unpack:
                _unpack(source, file, data / source.unpack)
                file.unlink()
            known[source.file] = {"url": source.url, "size": size, "sha256": digest}
            write_text(record, json.dumps(known, indent=1))
        files.append(file if not source.unpack else data / source.unpack)
    return list(dict.fromkeys(files))


def _download(source: Source, file: Path, tries: int, pause: float) -> tuple[int, str]:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    for attempt in range(tries):
        try:
            _transfer(source, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise Fault(
                    f"{source.url} answers {error.code} {error.reason}; open it in a browser, download "
                    f"{file.name} by hand and put it into {file.parent}."
                ) from error
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, EOFError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            have = part.stat().st_size if part.exists() else 0
            raise Fault(
                f"{part} cannot be written ({error.strerror or error}) after {have:,} bytes, "
                f"{shutil.disk_usage(file.parent).free:,} are free; make room and run the same command again, "
                "it goes on from there."
            ) from error
        if attempt + 1 == tries:
            raise Fault(
                f"{source.url} could not be fetched in {tries} tries ({reason}); check the network and run the "
                "same command again, it goes on where it stopped."
            )
        time.sleep(pause * 2**attempt)
    size, digest = part.stat().st_size, _sha256(part)
    if source.size not in (None, size) or source.sha256 not in (None, digest):
        part.unlink()
        raise Fault(
            f"{source.url} gave {size:,} bytes with sha256 {digest}, expected were "
            f"{source.size or size:,} bytes with {source.sha256 or 'any'}; it was removed, run the same "
            "command again, and if this stays the official file has changed."
        )
    os.replace(part, file)
    return size, digest


def _transfer(source: Source, part: Path) -> None:
    """Append what is missing to ``part``; EOFError when the connection ends before the announced length."""
    have = part.stat().st_size if part.exists() else 0
    tag = part.with_name(part.name + ".tag")  # which version of the file the part belongs to
    request = urllib.request.Request(source.url, headers={"User-Agent": "povid"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if tag.is_file() and tag.read_text():
            request.add_header("If-Range", tag.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            tag.unlink(missing_ok=True)
            return  # all of it is there already
        part.unlink()
        raise EOFError("what was there did not belong to this file") from error
    with answer:
        resumed = answer.status == 206
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total is not None and total - start > shutil.disk_usage(part.parent).free:
            raise OSError(28, "No space left on device")
        tag.write_text(answer.headers.get("ETag") or "")
        with (
            part.open("ab" if resumed else "wb") as sink,
            tqdm(
                total=total,
                initial=start,
                desc=part.name.removesuffix(".part"),
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            while block := answer.read(BLOCK):
                sink.write(block)
                bar.update(len(block))
            sink.flush()
            os.fsync(sink.fileno())
            end = sink.tell()
    if total is not None and end < total:
        raise EOFError(f"the connection ended after {end:,} of {total:,} bytes")
    tag.unlink(missing_ok=True)


def _unpack(source: Source, file: Path, folder: Path) -> None:
    """Unpack an archive below ``folder``, each file under its name only when it is whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [
                member
                for member in archive.infolist()
                if not member.is_dir()
                and not member.filename.startswith("__MACOSX")
                and (not source.only or member.filename.endswith(source.only))
            ]
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise Fault(
                        f"{file} has a member {member.filename!r} that would be written outside {folder}; "
                        "nothing was unpacked, get the archive from its official address."
                    )
            for member in tqdm(members, desc=f"unpacking {file.name}", unit="file", disable=None):
                target = folder.joinpath(*PurePosixPath(member.filename.replace("\\", "/")).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                half = target.with_name(target.name + ".part")
                with archive.open(member) as inside, half.open("wb") as sink:
                    shutil.copyfileobj(inside, sink, BLOCK)
                os.replace(half, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        file.unlink(missing_ok=True)
        raise Fault(f"{file} is no whole zip archive ({error}); it was removed, run the same command again.") from error
    except OSError as error:
        raise Fault(
            f"{file} cannot be unpacked into {folder} ({error.strerror or error}); make room and run the same "
            "command again."
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
