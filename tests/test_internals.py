"""The private parts of other libraries that povid.internals uses are where it expects them."""

from __future__ import annotations

import inspect
import re
import signal
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from povid import internals

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def test_every_function_names_the_versions_that_the_project_allows():
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    entries = [*project["dependencies"], *(e for group in project["optional-dependencies"].values() for e in group)]
    allowed = dict(re.match(r"([\w-]+)(.*)", entry).groups() for entry in entries)
    functions = [f for _, f in inspect.getmembers(internals, inspect.isfunction) if f.__module__ == internals.__name__]
    assert functions
    for function in functions:
        (found,) = re.findall(r"\(([\w-]+) (>=[\d.]+(?:,<[\d.]+)?)\)", function.__doc__)
        assert allowed[found[0]] == found[1], function.__name__


@pytest.fixture(scope="module")
def adapted():
    """A linear layer with LoRA and a trained copy of another, neither of them zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("inner", nn.Linear(4, 4))
    base.add_module("projector", nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["inner"], modules_to_save=["projector"], r=2))
    for parameter in model.parameters():
        parameter.data += 0.1
    return model


def test_an_adapter_is_ignored_and_used_again(adapted):
    x = torch.ones(1, 4)
    switches = internals.adapter_switches(adapted)
    used = adapted(x)
    with adapted.disable_adapter():
        expected = adapted(x)
    assert len(switches) == 2 and not torch.equal(used, expected)
    internals.ignore_adapter(switches, True)
    assert torch.equal(adapted(x), expected)
    internals.ignore_adapter(switches, False)
    assert torch.equal(adapted(x), used)


def test_trained_copies_are_the_modules_that_learn(adapted):
    (copy,) = internals.trained_copies(adapted)
    trained = {id(p) for name, p in adapted.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {id(p) for p in copy.parameters()}


def test_four_bit_layers_have_the_switch_of_their_cpu_products():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantize)")
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True
    internals.keep_input_gradients(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False
    assert "support_avx512bf16_for_cpu" in inspect.getsource(bitsandbytes.nn.Linear4bit)


def test_attention_is_known_by_name_and_called_as_expected():
    config = LlamaConfig(attn_implementation="sdpa")
    assert internals.attention_name(config) == "sdpa"
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    mask = torch.zeros(1, 1, 5, 5)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3).transpose(1, 2)
    module = SimpleNamespace(num_key_value_groups=1, training=False, is_causal=True, config=config)
    for name in ("sdpa", "eager"):
        attend = internals.attention_function(LlamaConfig(attn_implementation=name))
        output, _ = attend(module, query, key, value, mask, dropout=0.0, scaling=0.3)
        torch.testing.assert_close(output, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_processors_are_found_and_do_without_video():
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    assert internals.processor_class(LlavaConfig()) is LlavaProcessor
    assert internals.processor_class(LlamaConfig()) is None
    config = AutoConfig.for_model("qwen2_5_vl")
    assert internals.processor_class(config) is Qwen2_5_VLProcessor
    assert "video_processor" in Qwen2_5_VLProcessor.get_attributes()
    pictures_only = internals.without_video(Qwen2_5_VLProcessor)
    assert set(Qwen2_5_VLProcessor.get_attributes()) - set(pictures_only.get_attributes()) == {"video_processor"}


def test_a_decoder_does_not_look_for_several_sequences_in_a_row():
    from transformers import LlamaModel

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    decoder, tokens = LlamaModel(config), {"input_ids": torch.arange(4)[None], "use_cache": False}
    with torch.no_grad():
        plain, two_rows = decoder(**tokens)[0], decoder(**tokens, position_ids=torch.tensor([[0, 1, 0, 1]]))[0]
        with internals.no_search_for_packing():
            assert torch.equal(decoder(**tokens)[0], plain)
            one_row = decoder(**tokens, position_ids=torch.tensor([[0, 1, 0, 1]]))[0]
    assert not torch.equal(one_row, two_rows), "the search has not been switched off"


def test_forward_hooks_are_seen():
    layer = nn.Linear(2, 2)
    assert not internals.is_watched(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert internals.is_watched(layer)
    handle.remove()
    assert not internals.is_watched(layer)


@pytest.fixture
def trainer():
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=1, **quiet)


def test_loggers_read_the_step_that_is_corrected(trainer):
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = 7
    internals.correct_logged_step(trainer)
    assert loop._batches_that_stepped == trainer.global_step == 0
    assert "_batches_that_stepped" in inspect.getsource(type(trainer._logger_connector))


def test_the_loop_says_whether_it_validates_after_a_batch(tmp_path):
    """Three batches, validation after every second one."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    said = []

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            said.append(internals.validates_next(trainer))

    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Asks()],
        default_root_dir=tmp_path,
    ).fit(BoringModel())
    assert said == [False, True, False]


def test_a_launcher_that_starts_processes_is_known_and_reaches_them(trainer):
    import subprocess

    assert internals.script_launcher(trainer) is None
    two = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    two.strategy._configure_launcher()
    launcher = internals.script_launcher(two)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        launcher.procs.append(child)
        launcher.kill(signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
    finally:
        child.kill()


def test_trainers_whose_processes_run_the_script_are_known(trainer):
    kinds = {"ddp": True, "ddp_spawn": False}
    quiet = {"logger": False, "enable_checkpointing": False}
    found = {
        kind: internals.runs_the_script(L.Trainer(accelerator="cpu", devices=2, strategy=kind, **quiet))
        for kind in kinds
    }
    assert found == kinds and not internals.runs_the_script(trainer)


def test_children_are_watched_again():
    """Of a process that has ended well nothing is said; the thread looks once and ends."""
    ended = SimpleNamespace(poll=lambda: None, returncode=0, pid=0, send_signal=lambda number: None)
    internals.watch_children(SimpleNamespace(procs=[ended]))
    (observer,) = (thread for thread in threading.enumerate() if thread.name == "child-process-observer")
    assert observer._child_processes == [ended]
    internals.stop_watching_children()
    assert observer._child_processes == []


def test_a_child_that_ends_is_no_longer_watched(monkeypatch):
    """Lightning's own observer thread would end this process because a child has failed."""
    from lightning.fabric.strategies.launchers import subprocess_script

    ended = threading.Event()
    monkeypatch.setattr(subprocess_script.os, "kill", lambda *_: ended.set())
    failing = SimpleNamespace(poll=lambda: None, returncode=None, pid=0, send_signal=lambda number: None)
    observer = subprocess_script._ChildProcessObserver(main_pid=0, child_processes=[failing], sleep_period=0.01)
    assert observer.name == "child-process-observer"
    observer.start()
    internals.stop_watching_children()
    failing.returncode = 1
    observer.join(timeout=30)
    assert not observer.is_alive() and not ended.is_set()


@pytest.mark.parametrize(("most", "steps"), [(-1, 9), (8, 8), (100, 9)])
@pytest.mark.parametrize("ended", [1, 2])
def test_a_fit_resumed_from_the_end_of_an_epoch_trains_the_others(tmp_path, ended, most, steps):
    """Three epochs of three steps, at most so many; saved when the first or the second has ended."""

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.trained = nn.Linear(1, 1), []

        def training_step(self, batch, index):
            self.trained.append((self.trainer.current_epoch, index))
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Save(L.Callback):
        def on_train_start(self, trainer, module):
            internals.begin_next_epoch(trainer)

        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == ended - 1:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    def fit(**more):
        model = Model()
        trainer = L.Trainer(
            max_epochs=3,
            max_steps=most,
            callbacks=[Save()],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, torch.ones(3, 1), **more)
        return model.trained, trainer.global_step

    whole, count = fit()
    assert count == len(whole) == steps
    assert fit(ckpt_path=tmp_path / "saved.ckpt") == (whole[3 * ended :], steps)


def test_model_parallel_strategy_can_be_told_its_sizes_and_its_backend():
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy()
    internals.replicate_over(strategy, 6)
    read = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)
    assert "self._data_parallel_size" in read and "self._tensor_parallel_size" in read
    assert "_get_process_group_backend()" in inspect.getsource(ModelParallelStrategy)


def test_wandb_can_be_kept_from_saying_a_warning(capsys, monkeypatch):
    import wandb
    from wandb.errors import term

    monkeypatch.setattr(term, "_silent", False)  # whatever a test before this one said to W&B
    monkeypatch.setattr(term, "_show_warnings", True)
    internals.keep_from_saying(["nobody can act on this"])
    for warning in ("nobody can act on this", "somebody can act on that"):
        wandb.termwarn(warning, repeat=False)
    assert "nobody" not in (printed := capsys.readouterr().err) and "somebody can act on that" in printed
