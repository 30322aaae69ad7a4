"""Validation, probe and best adapter: right numbers, no trace in what is trained, the same after a kill."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import tiny
import torch
from forks import at_step, composed, finish, settings, train

from povid.benchmarks.collapse import neither_rate, repeat_rate
from povid.fault import Fault
from povid.method.objectives.povid import POVID
from povid.model.adapters import adapter_digest
from povid.preferences.held_out import hold_out, picture_on_both_sides
from povid.report.sweep import TableAfterSweep
from povid.run.best import BestAdapter
from povid.run.checkpoint import CheckpointSettings
from povid.run.data import load_triples, split
from povid.run.evaluation import optimized
from povid.run.settings import build
from povid.run.watch import Watcher
from povid.training.datamodule import PreferenceDataModule, even_batches


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, and a painted world whose last five records stand in a file of their own."""
    from povid.scenes.world import prepare

    folder = tmp_path_factory.mktemp("validation")
    tiny.save_tiny_llava(folder / "tiny")
    data = prepare(folder / "data", seed=0, preferences=14, tuning=1, evaluation=1)
    records = json.loads((data / "preferences.json").read_text())
    (data / "preferences.json").write_text(json.dumps(records[:9]))
    (data / "held_out.json").write_text(json.dumps(records[9:]))
    return folder


def command(world: Path, *more: str) -> list[str]:
    """Stage 2 alone, of ten steps, with answers of few tokens."""
    return settings(
        world,
        f"data.folder={world}/data",
        "data.prepare=null",
        "ablation=noise",
        "benchmarks.pope.max_new_tokens=4",
        *more,
    )


PROBE = (
    "callbacks=[probe]",
    "callbacks.probe.every=4",
    "callbacks.probe.captions.max_new_tokens=8",
    "callbacks.probe.questions.max_new_tokens=4",
)


def rows(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as source:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(source)]


def outcome(run: Path) -> dict[str, object]:
    home = run / "stage_2"
    return {
        "metrics": (home / "metrics.csv").read_text(),
        "adapter": adapter_digest(home / "adapter"),
        "identity": json.loads((home / "stage.json").read_text())["identity"],
    }


@pytest.fixture(scope="module")
def watched(world) -> tuple[list[str], Path]:
    held_out = f"data.validation={world}/data/held_out.json"
    overrides, run = command(world, held_out, "trainer.val_check_interval=3", *PROBE), world / "out" / "watched"
    run.parent.mkdir()
    assert finish(overrides, run) == 0, run.with_suffix(".log").read_text()
    return overrides, run


def test_a_run_that_is_watched_trains_what_it_trains_alone(world, watched):
    """With dropout and noise, whose random numbers nothing else may draw; and with the same identity."""
    _, run = watched
    assert finish(command(world, f"outputs={world}/apart"), world / "alone") == 0
    assert outcome(run) == outcome(world / "alone")
    assert [row["steps"] for row in rows(run / "stage_2" / "validation.csv")] == [3, 6, 9]
    assert [row["steps"] for row in rows(run / "stage_2" / "probe.csv")] == [0, 4, 8, 10]
    measured = json.loads((run / "stage_2" / "stage.json").read_text())["measured"]
    assert measured["val/loss"] == rows(run / "stage_2" / "validation.csv")[-1]["val/loss"]
    assert measured["probe/pope/f1"] == rows(run / "stage_2" / "probe.csv")[-1]["probe/pope/f1"]


def test_a_stage_is_copied_only_if_the_same_was_measured(world, watched):
    overrides, run = watched
    for name, more, copied in (("again", [], True), ("otherwise", ["callbacks.probe.every=5"], False)):
        other = world / "out" / name
        assert finish([*overrides, *more], other, at_step(2, 1, signal.SIGTERM)) == (0 if copied else 143)
        assert ("stage 2 was computed already" in other.with_suffix(".log").read_text()) == copied
    for file in ("metrics.csv", "validation.csv", "probe.csv"):
        assert (world / "out" / "again" / "stage_2" / file).read_text() == (run / "stage_2" / file).read_text()


def test_a_run_that_is_killed_validates_and_probes_at_the_same_steps(world, watched):
    """Checkpoints every two steps and validation every three: step 6 has both, and a kill there loses neither."""
    overrides, run = watched
    again = [*overrides, "resume=true", f"outputs={world}/apart"]
    folder, log = world / "killed", world / "killed.log"
    for step, number, status in ((6, signal.SIGTERM, 143), (9, signal.SIGKILL, -9), (10, signal.SIGTERM, 143)):
        assert finish(again, folder, at_step(2, step, number)) == status, log.read_text()
    assert finish(again, folder) == 0, log.read_text()
    assert "stopped: SIGTERM: saved after step 6" in log.read_text()
    assert outcome(folder) == outcome(run)
    for file in ("stage_2/validation.csv", "stage_2/probe.csv"):
        assert (folder / file).read_text() == (run / file).read_text()
    notes = [json.loads((each / "stage_2" / "stage.json").read_text()) for each in (folder, run)]
    assert notes[0]["measured"] == notes[1]["measured"]


# --- validation ------------------------------------------------------------------------------------------------------


def test_no_picture_is_on_both_sides_whatever_the_names_and_the_order(tmp_path):
    """Twelve records on six pictures, each picture twice under two names; a share of a third is two pictures."""
    records = [
        tiny.triple(f"{seed}{name}", tiny.picture(tmp_path, f"{name}{seed}", seed), ("What is it", "A dog", "A cat"))
        for name in "ab"
        for seed in range(6)
    ]
    kept, held = hold_out(records, 1 / 3)
    assert len(held) == 4 and len(kept) == 8
    assert not {triple.id[0] for triple in kept} & {triple.id[0] for triple in held}
    assert [triple.id for triple in records if triple in held] == [triple.id for triple in held], "in their order"
    for again in (records[::-1], records[6:]):
        assert {triple.id for triple in hold_out(again, 1 / 3)[1]} == {t.id for t in held} & {t.id for t in again}
    for share, side in ((0.01, "for validation"), (0.99, "to train on")):
        with pytest.raises(Fault, match=rf"a share of {share} of 6 pictures leaves no record {side}"):
            hold_out(records, share)


def test_pictures_that_stand_together_are_held_out_together(tmp_path):
    """Of six records, 0, 1 and 2 are linked through the pictures of 1; two without a picture ask the same question."""
    files = [tiny.picture(tmp_path, str(seed), seed) for seed in range(4)]
    images = [files[0], (files[0], files[1]), (files[2], files[1]), files[3], None, None]
    records = [tiny.triple(str(i), image, ("What is it", "A dog", "A cat")) for i, image in enumerate(images)]
    for share in (1 / 3, 2 / 3):
        for order in (records, records[::-1]):
            kept, held = hold_out(order, share)
            assert not picture_on_both_sides(kept, held)
            sides = {triple.id: side for side, part in enumerate((kept, held)) for triple in part}
            assert sides["0"] == sides["1"] == sides["2"] and sides["4"] == sides["5"]
            assert len({sides["0"], sides["3"], sides["4"]}) == 2
    assert picture_on_both_sides(records[:2], records[2:]) == (records[2], records[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_held_out_record_is_asked_once_and_all_devices_have_as_many_batches(batch_size, world_size):
    for records in (*range(world_size, 30), 101):
        lengths = [(7 * i) % 11 for i in range(records)]
        parts = [even_batches(lengths, batch_size, rank=rank, world=world_size) for rank in range(world_size)]
        assert sorted(i for part in parts for batch in part for i in batch) == list(range(records))
        assert len({len(part) for part in parts}) == 1
        sizes = [len(batch) for part in parts for batch in part]
        assert min(sizes) >= 1 and max(sizes) <= max(batch_size, 2 * (world_size > 1))
    with pytest.raises(Fault, match="0 held-out records cannot be divided"):
        even_batches([], batch_size, world=world_size)


def test_validation_logs_the_means_over_the_held_out_records(tmp_path):
    """Against each record by itself, under the final weights, with the noise of epoch 0."""
    folder = tiny.save_tiny_llava(tmp_path / "model")
    policy, template = tiny.load(folder)
    stage, objective = tiny.stage("text", "noise"), POVID()
    terms = objective.terms({"text", "noise"})
    module = tiny.module(policy, objective, stage, terms)
    records = tiny.triples(tmp_path)
    data = PreferenceDataModule(
        records[:2],
        template,
        terms=terms,
        distortion=tiny.noise(),
        packable=True,
        batch_size=2,
        seed=0,
        held_out=records[1:],
    )
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, data)
    policy.eval()
    with torch.no_grad():
        single = [module.measured(data.collate([data.held_out[i, 0]]))[2] for i in range(3)]
    logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert {"val/loss", "val/rewards/accuracies", "val/rewards/margins_noise", "val/kl"} <= logged.keys()
    assert {name.removeprefix("val/") for name in logged} == single[0].keys()
    for name, value in logged.items():
        mean = sum(float(each[name.removeprefix("val/")]) for each in single) / 3
        assert float(value) == pytest.approx(mean, rel=1e-4, abs=1e-5), name


# --- the probe -------------------------------------------------------------------------------------------------------


def test_repetition_and_evasion_are_counted():
    """Of "a b c d a b c d", five sequences of four words, the last is the first again: 20 %; "a b c" has none."""
    assert repeat_rate(["a b c d A b c d", "a b c"]) == pytest.approx(10)
    assert repeat_rate(["in this this this this this"]) == pytest.approx(100 / 3)
    assert neither_rate(["Yes", "no, it is not", "Nobody knows", ""]) == 50
    assert repeat_rate([]) == neither_rate([]) == 0


# --- the best adapter ------------------------------------------------------------------------------------------------


class Scripted(Watcher):
    """Says what a test gives it, step by step."""

    def __init__(self, better: dict[str, str | None], script: dict[int, dict[str, float]]) -> None:
        self.better, self.script = better, script

    @property
    def metrics(self):
        return self.better

    def measure(self, trainer, module):
        self.latest = trainer.global_step, self.script[trainer.global_step]


class FakePolicy:
    model = SimpleNamespace(state_dict=dict)

    def save_adapter(self, folder: Path, weights: object) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text("")


def choose(folder: Path, losses: dict[int, float], coverages: dict[int, float], **changes) -> BestAdapter:
    settings = CheckpointSettings(best="val/loss", guard="coverage", **changes)
    validation = Scripted({"val/loss": "low"}, {step: {"val/loss": value} for step, value in losses.items()})
    probe = Scripted({"coverage": None}, {step: {"coverage": value} for step, value in coverages.items()})
    best, module = BestAdapter(folder, settings, [validation, probe]), SimpleNamespace(policy=FakePolicy())
    trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    probe.measure(trainer, module)
    best.on_fit_start(trainer, module)
    for step in losses:
        trainer.global_step = step
        best.on_train_batch_start(trainer, module)
        validation.measure(trainer, module)
        best.on_validation_end(trainer, module)
        best.on_validation_end(trainer, module)
        best.state_dict()
    return best


def test_the_best_adapter_is_kept_unless_it_lost_coverage(tmp_path):
    """Step 3 has the lowest loss and 69.9 of 80 points of coverage; step 2 has 70. NaN is no candidate."""
    losses = {1: 0.6, 2: 0.5, 3: 0.1, 4: 0.55, 5: float("nan")}
    best = choose(tmp_path / "best", losses, {0: 80.0, 1: 80.0, 2: 70.0, 3: 69.9})
    assert best.kept["step"] == 2 and best.refused == 1
    assert best.adapter == tmp_path / "best" / "step_00000002" and best.adapter.is_dir()
    assert best.record() == {
        "metric": "val/loss",
        "adapter": "best",
        "step": 2,
        "value": 0.5,
        "guard": "coverage",
        "start": 80.0,
        "max_fall": 10.0,
    }
    assert best.kept["measured"] == {"val/loss": 0.5, "coverage": 70.0}


def test_without_an_adapter_that_may_be_kept_the_last_one_goes_on_and_says_so(tmp_path, caplog):
    best = choose(tmp_path / "best", {1: 0.6, 2: 0.5}, {0: 80.0, 1: 10.0, 2: 10.0})
    record = best.record()
    assert best.adapter is None and record["adapter"] == "last"
    assert "coverage was more than 10 below its start, 80.0, at every step" in record["reason"]
    assert record["reason"] in caplog.text


def test_adapters_that_no_checkpoint_names_are_removed(tmp_path):
    """Two checkpoints are kept, and one more may be half written."""
    steps = range(1, 7)
    best = choose(tmp_path / "best", {n: 1 / n for n in steps}, dict.fromkeys((0, *steps), 80.0), keep=2)
    assert sorted(place.name for place in (tmp_path / "best").iterdir()) == [f"step_0000000{n}" for n in (3, 4, 5, 6)]
    resumed = BestAdapter(tmp_path / "best", best.settings, best.watchers)
    resumed.load_state_dict(best.state_dict())
    resumed.on_fit_start(SimpleNamespace(is_global_zero=True), None)
    assert resumed.adapter == best.adapter and resumed.adapter.exists()


def test_a_best_adapter_that_was_changed_or_removed_is_not_handed_on(tmp_path):
    best = choose(tmp_path / "best", {1: 0.6, 2: 0.7}, {0: 80.0, 1: 80.0})
    resumed = BestAdapter(tmp_path / "best", best.settings, best.watchers)
    resumed.load_state_dict(best.state_dict())
    (best.adapter / "adapter_model.safetensors").write_text("another's")
    with pytest.raises(Fault, match="step_00000001, the best adapter so far, was changed since the last checkpoint"):
        resumed.load_state_dict(best.state_dict())
    shutil.rmtree(best.adapter)
    with pytest.raises(Fault, match="step_00000001, the best adapter so far, is missing"):
        resumed.load_state_dict(best.state_dict())


def test_a_run_goes_on_with_its_best_adapter_and_train_py_returns_its_score(world, tmp_path):
    """Ten steps, measured after the fourth and the eighth."""
    returned = tmp_path / "returned"

    def note() -> None:
        def on_job_end(self, config, job_return, **_):
            returned.write_text(json.dumps(job_return.return_value))

        TableAfterSweep.on_job_end = on_job_end

    status, printed = train(
        *command(
            world,
            f"outputs={tmp_path}",
            f"hydra.run.dir={tmp_path}/run",
            f"data.validation={world}/data/held_out.json",
            "trainer.val_check_interval=4",
            "checkpoint.best=val/loss",
            "checkpoint.guard=null",
            "stages.2.lr=0.1",
            "optimized_metric=[pope.f1,val/loss]",
        ),
        log=tmp_path / "log",
        sabotage=note,
    )
    assert status == 0, printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    home, kept = tmp_path / "run" / "stage_2", results["stages"]["2"]["kept"]
    losses = {int(row["steps"]): row["val/loss"] for row in rows(home / "validation.csv")}
    step = min(losses, key=losses.get)
    assert sorted(losses) == [4, 8] and losses[4] != losses[8]
    assert kept == {"metric": "val/loss", "adapter": "best", "step": step, "value": losses[step]}
    assert adapter_digest(home / "adapter") == results["stages"]["2"]["adapter_digest"]
    assert adapter_digest(home / "adapter") != adapter_digest(home / "last_adapter")
    assert not (home / "best").exists()
    assert json.loads(returned.read_text()) == [results["benchmarks"]["pope"]["f1"], losses[step]]
    assert results["identity"]["parts"]["checkpoint.best"] == "val/loss"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["data.validation=0"], "data.validation: found 0, needed a share above 0 and below 1, a file, or null"),
        (["data.validation=1"], "data.validation: found 1, needed a share above 0 and below 1"),
        (["data.validation=true"], "data.validation: found True"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval: found 0"),
        (
            ["checkpoint.best=val/loss"],
            "checkpoint.best: nothing logs 'val/loss' in stage 2; set data.validation for val/...",
        ),
        (
            ["checkpoint.best=val/los", "data.validation=0.2", "checkpoint.guard=null"],
            "nothing logs 'val/los' in stage 2; did you mean 'val/loss'?",
        ),
        (
            ["checkpoint.best=probe/chair/words", "callbacks=[probe]"],
            "one direction is not better than the other; choose one of probe/chair/CHAIR_S, probe/chair/CHAIR_I,",
        ),
        (
            ["checkpoint.best=val/loss", "data.validation=0.2"],
            "checkpoint.guard: nothing logs 'probe/chair/coverage' in stage 2; add callbacks=[probe]",
        ),
        (["optimized_metric=chair.CHAIR_I"], "results will not hold 'chair.CHAIR_I'"),
        (["optimized_metric=val/loss"], "results will not hold 'val/loss'"),
        (["callbacks=[probe]", "callbacks.probe.captions=null", "callbacks.probe.questions=null"], "are both null"),
        (["callbacks=[probe]", "callbacks.probe.every=0"], "callbacks.probe.every: found 0, needed"),
        (["callbacks=[probe]", "trainer=fsdp2"], "callbacks.probe: it needs the whole model on one device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_do_not_go_together(arguments, part, world):
    with pytest.raises(Fault) as refused:
        build(composed(*command(world, *arguments)))
    assert part in str(refused.value)


def test_held_out_files_that_cannot_be_used(world, tmp_path):
    def divided(*more: str):
        made = build(composed(*command(world, *more)))
        return split(made, load_triples(made))

    with pytest.raises(Fault, match=r"data\.validation: .*/nowhere\.json does not exist; name a file"):
        divided(f"data.validation={tmp_path}/nowhere.json")
    records = json.loads((world / "data" / "preferences.json").read_text())
    (tmp_path / "both.json").write_text(json.dumps([records[4] | {"id": "again"}]))
    with pytest.raises(
        Fault, match=f"the picture of record 'again' in .*both.json is also that of record '{records[4]['id']}'"
    ):
        divided(f"data.validation={tmp_path}/both.json")
    kept, held = divided("data.validation=0.3")
    assert (len(kept), len(held)) == (6, 3)


def test_a_probe_without_its_files_is_refused_before_anything_loads(world, tmp_path):
    shutil.copytree(world / "data" / "tuning", tmp_path / "probe")
    (tmp_path / "probe" / "synonyms.txt").unlink()
    overrides = command(world, *PROBE, f"data.probe={tmp_path}/probe")
    assert finish(overrides, tmp_path / "run") == 2
    log = (tmp_path / "run.log").read_text()
    assert "error: callbacks.probe: " in log and "synonyms.txt" in log and "data.probe=FOLDER" in log
    assert not (tmp_path / "run").exists() and "Loading weights" not in log


def test_results_that_do_not_hold_the_optimized_metric():
    results = {"benchmarks": {"pope": {"f1": 80.0}, "mmhal": {"missing": "no judge"}}, "stages": {}}
    assert optimized(results, "pope.f1") == 80.0 and optimized(results, ["pope.f1"]) == [80.0]
    with pytest.raises(Fault, match="do not hold 'pope.f2'; did you mean 'pope.f1'"):
        optimized(results, "pope.f2")
    with pytest.raises(Fault, match="'mmhal.score', since it was not scored: no judge"):
        optimized(results, "mmhal.score")
