"""The check of all records beside training."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from povid.fault import Fault
from povid.preferences.check import Finding, Report
from povid.preferences.triple import Triple, Turn
from povid.run.guards import DataCheck


def triples(count: int) -> list[Triple]:
    asked = Turn("user", "What?")
    return [
        Triple(f"r{n}", Path("x.png"), (asked, Turn("assistant", "A.")), (asked, Turn("assistant", "B.")))
        for n in range(count)
    ]


def trainer(last: bool = False, epoch: int = 0):
    progress = SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=last))
    return SimpleNamespace(is_global_zero=True, current_epoch=epoch, fit_loop=SimpleNamespace(epoch_loop=progress))


def test_processes_check_every_record_and_report_in_order(tmp_path):
    def check(part):
        (tmp_path / f"{os.getpid()}").write_text(" ".join(triple.id for triple in part))
        return Report(
            len(part), len(part), [Finding(t.id, "equal", f"record {t.id!r}: odd") for t in part if t.id in "r1r6"]
        )

    guard = DataCheck(triples(7), "data.json", check, processes=3)
    guard.on_train_start(trainer(), None)
    with pytest.raises(Fault) as caught:
        guard.on_train_batch_end(trainer(last=True), None)
    assert "data.json holds 2 records that cannot be used (of 7 checked)" in str(caught.value)
    assert str(caught.value).index("'r1'") < str(caught.value).index("'r6'")
    shares = {int(file.name): file.read_text() for file in tmp_path.iterdir()}
    assert os.getpid() not in shares and len(shares) == 3
    assert sorted(" ".join(shares.values()).split()) == [f"r{number}" for number in range(7)]
    guard.on_train_batch_end(trainer(), None)  # said once


def test_training_does_not_wait_for_the_check_but_at_the_end_of_the_epoch(tmp_path, caplog):
    def check(part):
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        return Report(len(part), len(part))

    caplog.set_level(logging.INFO)
    guard = DataCheck(triples(2), "data.json", check)
    guard.on_train_start(trainer(), None)
    guard.on_train_batch_end(trainer(), None)
    assert not caplog.messages
    (tmp_path / "go").touch()
    guard.on_train_batch_end(trainer(last=True), None)
    assert caplog.messages == ["checked all 2 records: every one can be used"]


def test_a_check_that_dies_is_not_taken_for_sound_records_and_none_outlives_the_stage(caplog):
    guard = DataCheck(triples(4), "data.json", lambda part: os._exit(9), processes=2)
    guard.on_train_start(trainer(), None)
    guard.on_train_batch_end(trainer(last=True), None)
    assert "4 of 4 records are not checked, since a process that checked them died" in caplog.text
    guard = DataCheck(triples(4), "data.json", lambda part: time.sleep(600), processes=2)
    guard.on_train_start(trainer(), None)
    running = [process for process, _ in guard.checks.running]
    assert all(process.is_alive() for process in running)
    guard.on_exception(trainer(), None, KeyboardInterrupt())
    assert not any(process.is_alive() for process in running)
    guard = DataCheck(triples(4), "data.json", lambda part: time.sleep(600))
    guard.on_train_start(trainer(epoch=1), None)
    assert guard.checks is None, "a resumed run has checked them"
