"""Every configuration in conf/ composes and binds, and each that fits the machine runs two steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from povid.fault import Fault
from povid.run.experiment import run
from povid.run.settings import check

CONF = Path(__file__).resolve().parents[2] / "conf"
COMMANDS = {"config", "dispreference"}  # files that are a command's whole configuration, not an option
GROUP_OF = {"stages": "stages@stages.1"}


def options() -> list[tuple[str, str]]:
    """(group, option) of every file, found by looking."""
    found = []
    for file in sorted(CONF.rglob("*.yaml")):
        group = file.parent.relative_to(CONF).as_posix()
        if group == ".":
            assert file.stem in COMMANDS, f"conf/{file.name} is neither a command's configuration nor in a group"
        elif group != "stages/for_model" and not file.stem.startswith("_"):  # composed together with others
            found.append((group, file.stem))
    return found


def skip_without_plugin(group: str, option: str) -> None:
    """Launchers are extras; an option of conf/launcher is named for its plugin, `slurm` is submitit's."""
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
    check(cfg)
    OmegaConf.to_yaml(cfg, resolve=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny random model, and a folder where the small world is painted once."""
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
    first = composed(override(group, option))
    if first.data.get("prepare") is None:
        pytest.skip("its data must be downloaded")
    if not (first.model.get("path", "").startswith("package:") or first.model.get("prepare")):
        pytest.skip("its weights must be downloaded, or somebody must serve it")
    needs_gpu = first.trainer.accelerator == "gpu" or first.trainer.devices != 1
    if needs_gpu and not torch.cuda.is_available():
        pytest.skip("it needs a GPU or several devices")
    cfg = composed(override(group, option), *small(world))
    results = run(cfg, tmp_path / "run")
    assert set(results["benchmarks"]) == set(cfg.benchmarks)
    assert [stage["steps"] for stage in results["stages"].values()] == [2] * len(cfg.ablation.stages)


def test_dispreferences_made_from_objects_are_a_row_of_their_own(world, tmp_path):
    """Written into results, and another stage for stage 2 to start from; ablation=noise reads none of them."""
    found = {}
    for kind in ("given", "cooccurrence"):
        cfg = composed(f"dispreference={kind}", "ablation=text", "benchmarks=[pope]", "data.limit=4", *small(world))
        results = run(cfg, tmp_path / kind)
        found[kind] = results["row"], results["dispreference"], results["stages"]["1"]["fingerprint"]
    assert found["given"][:2] == ("text", "given")
    assert found["cooccurrence"][:2] == ("text_cooccurrence", "cooccurrence")
    assert found["given"][2] != found["cooccurrence"][2]
    assert composed("dispreference=cooccurrence").row == "both_cooccurrence"
    assert check(composed("dispreference=cooccurrence", "ablation=noise")).dispreference == "given"
    assert composed("dispreference=cooccurrence", "ablation=noise").row == "noise"


def test_all_faults_are_told_at_once():
    cfg = composed("ablation=text", "noise.step=1000", "stages.1.lr=-1")
    OmegaConf.set_struct(cfg, False)
    cfg.stage = 2
    cfg.model.lora.rr = 8
    cfg.trainer.max_epoch = 3
    cfg.stages["1"].batch_size = "many"
    cfg.data.format = "povld"
    with pytest.raises(Fault) as fault:
        check(cfg)
    told = str(fault.value)
    for part in (
        "6 faults",
        "model.lora.rr: there is no such setting; did you mean 'r'?",
        "trainer.max_epoch: lightning.Trainer takes no such argument; did you mean 'max_epochs'?",
        "stages.1.batch_size: found 'many', needed a whole number",
        "stage: ablation 'text' has no stage 2",
        "noise.step: found 1000, needed 0 to 999",
        "data.format: found 'povld'",
    ):
        assert part in told, f"{part!r} is missing in:\n{told}"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stage=3"], "stage: found 3; it is 1, 2 or all"),
        (["stage=first"], "stage: found 'first'; it is 1, 2 or all"),
        (
            ["ablation=noise", "stage=1"],
            "ablation 'noise' has no stage 1 (it has 2); use ablation=text or ablation=both",
        ),
        (["ablation=none", "stage=1"], "ablation 'none' has no stage 1 (it has none: it is the base model)"),
        (["seed=-1"], "seed: found -1"),
        (["noise.space=latent"], "noise.space: found 'latent'; it is normalized or pixel"),
        (["noise.space=pixel", "noise.wrap_around=true"], "it needs noise.space=pixel and objective=released"),
        (["init_from=/nowhere"], "init_from: /nowhere does not exist"),
        (["dispreference=endpoint"], "dispreference: found 'endpoint'; it is given or cooccurrence"),
        (["dispreference=cooccurrence", "data=rlhf_v"], "data.objects: dispreference=cooccurrence needs to know which"),
        (
            ["dispreference=cooccurrence", "data=povid_17k", "data.objects=/no.json"],
            "data.objects: /no.json does not exist",
        ),
        (["stages.2.epochs=0"], "epochs is 0 and max_steps -1"),
        (["model.style=llama"], "model.style: found 'llama'; Input should be 'vicuna_v1', 'chat' or 'bare'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_named_with_their_cure(overrides, sentence):
    with pytest.raises(Fault, match=r"the configuration has") as fault:
        check(composed(*overrides))
    assert sentence in str(fault.value)


def test_the_trainers_batch_size_speaks_for_every_stage():
    for value in (7, "auto"):
        checked = check(composed(f"trainer.batch_size={value}"))
        assert [stage.batch_size for stage in checked.stages.values()] == [value, value]
        assert "batch_size" not in checked.trainer
    with pytest.raises(Fault, match="stages.1.batch_size: found 'most', needed a whole number or auto"):
        check(composed("trainer.batch_size=most"))


def test_the_papers_values_stand_in_the_configuration():
    """Table 5 and section 4.1."""
    cfg = composed("experiment=table3")
    assert (cfg.model.lora.r, cfg.model.lora.alpha, cfg.model.max_length) == (128, 256, 1024)
    for number, epochs in (("1", 3), ("2", 1)):
        stage = cfg.stages[number]
        assert (stage.lr, stage.projector_lr, stage.batch_size, stage.epochs) == (1e-7, 2e-5, 1, epochs)
    assert cfg.noise.step == 500
    assert set(cfg.benchmarks) == {"chair", "pope", "mmhal", "science_qa", "mme", "mmbench", "mm_vet", "llava_bench"}
