"""What a run prints: nothing but its own lines, in a file and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import runpy
import signal
import struct
import sys
import termios
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import tiny
from forks import TRAIN, at_step, settings, train
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from povid.run import quiet, terminal


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    tiny.save_tiny_llava(folder / "tiny")
    return folder


OURS = (
    r"job 1 of 1: text, seed 0, in ",
    r"resume=latest: ",
    r"stage 1 of text, seed 0$",
    r"  (objective|model|data|device|memory) +\S",
    r"checked all 9 records",
    r"stage 1 resumes after step 2",
    r"stage 1: step \d+ of 10, loss \d\.\d+, .*\d examples/s",
    r"stopped: SIGTERM",
    r"pope: \d+ answers in ",
    r"text, seed 0, finished in ",
    r"  (scores|quick look|folder|results|answers|adapter|W&B)? +\S",
    r"Table 3|model scenes_tiny|These numbers come|A quick look|-----|Text disprefer|[✓✗] ",
    r"No base row|written:|page: |  \S*/tables/|  \S+\.html|$",
)


def test_a_file_gets_plain_lines_of_ours_alone(world, tmp_path, monkeypatch):
    """Without a W&B login, with forked loader processes, a stop in the middle of an epoch and a resumption."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    command = settings(world, f"outputs={tmp_path}", "logger=wandb", "data.workers=2", "data.prepare.evaluation=3")
    command = ["-m", *command, "ablation=text", "benchmarks.limit=1"]
    status, stopped = train(*command, log=tmp_path / "log", sabotage=at_step(1, 2, signal.SIGTERM))
    assert status == 143, stopped
    status, printed = train("resume=latest", f"outputs={tmp_path}", log=tmp_path / "log")
    assert status == 0, printed
    strange = [
        line for line in (stopped + printed).splitlines() if not any(re.match(pattern, line) for pattern in OURS)
    ]
    assert not strange, "\n".join(strange)
    assert "\x1b" not in printed and "\r" not in printed

    (run,) = (tmp_path / "sweeps").glob("*/0_text_seed0")
    f1 = json.loads((run / "results.json").read_text())["benchmarks"]["pope"]["f1"]
    panel = printed[printed.index("finished in") : printed.index("Table 3")]
    assert re.search(rf"POPE ↑.*\n.* {f1:.2f}\b", panel)
    assert "benchmarks.limit=1: pope " in panel and str(run) in panel
    assert re.search(r"wandb sync \S+/wandb/offline-run-\*\n", panel)
    assert "stage_1/adapter" in panel
    saved = next(run.glob("povid.log")).read_text()
    assert "stage 1: step 10 of 10" in saved and "][povid.run.stage][INFO] - stage 1 of text" in saved


def on_a_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Exit status of ``python train.py ARGUMENTS`` on a terminal of its own, and what it received."""
    child, screen = pty.fork()
    if child == 0:
        try:
            os.environ.update(TERM="xterm", COLUMNS=str(columns))
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            sys.argv = [str(TRAIN), *arguments]
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as leave:
            os._exit(leave.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    received = b""
    try:
        while block := os.read(screen, 65536):
            received += block
    except OSError:  # the terminal is closed
        pass
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), received.decode(errors="replace")


def test_a_terminal_gets_a_bar_and_panels(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = settings(world, f"outputs={tmp_path}", "ablation=text", "logger=wandb")
    status, received = on_a_terminal(80, *command)
    assert status == 0, received
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    assert "stage 1 of text, seed 0 ───" in text and "text, seed 0, finished in" in text
    assert re.search(r"stage 1, epoch 2 of 2 .*10?/5|stage 1, epoch 2 of 2 .*5/5", text)
    assert "examples/s: " in text and "loss: " in text
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l"), "the cursor is shown again"
    assert not re.search(r"wandb: |Warning|it/s|Loading weights|\[HYDRA\]", text)


def fake_trainer(**more):
    return SimpleNamespace(global_step=0, estimated_stepping_batches=20, log_every_n_steps=5, world_size=2, **more)


def test_metrics_are_read_at_logging_steps_alone(monkeypatch):
    """Steps of 2 s with 2 x 3 examples; the first does not count for the estimate. 14 s and 7 steps on, 12 are left."""
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    read = []

    class Trainer(SimpleNamespace):
        @property
        def callback_metrics(self):
            read.append(self.global_step)
            return {"train/loss": 0.5, "train/reward_text": 9.0, "train/margin_text": 0.25}

    trainer = Trainer(**vars(fake_trainer()))
    pace, batch = terminal.Pace(), SimpleNamespace(pairs=SimpleNamespace(examples=3))
    pace.start(trainer)
    assert pace.sentence() == ""
    for step in range(1, 9):
        now += 2
        trainer.global_step = step
        assert pace.update(trainer, batch) == (step == 5)
    assert read == [5]
    assert pace.sentence() == "loss 0.500, margin_text 0.250, 3.0 examples/s, about 24 s left"
    now += 24
    trainer.global_step = 20
    assert pace.update(trainer, batch) and "left" not in pace.sentence()


def test_the_figures_that_matter():
    assert terminal.telling({"train/loss": 1, "train/margin_text": 2, "train/margin_noise": 3, "val/loss": 9}) == {
        "loss": 1.0,
        "margin_text": 2.0,
        "margin_noise": 3.0,
    }
    several = {"rewards/margins": 1, "rewards/margins_text": 2, "rewards/accuracies": 3, "weighted_rewards/margins": 4}
    assert terminal.telling(several) == {"margins": 1.0, "accuracies": 3.0}


def test_what_a_user_can_act_on_comes_through():
    """Silence is by name: another warning of the same library, or of the same kind, is shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet.quiet()
        for kind, message in (
            (PossibleUserWarning, "Found 344 module(s) in eval mode at the start of training. This may"),
            (PossibleUserWarning, "The 'train_dataloader' does not have many workers which may be"),
            (FutureWarning, "`is_gradient_checkpointing` is deprecated and will be removed"),
            (PossibleUserWarning, "The number of training batches (2) is smaller than the logging interval"),
            (FutureWarning, "`something_else` is deprecated"),
        ):
            warnings.warn(message, kind, stacklevel=1)
    assert [str(each.message).split()[0] for each in shown] == ["The", "`something_else`"]
    assert "smaller than" in str(shown[0].message)


def test_the_progress_bar_can_be_left_out_and_replaced(world, tmp_path):
    """Lightning refuses a bar beside trainer.enable_progress_bar=false, so there must be none."""
    command = settings(world, f"outputs={tmp_path}", "ablation=text", "stages.1.max_steps=1", "benchmarks=[]")
    status, printed = train(*command, "+trainer.enable_progress_bar=false", log=tmp_path / "log")
    assert status == 0 and "stage 1: step" not in printed, printed
    own = "+callbacks.bar={_target_: lightning.pytorch.callbacks.TQDMProgressBar}"
    status, printed = train(*command, own, log=tmp_path / "log")
    assert status == 0 and "stage 1: step" not in printed and "it/s" in printed, printed


def test_only_the_first_process_prints_progress(caplog):
    lines = terminal.ProgressLines(1)
    trainer = fake_trainer(is_global_zero=False, callback_metrics={"loss": 1.0})
    lines.setup(trainer, L.LightningModule(), "fit")
    lines.on_train_start(trainer, None)
    trainer.global_step = 20
    with caplog.at_level("INFO"):
        lines.on_train_batch_end(trainer, None, None, SimpleNamespace(pairs=SimpleNamespace(examples=1)), 0)
    assert not caplog.messages
