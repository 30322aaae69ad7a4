"""The check of records in processes of their own, which give way to training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch

from povid.preferences.check import Report
from povid.preferences.triple import Triple


class Checks:
    """Processes that share the records among them; they start here and end with the ``with`` block.

    Args:
        triples: the records, of which there is at least one.
        check: gives the report on some of them.
        processes: how many to start.
    """

    def __init__(self, triples: Sequence[Triple], check: Callable[[Sequence[Triple]], Report], processes: int) -> None:
        self.records = len(triples)
        self.running: list[tuple[Any, Connection]] = []
        self.reports: dict[int, Report] = {}
        fork = multiprocessing.get_context("fork")  # the records are there already
        share = -(-len(triples) // processes)
        for start in range(0, len(triples), share):
            receiver, sender = fork.Pipe(duplex=False)
            arguments = (check, triples[start : start + share], sender)
            process = fork.Process(target=_work, args=arguments, name="data-check", daemon=True)
            process.start()
            sender.close()
            self.running.append((process, receiver))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def report(self, *, complete: bool) -> Report | None:
        """The report on all records in their order; None while some are not checked, unless ``complete`` waits.

        ``checked`` is smaller than ``records`` if a process died.
        """
        for number, (_, receiver) in enumerate(self.running):
            if number not in self.reports and (complete or receiver.poll()):
                try:
                    self.reports[number] = receiver.recv()
                except EOFError:
                    self.reports[number] = Report(0, 0)
        if len(self.reports) < len(self.running):
            return None
        parts = [self.reports[number] for number in range(len(self.running))]
        findings = [finding for part in parts for finding in part.findings]
        return Report(self.records, sum(part.checked for part in parts), findings)

    def end(self) -> None:
        """End the processes."""
        for process, receiver in self.running:
            receiver.close()
            process.kill()
            process.join()
        self.running = []


def _work(check: Callable[[Sequence[Triple]], Report], triples: Sequence[Triple], sender: Connection) -> None:
    """Check records in this process, which ends with the one that started it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the run's own decides what it means
    os.nice(19)
    torch.set_num_threads(1)  # a fork has none of the threads that the other process computes with

    def follow() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    sender.send(check(triples))
