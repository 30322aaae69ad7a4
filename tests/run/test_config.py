"""Every configuration in conf/ composes and binds, and each that fits the machine runs two steps."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from povid.fault import Fault
from povid.run.experiment import run
from povid.run.identity import flat
from povid.run.settings import build

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMANDS = {"config", "dispreference", "arena"}  # files that are a command's whole configuration, not an option
GENERATORS = {"endpoint", "on_policy", "on_policy_judged"}  # they write a file first
GROUP_OF = {"stages": "stages@stages.1"}


def options() -> list[tuple[str, str]]:
    """(group, option) of every file in conf/."""
    found = []
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group == ".":
            assert file.stem in COMMANDS, f"conf/{file.name} is neither a command's configuration nor in a group"
        elif group != "stages/for_model" and not file.stem.startswith("_"):  # composed together with others
            found.append((group, file.stem))
    return found


def skip_without_plugin(group: str, option: str) -> None:
    """Launchers, sweeps and some loggers are extras; a launcher is named for its plugin, and `slurm` is submitit's."""
    if group == "logger" and option in ("tensorboard", "mlflow"):
        pytest.importorskip(option)
    if group == "generation.engine":
        pytest.importorskip(option)
    if group == "sweep":
        pytest.importorskip(f"hydra_plugins.hydra_{option}_sweeper")
    plugin = {"basic": None, "slurm": "submitit", "submitit_local": "submitit"}.get(option, option)
    if group != "launcher" or plugin is None:
        return
    if (
        importlib.util.find_spec("hydra_plugins") is None
        or importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None
    ):
        pytest.skip(f"hydra-{plugin}-launcher is not installed")


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def override(group: str, option: str) -> str:
    return f"{GROUP_OF.get(group, group)}={[option] if group == 'benchmarks' else option}".replace("'", "")


@pytest.mark.parametrize(("group", "option"), options(), ids=str)
def test_every_configuration_composes_and_binds(group, option):
    skip_without_plugin(group, option)
    cfg = composed(override(group, option))
    if group == "dispreference" and option in GENERATORS:
        with pytest.raises(Fault, match=r"writes its responses to a file first, by python -m povid\.dispreference"):
            build(cfg)
        return
    build(cfg)
    OmegaConf.to_yaml(cfg, resolve=True)


def test_released_differs_from_the_paper_where_the_released_code_does():
    """Its scripts train with DeepSpeed's zero2.json, which sets no gradient_clipping, so that gradients are not clipped
    (Table 5 is silent, and the default of the paper's trainer is 1); LLaVA's length; no dropout; no projector."""
    paper, released = (
        dict(flat(build(composed("model=llava_1_5_7b", *chosen)).tree)) for chosen in ([], ["experiment=released"])
    )
    differing = {key: released.get(key) for key in {*paper, *released} if paper.get(key) != released.get(key)}
    assert {key: value for key, value in differing.items() if not key.startswith("objective.")} == {
        "model.train_projector": False,
        "model.max_length": 1048,
        "model.lora.dropout": 0.0,
        "stages.1.max_grad_norm": 0.0,
        "stages.2.max_grad_norm": 0.0,
        "noise.space": "pixel",
        "noise.wrap_around": True,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random model, and a folder in which a small world is painted once."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


def small(world: Path) -> list[str]:
    return [
        f"outputs={world}/out",
        f"model.path={world}/tiny",
        "model.dtype=float32",
        "model.max_length=400",
        "data.prepare.preferences=8",
        "data.prepare.evaluation=3",
        "data.prepare.tuning=2",
        "samples=1",
        "stages.1.max_steps=2",
        "stages.2.max_steps=2",
        "stages.1.batch_size=2",
        "stages.2.batch_size=2",
    ]


@pytest.mark.parametrize(("group", "option"), options(), ids=str)
def test_every_configuration_that_fits_runs_two_steps(group, option, world, tmp_path):
    skip_without_plugin(group, option)
    if group == "dispreference" and option in GENERATORS:
        pytest.skip("it belongs to python -m povid.dispreference")
    first = composed(override(group, option))
    if first.data.get("prepare") is None:
        pytest.skip("its data must be downloaded")
    if not (first.model.get("path", "").startswith("package:") or first.model.get("prepare")):
        pytest.skip("its weights must be downloaded, or somebody must serve it")
    needs_gpu = first.trainer.accelerator == "gpu" or first.trainer.devices != 1
    if needs_gpu and not torch.cuda.is_available():
        pytest.skip("it needs a GPU or several devices")
    # What is learned is over after two steps; the other groups show what comes after.
    quick = ["benchmarks=[]", "samples=0", "logger=none"] if group in ("objective", "noise") else []
    cfg = composed(override(group, option), *small(world), *quick)
    results = run(cfg, tmp_path / "run")
    assert set(results["benchmarks"]) == set(cfg.get("benchmarks") or ()) - {"limit"}
    assert [stage["steps"] for stage in results["stages"].values()] == [2] * len(cfg.ablation.stages)


def test_dispreferences_made_from_objects_are_a_separate_row(world, tmp_path):
    """Written into results, and another stage for stage 2 to start from; ablation=noise reads none of them."""
    found = {}
    for kind in ("given", "cooccurrence"):
        cfg = composed(f"dispreference={kind}", "ablation=text", "benchmarks=[pope]", "data.limit=4", *small(world))
        results = run(cfg, tmp_path / kind)
        found[kind] = results["row"], results["dispreference"], results["stages"]["1"]["identity"]["digest"]
    assert found["given"][:2] == ("text", "given")
    assert found["cooccurrence"][:2] == ("text_cooccurrence", "cooccurrence")
    assert found["given"][2] != found["cooccurrence"][2]
    assert composed("dispreference=cooccurrence").row == "both_cooccurrence"
    assert build(composed("dispreference=cooccurrence", "ablation=noise")).dispreference_name == "given"
    assert composed("dispreference=cooccurrence", "ablation=noise").row == "noise"


def test_all_problems_are_reported_at_once():
    cfg = composed("ablation=text", "noise.step=1000", "stages.1.lr=-1")
    OmegaConf.set_struct(cfg, False)
    cfg.stage = 2
    cfg.ablatoin = "none"
    cfg.model.lora.rr = 8
    cfg.trainer.max_epoch = 3
    cfg.trainer.callbacks = []
    cfg.stages["1"].batch_size = "many"
    cfg.data.format = "povld"
    cfg.noise.scheduler.beta_stat = 1
    cfg.benchmarks.chair.temperature = ".nan"
    cfg.logger.wandb.projcet = "mine"
    cfg.objective["1"].alpha = True
    with pytest.raises(Fault) as fault:
        build(cfg)
    report = str(fault.value)
    for part in (
        "ablatoin: there is no such setting; did you mean 'ablation'?",
        "model.lora.rr: povid.model.loading.LocalModel takes no such argument; did you mean 'r'?",
        "trainer.max_epoch: lightning.Trainer takes no such argument; did you mean 'max_epochs'?",
        "trainer.callbacks: the run sets this itself; use the group callbacks",
        "stages.1.batch_size: found 'many', needed a whole number or auto",
        "stages.1.lr: found -1, needed more than 0",
        "stage: ablation 'text' has no stage 2",
        "data.format: found 'povld', needed a mapping",
        "noise.scheduler.beta_stat: diffusers.DDPMScheduler takes no such argument; did you mean 'beta_start'?",
        "benchmarks.chair.temperature: found '.nan', needed a number",
        "logger.wandb.projcet: povid.run.wandb_run.wandb_logger takes no such argument; did you mean 'project'?",
        "objective.1.alpha: found True, needed a number",
    ):
        assert part in report, f"{part!r} is missing in:\n{report}"
    assert "the configuration has 12 problems" in report


def test_invalid_values_are_reported_with_a_fix(tmp_path):
    for overrides, sentence in (
        (["stage=3"], "stage: found 3, needed 1, 2 or all"),
        (["stage=first"], "stage: found 'first', needed 1, 2 or all"),
        (["stage=true"], "stage: found True, needed"),
        (["ablation=noise", "stage=1"], "ablation 'noise' has no stage 1 (it has 2); use ablation=text or"),
        (["ablation=none", "stage=1"], "ablation 'none' has no stage 1 (it has none: it is the base model)"),
        (["seed=-1"], "seed: found -1, needed at least 0"),
        (["noise.step=1000"], "noise.step: found 1000; the scheduler has steps 0 to 999"),
        (["noise.space=latent"], "noise.space: found 'latent', needed normalized or pixel"),
        (["noise.space=pixel", "noise.wrap_around=true"], "it needs objective=released"),
        (["init_from=/nowhere"], "init_from: /nowhere does not exist"),
        (["stages.2.epochs=0"], "epochs is 0 and max_steps -1"),
        (["model.style=llama"], "model.style: found 'llama', needed vicuna_v1, chat or bare"),
        (["data.limit=-5"], "data.limit: found -5, needed at least 1"),
        (["benchmarks.limit=0"], "benchmarks.limit: found 0, needed at least 1"),
        (["objective.2.alpha=-1"], "objective.2.alpha: found -1, needed more than 0"),
        (["ablation=noise", "objective.2._target_=povid.method.objectives.dpo.DPO", "~objective.2.beta_text",
          "~objective.2.beta_noise", "~objective.2.differing_only"],
         "objective: DPO needs text dispreferences, and this stage has noise"),
        (["optimizer._target_=torch.optim.Adamw"], "optimizer._target_: 'torch.optim.Adamw' cannot be imported"),
        (["+callbacks.x={_target_: nowhere.Callback}"], "callbacks.x._target_: 'nowhere.Callback' cannot be imported"),
        (["+trainer.logger=true"], "trainer.logger: the run sets this itself; use the group logger"),
        (["+trainer.limit_train_batch=0"], "did you mean 'limit_train_batches'?"),
    ):  # fmt: skip
        with pytest.raises(Fault) as fault:
            build(composed(*overrides))
        assert sentence in str(fault.value), f"{overrides}: {fault.value}"


def test_a_file_of_preferences_is_found_where_it_lies(tmp_path, monkeypatch):
    """Beside the pictures, in the current folder, or at an absolute path; where a release lies if it is nowhere."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "out.json").write_text("[]")
    monkeypatch.chdir(tmp_path)

    def meant(file: str) -> str:
        settings = build(composed("data=povid_17k", "data.root=pictures", f"data.file={file}"))
        assert settings.tree["data"]["preferences"] == settings.data.preferences
        return settings.data.preferences

    assert meant("out.json") == "out.json" and meant("none.json") == "pictures/none.json"
    assert meant(str(tmp_path / "out.json")) == str(tmp_path / "out.json")
    (tmp_path / "pictures" / "out.json").write_text("[]")
    assert meant("out.json") == "pictures/out.json"


def test_the_trainers_batch_size_sets_every_stages():
    for value in (7, "auto"):
        checked = build(composed(f"trainer.batch_size={value}"))
        assert [stage.batch_size for stage in checked.stages.values()] == [value, value]
        assert "batch_size" not in checked.trainer
    with pytest.raises(Fault, match=r"stages\.1\.batch_size: found 'most', needed a whole number or auto"):
        build(composed("trainer.batch_size=most"))


def test_the_limit_is_that_of_every_benchmark_without_its_own():
    found = build(composed("benchmarks.limit=20", "+benchmarks.pope.limit=5")).benchmarks
    assert {name: one.limit for name, one in found.items()} == {"chair": 20, "pope": 5}
    assert {one.limit for one in build(composed()).benchmarks.values()} == {None}


def test_the_released_codes_values_stand_in_the_configuration():
    """Its trainer turns dropout off and clips no gradient, whatever the model's own file says."""
    for model in ("scenes_tiny", "llava_1_5_7b"):
        checked = build(composed("experiment=released", f"model={model}", "model.path=x"))
        assert checked.model.lora.dropout == 0.0 and checked.model.max_length == 1048
        assert [stage.max_grad_norm for stage in checked.stages.values()] == [0.0, 0.0]
    assert build(composed("model.merge=float16")).model.merge == "float16"
    with pytest.raises(Fault, match="merge and quantize exclude each other"):
        build(composed("model.merge=float16", "model.quantize=4bit"))


def test_the_papers_values_stand_in_the_configuration():
    """Table 5 and section 4.1."""
    cfg = composed("experiment=table3")
    assert (cfg.model.lora.r, cfg.model.lora.alpha, cfg.model.max_length) == (128, 256, 1024)
    for number, epochs in (("1", 3), ("2", 1)):
        stage = cfg.stages[number]
        assert (stage.lr, stage.projector_lr, stage.batch_size, stage.epochs) == (1e-7, 2e-5, 1, epochs)
    assert cfg.noise.step == 500
    benchmarks = {"chair", "pope", "mmhal", "science_qa", "mme", "mmbench", "mm_vet", "llava_bench"}
    assert set(cfg.benchmarks) - {"limit"} == benchmarks


def test_the_sweep_that_wandb_steers_gives_overrides_that_bind():
    """What ``wandb agent`` makes of the file: one override for each parameter, here with its first value."""
    file = CONF.parent / "examples" / "sweeps" / "wandb.yaml"
    sweep = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    first = {name: p.get("value", p.get("min", p.get("values", [None])[0])) for name, p in sweep["parameters"].items()}
    settings = build(composed(*(f"{name}={value}" for name, value in first.items())))
    assert settings.stages[1].lr == first["stages.1.lr"] and settings.checkpoint.best == first["checkpoint.best"]
    assert (CONF.parent / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
    assert sweep["metric"]["name"] == "eval/chair/CHAIR_I"
    build(composed("optimized_metric=[chair.CHAIR_I,chair.coverage]"))


def test_the_sweep_that_optuna_steers_tries_settings_that_bind():
    """Without the plugin: the file's own overrides, each at the lower end of its interval."""
    sweep = OmegaConf.load(CONF / "sweep" / "optuna.yaml")
    tried = {key: re.search(r"interval\(([^,]+),", value)[1] for key, value in sweep.hydra.sweeper.params.items()}
    settings = build(
        composed(
            *(f"{key}={low}" for key, low in tried.items()),
            f"optimized_metric={list(sweep.optimized_metric)}".replace("'", ""),
            f"data.split={sweep.data.split}",
        )
    )
    assert settings.stages[1].lr == 1e-4 and len(settings.plain.optimized_metric) == len(sweep.hydra.sweeper.direction)
