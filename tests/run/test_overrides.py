"""Whatever is put on the command line: a sentence, or a run that means something; never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from forks import settings, train
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from povid.fault import Fault
from povid.run.overrides import explain
from povid.run.settings import build, check_devices

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def answer(*overrides: str) -> str:
    """The sentence with which a command line is refused before anything is made; "" for one that would run."""
    try:
        cfg = composed(*overrides)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        return explain(error, overrides)
    try:
        check_devices(build(cfg))
    except Fault as fault:
        return str(fault)
    return ""


def test_nonsense_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    if not torch.cuda.is_available():
        assert "99 processes would share the" in answer("trainer.devices=99")
        assert "No supported gpu backend" in answer("trainer=gpu")
    for override, sentence in (
        ("trainer.accelerator=quantum", "trainer.accelerator: there is no accelerator 'quantum'"),
        ("trainer.strategy=dpd", "trainer.strategy: there is no strategy 'dpd'; did you mean 'ddp'?"),
        ("trainer.devices=0", "trainer.devices: found 0, needed a number of devices"),
        ("trainer.devices=-3", "trainer.devices: found -3"),
        ("trainer.devices=a", "trainer.devices: found 'a'"),
        ("trainer.num_nodes=0", "trainer.num_nodes: found 0, needed at least 1"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps: found 0, needed at least 1"),
        ("+trainer.profiler=foo", "trainer: "),
        ("+trainer.limit_train_batches=0", "trainer.limit_train_batches: found 0"),
        ("+trainer.limit_train_batches=-1", "trainer.limit_train_batches: found -1"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run: the run sets this itself; use data.limit"),
        (
            "logger.wandb.mode=sometimes",
            "logger.wandb.mode: found 'sometimes', needed auto, online, offline or disabled",
        ),
        ("logger.wandb.mode=online", "logger.wandb.mode: online needs a login"),
        ("noise.scheduler.beta_start=-1", "noise.scheduler: its betas must be at least 0 and less than 1"),
        ("noise.scheduler.beta_end=2", "noise.scheduler: its betas must be at least 0 and less than 1"),
        ("stages.1.lr=1e10", "stages.1.lr: found 10000000000.0, needed at most 1"),
        ("stages.1.max_steps=0", "stages.1: max_steps is 0, which trains nothing"),
        ("benchmarks.chair.prompt=''", "benchmarks.chair.prompt: found '', needed text"),
        ("objective.1=null", "objective.1: found None, needed a _target_"),
        ("data.prepare.preferences=-1", "data.prepare.preferences: found -1, needed at least 0"),
        ("data.split=foo", "data.split: found 'foo', needed evaluation or tuning"),
        ("row=''", "row: found '', needed text"),
        ("row=a/b", "row: found 'a/b', needed text without /"),
        ("outputs=''", "outputs: found '', needed text"),
        ("+optimizer.lr=1", "optimizer.lr: the run sets this itself"),
        ("+optimizer.eps=-1", "optimizer: Invalid epsilon value"),
        ("schedule.name=foo", "schedule: foo is not a valid SchedulerType"),
        ("model._target_=povid.model.loading", "model._target_: 'povid.model.loading' cannot be imported"),
        ("model.attention=foo", "model.attention: found 'foo'"),
        ("ablation.stages=[2,1]", "ablation: stages: found [2, 1], needed each stage once and in order"),
        ("ablation.stages=[]", "without stages there are none"),
        ("+callbacks.x={_target_: os.getcwd}", "callbacks.x._target_: found 'os.getcwd', needed a Callback"),
        ("+logger.x={_target_: os.getcwd}", "logger.x._target_: found 'os.getcwd', needed a Logger"),
        ("data.format._target_=os.getcwd", "data.format._target_: 'os.getcwd' does not take preferences"),
        ("+data.objects2=http://a:b@c", "data.objects2: the address holds a user name or password"),
        ("benchmarks=null", "benchmarks=null: benchmarks is chosen by name, of amber, chair, llava_bench"),
        ("data=null", "data=null: data is chosen by name, of human_preference"),
        ("ablatoin=none", "Could not override 'ablatoin': there is no such setting; did you mean 'ablation'?"),
        ("stages.1.lrr=1", "Could not override 'stages.1.lrr': there is no such setting; did you mean 'lr'?"),
        (
            "benchmarks=[popee]",
            "Available options in 'benchmarks': amber chair llava_bench mm_vet mmbench mme",
        ),
        ("model=scenes_tinny", "did you mean 'scenes_tiny'?"),
        ("data.folder=/data/ä b", "quotes for the shell and for Hydra: 'data.folder=\"/data/ä b\"'"),
        ("b", "'b' cannot be read as KEY=VALUE; a value with spaces"),
    ):
        found = answer(override)
        assert sentence in found, f"{override}: {found or 'accepted'}"
        assert "use +" not in found and "a:b@" not in found, found
    for override in ("data.folder='/data/ä b'", "+trainer.limit_train_batches=3", "optimizer._target_=torch.optim.SGD"):
        assert answer(override) == ""


LINES = """
+foo=1
objective.1.alpha=-1
model.lora.alpha=0
stages.1.epochs=0 stages.1.max_steps=-1
data.limit=-5
+trainer.limit_train_batches=0
benchmarks=[popee]
stages/for_model=foo
adapters=[/nowhere]
+hydra.callbacks.x={_target_:nowhere.X}
--config-dir=/nowhere
hydra.run.dir=/proc/x
trainer=ddp trainer.accelerator=cpu trainer.devices=2,3
a=b=c
"""


@pytest.mark.slow
def test_real_command_lines_that_mean_nothing(tmp_path):
    """Exit status 2, a sentence, no traceback, and no folder of a run."""
    tiny.save_tiny_llava(tmp_path / "tiny")
    for line in LINES.strip().splitlines():
        status, printed = train(*settings(tmp_path), *line.split(), log=tmp_path / "log")
        assert status == 2 and printed.count("error: ") == 1 and "Traceback" not in printed, f"{line}: {printed}"
        assert not list(tmp_path.glob("out/runs/*")), line


VALUES = (
    "-1 0 1 2 0.5 -0.5 1e30 .nan .inf -.inf null true false abc '' [] [1] [abc] {} {a:1} ??? ${seed} ${nothing} "
    "99999999999999999999 '../x' ä {_target_:os.getcwd} {_target_:nowhere.X} {_target_:3}"
).split(" ")


def keys(tree, prefix="") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += keys(value, f"{prefix}{key}.")
    return found


@pytest.mark.slow
def test_three_hundred_random_overrides():
    """Each is refused with a sentence or gives settings; none ends in a traceback."""
    draw = random.Random(11)
    known = keys(OmegaConf.to_container(composed("logger=[wandb,csv]", "callbacks=[learning_rate]")))
    refused = 0
    for _ in range(300):
        key = draw.choice(known)
        form = draw.random()
        if form < 0.1:
            key = "+" + key + draw.choice([".foo", "x", ".1"])
        elif form < 0.2:
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice("abc_.") + key[at + 1 :]
        override = f"{key}={draw.choice(VALUES)}"
        try:
            said = answer(override)
        except Exception as error:
            raise AssertionError(f"{override} ends in {type(error).__name__}: {error}") from error
        refused += bool(said)
        if said:
            assert "use +" not in said, f"{override}: {said}"
    assert 150 < refused < 300
