"""Several processes answer what one answers, and one that fails stops the others with its message."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from forks import finish, settings, train
from torch import distributed

from povid.benchmarks import suite
from povid.benchmarks.benchmark import Benchmark
from povid.benchmarks.processes import ALONE
from povid.fault import Fault
from povid.model.generation import Answers
from povid.model.question import Decoding, Question, Score, Share
from povid.run.answering import InStep
from povid.run.processes import Group
from povid.training.sharding import shard

FORK = multiprocessing.get_context("fork")


def in_processes(count: int, folder: Path, work: Callable[[Group], object]) -> list[object]:
    """What ``work`` returns in each of so many processes: text if it raised, the exit status if it died."""
    folder.mkdir(exist_ok=True)
    queue = FORK.SimpleQueue()

    def enter(number: int) -> None:
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=number, world_size=count)
        try:
            queue.put((number, work(Group(folder))))
        except Exception as error:
            queue.put((number, f"{type(error).__name__}: {error}"))
        os._exit(0)

    (folder / "store").unlink(missing_ok=True)
    processes = [FORK.Process(target=enter, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    found = {number: process.exitcode for number, process in enumerate(processes)}
    while not queue.empty():
        number, result = queue.get()
        found[number] = result
    return [found[number] for number in range(count)]


class Words(Benchmark):
    """Twelve questions about five pictures, and one about none."""

    name = "words"
    official = "none"

    def questions(self):
        images = [bytes([n % 5]) for n in range(12)]
        return [Question(n, image, f"Q{n}?") for n, image in enumerate([*images, None])]

    def score(self, questions, answers, judge=None):
        return Score({"letters": sum(map(len, answers))}, [])

    def write_official(self, questions, answers, folder):
        return folder

    def read_answers(self, file, questions):
        return []


@pytest.fixture
def words(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "check_images", lambda *_: None)
    return {"words": Words(data=tmp_path)}


def answerer(group, trouble: Callable[[Group, int], None] = lambda group, at: None):
    """Answers its share, the last question first."""

    def answers(questions, decoding):
        for count, index in enumerate(reversed(Share(group.number, group.of).by_picture(questions))):
            trouble(group, count)
            yield index, f"answer to {questions[index].text}"

    return answers


def work(benchmarks, out: Path, trouble: Callable[[Group, int], None] = lambda group, at: None):
    def of_each(group):
        answers = answerer(group, trouble)
        if group.number:
            return suite.follow(benchmarks, answers, out, "m", group)
        return suite.run(benchmarks, answers, out, model="m", processes=group)

    return of_each


def test_every_process_answers_the_questions_about_some_pictures(words):
    questions = words["words"].questions()
    shares = [Share(number, 3).by_picture(questions) for number in range(3)]
    assert shares == [[0, 3, 5, 8, 10], [1, 4, 6, 9, 11], [2, 7, 12]], "pictures 0 and 3, 1 and 4, 2 and none"


def test_parts_are_merged_into_what_one_process_writes(words, tmp_path):
    """Also after a kill with other processes: their parts, one torn, and an answer that was merged already."""
    one, two = tmp_path / "one", tmp_path / "two"
    scores = work(words, one)(ALONE)
    results = in_processes(2, tmp_path / "run", work(words, two))
    assert results == [scores, True] and scores["words"]["letters"] > 0
    files = [(place / "words" / "answers.jsonl").read_bytes() for place in (one, two)]
    assert files[0] == files[1] and files[0].count(b"\n") == 13
    assert {file.name for file in (two / "words").iterdir()} == {"answers.jsonl", "asked.json", "scores.json"}
    lines = files[0].splitlines(keepends=True)
    (two / "words" / "answers.jsonl").write_bytes(b"".join(lines[3:5]))
    (two / "words" / "answers.1.jsonl").write_bytes(b"".join(lines[4:7]))
    (two / "words" / "answers.2.jsonl").write_bytes(lines[12] + lines[8][:9])
    asked = []
    again = work(words, two, lambda group, at: asked.append(at))(ALONE)
    assert again == scores and len(asked) == 13 - 5
    assert (two / "words" / "answers.jsonl").read_bytes() == files[0]
    assert not (two / "words" / "answers.1.jsonl").exists()


def test_a_process_that_fails_stops_the_others_with_its_message(words, tmp_path):
    """Each is the second process, at its second question; the first one has answered everything, or waits until the
    other one has failed. A Fault leaves the benchmark open, and its other answers are kept."""

    def fault(group, at):
        if (group.number, at) == (1, 1):
            raise Fault("the picture is broken")

    def error(group, at):
        if (group.number, at) == (1, 1):
            raise MemoryError("no memory left")
        while group.number == 0 and not (tmp_path / "error" / "process_failed.txt").exists():
            pass
        group.looked = 0.0  # it would look again after a second

    def killed(group, at):
        if (group.number, at) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    first, second = in_processes(2, tmp_path / "fault", work(words, tmp_path / "f", fault))
    assert first["words"]["missing"] == "the picture is broken (process 1 of 2)" and first["words"]["open"]
    assert second is False
    assert (tmp_path / "f" / "words" / "answers.1.jsonl").read_text().count("\n") == 1
    first, second = in_processes(2, tmp_path / "error", work(words, tmp_path / "e", error))
    said = "process 1 of 2 failed: MemoryError: no memory left"
    assert first == f"ProcessFailed: {said}; what was answered is kept: resume with resume=latest"
    assert second == "MemoryError: no memory left"
    assert (tmp_path / "e" / "words" / "answers.jsonl").read_text().count("\n") == 1, "it stopped at once"
    first, second = in_processes(2, tmp_path / "killed", work(words, tmp_path / "k", killed))
    assert first.startswith("ProcessFailed: a process has ended (") and second == -signal.SIGKILL


def test_other_questions_in_another_process_are_refused(words, tmp_path):
    def of_each(group):
        if group.number:
            object.__setattr__(words["words"], "_loaded", words["words"].questions()[:12])
        return work(words, tmp_path / "out")(group)

    first, _ = in_processes(2, tmp_path / "run", of_each)
    assert (
        "this process would ask something else than the first (questions, texts, pictures, truth)"
        in (first["words"]["missing"])
    )


def test_split_weights_answer_what_whole_ones_answer(tmp_path):
    """Two processes with half of the weights each, and shares of unequal length; then one of them fails."""
    policy, template = tiny.load(tiny.save_tiny_llava(tmp_path / "tiny"), adapted=False)
    pictures = [tiny.picture(tmp_path, f"p{n}", n) for n in range(3)]
    texts = ("What is it", "Is there a dog", "Describe this image.")
    questions = [Question(f"{p.stem} {t}", p, t) for p in pictures for t in texts] + [Question("none", None, texts[0])]
    whole = dict(Answers(policy, template, batch_size=4)(questions, Decoding(9)))

    def of_each(group):
        from torch.distributed.device_mesh import init_device_mesh

        shard(policy, init_device_mesh("cpu", (2,)))
        answers = InStep(Answers(policy, template, batch_size=4, share=Share(group.number, 2)), group)
        own = dict(answers(questions, Decoding(9)))
        said = group.ask(answers, questions[:3], Decoding(9))
        try:
            group.ask(answers, [*questions, Question("broken", tmp_path / "none.png", "Is it " * 9)], Decoding(9))
        except Fault as fault:
            return own, said, str(fault), type(fault).__name__

    results = in_processes(2, tmp_path / "run", of_each)
    assert all(isinstance(result, tuple) for result in results), results
    (first, said, *_), (second, again, reason, kind) = results
    assert first.keys().isdisjoint(second) and abs(len(first) - len(second)) == 2
    assert first | second == whole and len(set(whole.values())) > 5
    assert said == again == [whole[n] for n in range(3)]
    assert "none.png" in reason and "process 0 of 2" in reason and kind == "Fault"


def command(folder: Path) -> list[str]:
    """Benchmarks, captions and identity; nothing is trained, so that the processes exist only to answer."""
    tiny.save_tiny_llava(folder / "tiny")
    pictures = ("data.prepare.evaluation=5", "data.prepare.preferences=3")
    short = ("benchmarks=[chair,pope]", "benchmarks.chair.max_new_tokens=8", "benchmarks.pope.max_new_tokens=4")
    return [*settings(folder, "ablation=none", *pictures, *short), "samples=3"]


TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")


def same(one: Path, other: Path) -> None:
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    for result in results:
        del result["timings"], result["started"]
    assert results[0] == results[1]
    for name in ("benchmarks/chair/answers.jsonl", "benchmarks/pope/answers.jsonl", "samples/samples.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_of_two_processes_is_that_of_one(tmp_path):
    run = command(tmp_path)
    status, printed = train(*run, *TWO, f"hydra.run.dir={tmp_path}/two", log=tmp_path / "log")
    assert status == 0, printed
    assert finish(run, tmp_path / "one") == 0
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_stop_together_and_one_resumes(tmp_path):
    """SIGTERM reaches the first process while it answers, after an answer of the other one."""

    def stop() -> None:
        honest = Answers._answer

        def answer(self, questions, groups, decoding):
            yield from honest(self, questions, groups, decoding)
            while decoding.max_new_tokens == 4 and not list(tmp_path.glob("two/benchmarks/pope/answers.1.jsonl")):
                pass
            if decoding.max_new_tokens == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        Answers._answer = answer

    run = command(tmp_path)
    status, printed = train(*run, *TWO, f"hydra.run.dir={tmp_path}/two", log=tmp_path / "log", sabotage=stop)
    assert status == 143, printed
    assert "stopped: SIGTERM: what is finished is kept" in printed and "Traceback" not in printed
    assert not (tmp_path / "two" / "results.json").exists()
    assert finish([*run, "resume=true"], tmp_path / "two") == 0, (tmp_path / "two.log").read_text()
    assert finish(run, tmp_path / "one") == 0
    same(tmp_path / "one", tmp_path / "two")
