"""Runs and sweeps as a whole: interrupted sweeps, requeued cluster jobs, resumed W&B runs, files of a run."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from forks import at_step, finish, settings, train

from povid.internals import wandb_records


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def test_an_interrupted_sweep_resumes_where_it_was(world, tmp_path):
    """Killed in the second of three jobs: the first is not run again, the second resumes, the third starts."""
    common = [*settings(world, f"outputs={tmp_path}"), "benchmarks=[chair,pope]"]
    status, _ = train(
        "-m", *common, "ablation=none,text,noise", log=tmp_path / "log", sabotage=at_step(1, 7, signal.SIGKILL)
    )
    assert status == -9
    (sweep,) = (tmp_path / "sweeps").iterdir()
    first = (sweep / "0_none_seed0" / "results.json").read_bytes()
    assert not (sweep / "2_noise_seed0").exists()

    status, printed = train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 0, printed
    assert "finished already" in printed
    assert "stage 1 resumes after step 6" in printed
    assert [folder.name for folder in (tmp_path / "sweeps").iterdir()] == [sweep.name]
    assert (sweep / "0_none_seed0" / "results.json").read_bytes() == first
    for job in ("1_text_seed0", "2_noise_seed0"):
        assert (sweep / job / "results.json").exists()
    assert (sweep / "tables" / "table3.md").exists()

    status, printed = train("-m", "resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 2 and "holds no sweep that was started and not finished" in printed


def test_a_requeue_signal_saves_and_requeues(world, tmp_path):
    """Environment variables and a scontrol that records its arguments stand in for SLURM."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    scontrol.chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "42",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "povid",
        "SLURM_JOB_NODELIST": "here",
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
    }
    command = settings(
        world,
        "ablation=text",
        "trainer=slurm",
        "trainer.devices=1",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.strategy=auto",
    )

    def on_cluster(then: Callable[[], None] = lambda: None, **more: str) -> Callable[[], None]:
        return lambda: (os.environ.update(variables | more), then())

    folder = tmp_path / "run"
    assert finish(command, folder, on_cluster(at_step(1, 3, signal.SIGUSR1))) == 143
    assert (tmp_path / "told").read_text() == "requeue 42\n"
    assert "stopped: SIGUSR1: saved after step 3 and requeued as job 42" in folder.with_suffix(".log").read_text()
    assert finish(command, folder, on_cluster(SLURM_RESTART_COUNT="1")) == 0
    assert "stage 1 resumes after step 3" in folder.with_suffix(".log").read_text()
    assert json.loads((folder / "stage_1" / "stage.json").read_text())["steps"] == 10


def history(folder: Path) -> tuple[list[dict[str, object]], dict[str, object], set[str]]:
    """The rows of a W&B run's history over all its files, its summary, and the types of its artifacts."""
    (name,) = {file.stem for file in (folder / "wandb").glob("offline-run-*/*.wandb")}
    rows, summary, artifacts = [], {}, set()
    for file in sorted((folder / "wandb").glob(f"offline-run-*/{name}.wandb")):
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
            elif kind == "summary":
                summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
            elif kind == "artifact":
                artifacts.add(record.artifact.type)
    return rows, summary, artifacts


def test_stages_and_evaluation_are_one_wandb_run_with_each_step_once(world, tmp_path):
    """Killed in stage 2, a second after its checkpoint of step 6: W&B has lost what it had not written by then."""
    home, folder = tmp_path / "home", tmp_path / "run"
    home.mkdir()

    def offline(then: Callable[[], None] = lambda: None) -> Callable[[], None]:
        return lambda: (
            os.environ.update(WANDB_MODE="offline", HOME=str(home)),
            os.environ.pop("WANDB_SERVICE", None),  # of this process, which outlives the one that is killed
            then(),
        )

    command = settings(world, "logger=wandb", "samples=2", "samples_every=4", "benchmarks=[chair,pope]")
    assert finish(command, folder, offline(at_step(2, 7, signal.SIGKILL))) == -signal.SIGKILL
    assert finish([*command, "resume=true"], folder, offline()) == 0, folder.with_suffix(".log").read_text()

    rows, summary, artifacts = history(folder)
    assert [row["_step"] for row in rows if "stage_1/loss" in row or "stage_2/loss" in row] == list(range(20))
    for stage in (1, 2):
        with (folder / f"stage_{stage}" / "metrics.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                (row,) = (row for row in rows if row.get(f"stage_{stage}/step") == int(line["step"]))
                wanted = {f"stage_{stage}/{name}": float(value) for name, value in line.items()}
                assert wanted == {name: row[name] for name in wanted}
    one = {"loss", "lr", "grad_norm", "kl", "p_first_token", "tokens", "logps/chosen", "logps/rejected"}
    one |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert {f"stage_1/{name}" for name in one} | {"stage_1/examples_per_second"} <= rows[1].keys()
    two = {f"{name}_{kind}" for name in one if "rejected" in name or "margins" in name for kind in ("text", "noise")}
    assert {f"stage_2/{name}" for name in two | {"noise_differs"}} <= rows[-2].keys()

    results = json.loads((folder / "results.json").read_text())["benchmarks"]
    assert summary["CHAIR_S"] == summary["eval/chair/CHAIR_S"] == results["chair"]["CHAIR_S"]
    assert summary["POPE"] == results["pope"]["f1"]
    assert summary["eval/pope/random/f1"] == results["pope"]["random"]["f1"]
    assert (summary["Text disprefer"], summary["Image distortion"], summary["row"]) == ("✓", "✓", "both")
    assert summary["stage_2/loss"].keys() == {"last", "min"} and {"model", "answers"} <= artifacts
    tables = {file.name.partition("_")[0] for file in folder.rglob("*.table.json")}
    assert tables == {"samples", "flipped"}
    assert not list(home.rglob("*")), "everything lies in the run folder"
    assert f"wandb sync {folder}/wandb/offline-run-" in folder.with_suffix(".log").read_text()


def test_a_run_without_benchmarks(world, tmp_path):
    command = [part for part in settings(world, "ablation=text", "stages.1.max_steps=1") if "benchmarks" not in part]
    assert finish([*command, "benchmarks=[]"], tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["benchmarks"] == {}


def test_a_benchmark_that_failed_curably_leaves_the_run_open(world, tmp_path):
    """The model's answers stop half-way as a served model's do at a rate limit."""
    from povid.fault import Fault
    from povid.model.generation import Answers

    def refusing() -> None:
        honest, calls = Answers.__call__, []

        def limited(self, questions, decoding):
            calls.append(decoding)
            if len(calls) == 1:
                yield next(iter(honest(self, questions, decoding)))
                raise Fault("http://server answers 429: slow down")
            yield from honest(self, questions, decoding)

        Answers.__call__ = limited

    command = [*settings(world, "ablation=text", f"outputs={tmp_path}"), "benchmarks=[chair,pope]"]
    status, printed = train(*command, log=tmp_path / "log", sabotage=refusing)
    assert status == 2, printed
    assert "is not finished: 1 of 2 benchmarks failed." in printed
    assert "chair: http://server answers 429: slow down" in printed
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "results.json").exists() and (folder / "benchmarks" / "pope" / "scores.json").exists()
    first = (folder / "benchmarks" / "chair" / "answers.jsonl").read_text()
    assert first.count("\n") == 1

    status, printed = train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 0, printed
    assert "stage 1 is finished already" in printed
    assert first in (folder / "benchmarks" / "chair" / "answers.jsonl").read_text()
    assert "CHAIR_S" in json.loads((folder / "results.json").read_text())["benchmarks"]["chair"]


def test_an_unreachable_wandb_costs_one_warning(world, tmp_path):
    variables = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_INIT_TIMEOUT": "5",
    }
    command = settings(world, "ablation=text", "logger=wandb")
    folder = tmp_path / "run"
    assert finish(command, folder, lambda: os.environ.update(variables)) == 0, folder.with_suffix(".log").read_text()
    assert folder.with_suffix(".log").read_text().count("W&B cannot be reached") == 1
    (place,) = (folder / "wandb").glob("offline-run-*")
    assert place.name.split("-")[3] == (folder / "wandb_id").read_text()


def test_wandb_that_fails_in_the_middle_goes_on_offline(tmp_path, monkeypatch, caplog):
    from povid.run import wandb_run
    from povid.run.context import RunContext

    for name in ("WANDB_MODE", "WANDB_SERVICE", *wandb_run.PLACES):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "")
        monkeypatch.delenv(name)
    logger = wandb_run.wandb_logger(RunContext(tmp_path, "stage_1", "g", ("t",), {}), mode="offline")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_metrics({"loss": 2.0}, step=1)

    def full(*_: object, **__: object) -> None:
        raise OSError("the quota is used up")

    monkeypatch.setattr(logger.experiment, "log", full)
    logger.log_metrics({"loss": 3.0}, step=2)
    logger.log_metrics({"train/mine": 4.0, "val/loss": 5.0}, step=3)
    wandb_run.finish()
    until = time.monotonic() + 20  # W&B's own process may write the last rows after it has said that it is done
    while len(rows := history(tmp_path)[0]) < 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert [row.get("stage_1/loss") for row in rows] == [1.0, 2.0, 3.0, None]
    assert (rows[3]["stage_1/mine"], rows[3]["val/loss"]) == (4.0, 5.0)
    assert caplog.text.count("the quota is used up") == 1
    assert wandb_run.sync_line(tmp_path) == f"wandb sync {tmp_path}/wandb/offline-run-*"
    assert len([*tmp_path.glob("wandb/offline-run-*")]) == 2


def test_a_logger_that_fails_at_the_end_costs_no_results(world, tmp_path):
    from povid.run import evaluation

    def broken() -> None:
        def fail(*_):
            raise ConnectionError("gone")

        evaluation.show_results = fail

    folder = tmp_path / "run"
    assert finish(settings(world, "ablation=none"), folder, broken) == 0
    assert "a logger failed (ConnectionError: gone)" in folder.with_suffix(".log").read_text()
    assert json.loads((folder / "results.json").read_text())["benchmarks"]["pope"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_batch_names_the_answers_where_rounding_makes_it_count(world, tmp_path, dtype):
    """In bfloat16 a run with other batches is another run and its answers are others'; in float32 it is resumed."""
    folder, log = tmp_path / "run", tmp_path / "run.log"
    command = [*settings(world, "ablation=none", f"model.dtype={dtype}", "trainer.precision=32-true"), "resume=true"]
    assert finish(command, folder) == 0, log.read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["decoding"]["pope"].get("batch_size") == (64 if dtype == "bfloat16" else None)
    assert int(results["versions"]["threads"]) >= 1
    (folder / "results.json").unlink()
    again = [*command, "generation.batch_size=3"]
    assert finish(again, folder) == (2 if dtype == "bfloat16" else 0), log.read_text()
    if dtype == "bfloat16":
        assert "generation.batch_size was 64 and is now 3" in log.read_text()
        record = folder / "config.yaml"
        record.write_text(record.read_text().replace("batch_size: 64", "batch_size: 3"))
        assert finish(again, folder) == 2
        assert "is not finished: 1 of 1 benchmarks failed" in log.read_text()
        assert "holds answers by a different model" in log.read_text()


def test_any_lightning_logger_callback_optimizer_and_schedule(world, tmp_path):
    """Ten steps without warm-up under a linear schedule: the n-th step's rate is 1 - (n - 1) / 10 of the first."""
    command = settings(
        world,
        "ablation=text",
        "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, name: mine, version: ''}",
        "callbacks=[learning_rate]",
        "optimizer._target_=torch.optim.SGD",
        "+optimizer.momentum=0.9",
        "schedule=linear",
        "stages.1.warmup_ratio=0.0",
    )
    folder = tmp_path / "run"
    assert finish(command, folder) == 0, folder.with_suffix(".log").read_text()
    with (folder / "stage_1" / "mine" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")]
    assert rates == pytest.approx([5e-4 * (1 - step / 10) for step in range(10)])
