"""The addresses of the paper's run on this machine: their files in miniature, and the way there for other processes."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import ssl
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trustme
from PIL import Image
from servers import Files, file_server

from povid.benchmarks import coco
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.chair import CHAIR
from povid.benchmarks.llava_bench import LLaVABench
from povid.benchmarks.mm_vet import MMVet
from povid.benchmarks.mmbench import MMBench
from povid.benchmarks.mme import COGNITION, MME, PERCEPTION
from povid.benchmarks.mmhal import MMHal
from povid.benchmarks.pope import POPE, SPLITS
from povid.benchmarks.science_qa import ScienceQA

MMHAL = """
import openai_of_2023, sys
sys.exit("this script must not be run")
template = '''Judge this, please.
{}
/ {} / {} / {}
Rating:'''
"""
MM_VET = '''
prompt = """Grade it.
a | b | c | d
"""
def arg_parser(prompt=prompt):
    return prompt
def load(sub_set_name):
    return sub_set_name + "_"
def runs(args, data):
    question = args.prompt + "\\n" + " | ".join([data, ""])
    while True:
        question = args.prompt + "\\n" + " | ".join([data, ""]) + "\\nSay a digit: "
'''
LLAVA = """
def get_eval(content):
    ask(messages=[{'role': 'system', 'content': 'You check {answers}.'}, {'role': 'user', 'content': content}])
if __name__ == '__main__':
    content = (f'<Context>\\n{cap_str}\\n'
               f'<Question>{ques["text"]}\\n{{x}}'
               f'<{role} 1>{ans1["text"]}<{role} 2>{ans2["text"]}\\n'
               f'{prompt}!')
"""
RULES = {f"llava_bench_{kind}": {"role": "Helper", "prompt": f"Rate {kind}."} for kind in ("conv", "detail", "complex")}
MMBENCH = """
class MMBench_Evaluator:
    def build_option_str(self, option_list):
        s = "Several: \\n"
        for c, opt in option_list:
            s += f"{c}. {opt}\\n"
        return s
    def build_prompt(self, question, options, prediction):
        tmpl = (
            "Match. "
            "Q: {}? O: {} A: {} Out:"
        )
        return tmpl.format(question, options, prediction)
"""
SCRIPTS: dict[type[Benchmark], dict[str, str]] = {
    MMHal: {"eval_gpt_mmhal.py": MMHAL},
    MMVet: {"mm-vet_evaluator.py": MM_VET},
    LLaVABench: {"eval_gpt_review_bench.py": LLAVA, "rule.json": json.dumps(RULES)},
    MMBench: {"mmbench_evals.py": MMBENCH},
}
"""Scripts of the official form with a prompt that a judge is asked with; the prompts are made up."""


def judge_says(prompt: str) -> str:
    """What a judge who is asked with one of these prompts may answer."""
    replies = {"Judge this": "Well.\nRating: 4", "Grade it": "0.7", "Rate ": "8 6\nFine", "Match.": "A"}
    return next(reply for start, reply in replies.items() if start in prompt)


def picture(number: int, kind: str = "JPEG") -> bytes:
    kept = io.BytesIO()
    Image.new("RGB", (40, 30), (40 * number % 256, 90, 200 - 20 * (number % 10))).save(kept, kind)
    return kept.getvalue()


def packed(files: Mapping[str, bytes | str]) -> bytes:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return kept.getvalue()


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TRAIN = [f"COCO_train2014_{number:012d}.jpg" for number in range(1, 5)]
VAL = [f"COCO_val2014_{number:012d}.jpg" for number in range(1, 3)]


def preferences() -> bytes:
    """POVID's release: four records about four pictures."""

    def turns(answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": "<image>\nDescribe this image"}, {"from": "gpt", "value": answer}]

    rows = zip(TRAIN, ("dog", "cat", "bus", "car"))
    return json.dumps(
        [
            {
                "id": str(number),
                "image": f"./data/coco/{name}",
                "conversations": turns(f"A {thing} on the mat"),
                "rejected_conversations": turns(f"A {thing} and two people walk with umbrella"),
            }
            for number, (name, thing) in enumerate(rows)
        ]
    ).encode()


def _chair() -> dict[str, bytes]:
    numbers = [int(name[-8:-4]) for name in VAL]
    instances = {
        "images": [{"id": number} for number in numbers],
        "annotations": [{"image_id": number, "category_id": 1} for number in numbers],
        "categories": [{"id": 1, "name": "dog"}],
    }
    captions = {
        "images": instances["images"],
        "annotations": [{"image_id": number, "caption": "A dog."} for number in numbers],
    }
    named = {"instances_val2014.json": json.dumps(instances), "captions_val2014.json": json.dumps(captions)}
    archive = packed({f"annotations/{name}": content for name, content in named.items()})
    return {"synonyms.txt": b"person, people\ndog\ncat\nbus\ncar\numbrella\n", coco.ANNOTATIONS.file: archive}


def _pope() -> dict[str, bytes]:
    asked = [(name, thing, label) for name in VAL for thing, label in (("dog", "yes"), ("cat", "no"))]
    rows = [
        {"question_id": number, "image": name, "text": f"Is there a {thing} in the image?", "label": label}
        for number, (name, thing, label) in enumerate(asked, 1)
    ]
    return {f"coco_pope_{split}.json": lines(*rows) for split in SPLITS}


def _mmhal() -> dict[str, bytes]:
    rows = [
        {
            "question_type": kind,
            "question_topic": "t",
            "image_id": f"i{number}",
            "image_src": f"http://x/{number}.jpg",
            "image_content": ["Dog"],
            "question": "What is it",
            "gt_answer": "A dog.",
            "model_answer": "",
        }
        for number, kind in enumerate(("attribute", "other"))
    ]
    pictures = {f"test_data/images/{number}.jpg": picture(number) for number in range(2)}
    return {"response_template.json": json.dumps(rows).encode(), "test_data.zip": packed(pictures)}


def _science_qa() -> dict[str, bytes]:
    problems = {
        str(number): {
            "question": "What is it",
            "choices": ["dog", "cat"],
            "answer": number % 2,
            "hint": "",
            "image": "image.png",
            "subject": "s",
        }
        for number in range(2)
    }
    return {
        "problems.json": json.dumps(problems).encode(),
        "pid_splits.json": json.dumps({"test": ["0", "1"]}).encode(),
        "test.zip": packed({f"test/{number}/image.png": picture(number, "PNG") for number in range(2)}),
    }


def _mme() -> dict[str, bytes]:
    asked = (
        "0.jpg\tIs there a dog? Please answer yes or no.\tYes\n0.jpg\tIs there a cat? Please answer yes or no.\tNo\n"
    )
    subtasks = PERCEPTION + COGNITION
    return {
        "eval_tool.zip": packed({f"eval_tool/Your_Results/{subtask}.txt": asked for subtask in subtasks}),
        "MME_Benchmark_release_version.zip": packed(
            {f"MME_Benchmark_release_version/{subtask}/0.jpg": picture(0) for subtask in subtasks}
        ),
    }


def _mmbench() -> dict[str, bytes]:
    shown = base64.b64encode(picture(1, "PNG")).decode()
    rows = [f"{index}\tWhat is it\tdog\tcat\t{right}\tc\t{shown}" for index, right in ((0, "A"), (1_000_000, "B"))]
    table = "\n".join(["index\tquestion\tA\tB\tanswer\tcategory\timage", *rows])
    return {"mmbench_dev_20230712.tsv": table.encode()}


def _mm_vet() -> dict[str, bytes]:
    record = {"imagename": "v1_0.png", "question": "What is it", "answer": "dog", "capability": ["rec"]}
    content = {"mm-vet/mm-vet.json": json.dumps({"v1_0": record}), "mm-vet/images/v1_0.png": picture(0, "PNG")}
    return {"mm-vet.zip": packed(content)}


def _llava_bench() -> dict[str, bytes]:
    kinds = ("conv", "detail", "complex")
    asked = [
        {"question_id": number, "image": f"00{number}.jpg", "text": "What is it", "category": kind}
        for number, kind in enumerate(kinds, 1)
    ]
    return {
        "questions.jsonl": lines(*asked),
        "context.jsonl": lines(*({"image": row["image"], "caption": "A dog."} for row in asked)),
        "answers_gpt4.jsonl": lines(*({"question_id": row["question_id"], "text": "A dog."} for row in asked)),
        **{f"images/{number:03d}.jpg": picture(number) for number in range(1, 25)},
    }


FILES = {
    CHAIR: _chair,
    POPE: _pope,
    MMHal: _mmhal,
    ScienceQA: _science_qa,
    MME: _mme,
    MMBench: _mmbench,
    MMVet: _mm_vet,
    LLaVABench: _llava_bench,
}


def official() -> dict[str, bytes]:
    """Address → content of what the eight benchmarks of Table 3 and POVID's preferences need.

    The official gradings, with which judges are compared, are there too, and empty.
    """
    found = {f"{coco.HOST}/train2014/{name}": picture(number) for number, name in enumerate(TRAIN)}
    found |= {f"{coco.HOST}/val2014/{name}": picture(number) for number, name in enumerate(VAL)}
    for kind, make in FILES.items():
        content = make()
        found |= {source.url: content[source.file] for source in kind.sources if source.each is None}
        for source in kind.prompt_sources:
            found[source.url] = SCRIPTS[kind][source.file.rpartition("/")[2]].encode()
        found |= dict.fromkeys((source.url for source in getattr(kind, "graded", ())), b"{}\n")
    return found


HOOK = '''"""The sizes and sums of official files become those of the miniatures that stand in for them."""
import json, os
from povid.fetching.source import Source
with open(os.environ["MINIATURES"]) as file:
    known = json.load(file)
honest = Source.__init__
def made(self, url, file, size=None, sha256=None, *more, **named):
    if url in known:
        size, sha256 = size and known[url][0], sha256 and known[url][1]
    honest(self, url, file, size, sha256, *more, **named)
Source.__init__ = made
'''


@contextmanager
def served(content: Mapping[str, bytes], folder: Path) -> Iterator[tuple[Files, dict[str, str]]]:
    """A proxy with the files of many hosts, and the environment in which a process of ours takes it for the internet.

    Only sizes and sums are changed there, of files that have some; ``folder`` receives what is needed for that.
    """
    authority, files = trustme.CA(), Files(dict(content))
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    authority.cert_pem.write_to_path(folder / "authority.pem")
    sums = {url: (len(data), hashlib.sha256(data).hexdigest()) for url, data in content.items()}
    (folder / "miniatures.json").write_text(json.dumps(sums))

    @functools.cache
    def encrypted(host: str) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(host).configure_cert(context)
        return context

    with file_server(files, encrypted) as address:
        yield (
            files,
            {
                "HTTPS_PROXY": address,
                "https_proxy": address,
                "SSL_CERT_FILE": str(folder / "authority.pem"),
                "MINIATURES": str(folder / "miniatures.json"),
                "PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).resolve().parents[1] / "src"))),
            },
        )
