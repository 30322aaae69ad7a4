"""Who answers in each process of a run: the whole model where a device can hold it, else the split weights together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from povid.benchmarks.processes import Processes, ProcessFailed
from povid.model.generation import Answers
from povid.model.policy import Policy
from povid.model.question import Answerer, Decoding, Question, Share
from povid.run.processes import Group, device, first
from povid.run.settings import Settings
from povid.training.sharding import shard, to_device

log = logging.getLogger(__name__)

SPARE = 2**30  # bytes beside the weights, for a batch of one and what computing it takes


def answerer(settings: Settings, adapters: Sequence[Path], processes: Processes, engine: Any = None) -> Answerer:
    """The model with its adapters, which answers this process's share of the questions. All processes must call it.

    ``engine`` (``povid.model.vllm_engine``) answers in place of the model's own generation. A model whose weights the
    trainer splits is loaded whole by every process that can hold it, and these share the questions; if none can, it
    stays split, and all processes compute every step together.
    """
    batch_size, seed = settings.generation.batch_size, settings.plain.seed
    share = Share(processes.number, processes.of)
    options = {"batch_size": batch_size, "seed": seed, "device": device()} | ({"share": share} if share.of > 1 else {})
    if engine is not None:
        return engine.answerer(settings.model, adapters, **options)
    if not (settings.split and isinstance(processes, Group)):
        return settings.model.answerer(adapters, **options)
    with processes.together():
        policy = settings.model.policy(adapters, adapted=False)
    holders = processes.exchange(fits(policy, device()))
    if any(holders):
        if not holders[processes.number]:
            return _nothing
        part = Share(sum(holders[: processes.number]), sum(holders))
        return Answers(policy.to(device()), settings.model.template(policy.processor), batch_size, seed, share=part)
    if first():
        log.info("no device can hold the whole model, so it answers with its weights split over the processes")
    strategy: Any = processes.strategy
    shard(policy, strategy.device_mesh["data_parallel"], offload=strategy.offload)
    to_device(policy, device())
    answers = Answers(policy, settings.model.template(policy.processor), batch_size, seed, share=share)
    return InStep(answers, processes)


def fits(policy: Policy, place: torch.device) -> bool:
    """Whether a policy in the machine's memory fits on a device, and can answer there."""
    if place.type != "cuda":
        return True
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*policy.parameters(), *policy.buffers()))
    return size + SPARE <= torch.cuda.mem_get_info(place)[0]


def _nothing(questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
    return iter(())


class InStep:
    """An ``Answerer`` on split weights, whose every layer all processes must use equally often and in the same order.

    Each process answers its share. A pass through the decoder begins when all processes have begun one; a process that
    has finished goes along with one token until all have.
    """

    def __init__(self, answers: Answers, processes: Processes) -> None:
        self.answers, self.processes = answers, processes

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        with self._in_step():
            yield from self.answers.stream(questions, decoding)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        decoder = self.answers.policy.network.get_decoder()

        def meet(*_: Any) -> None:
            if FAILED in self.processes.exchange(WORKING):
                raise ProcessFailed("another process failed while all answered together")

        hook = decoder.register_forward_pre_hook(meet, prepend=True)  # before FSDP's own, which gathers weights
        try:
            yield
            hook.remove()
            while (states := set(self.processes.exchange(FINISHED))) != {FINISHED}:
                if FAILED in states:
                    raise ProcessFailed("another process failed while all answered together")
                self._go_along(decoder)
        except ProcessFailed:
            raise
        except (Exception, GeneratorExit):
            self.processes.exchange(FAILED)
            raise
        finally:
            hook.remove()

    def _go_along(self, decoder: Any) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=device())
        decoder(inputs_embeds=self.answers.policy.network.get_input_embeddings()(token), use_cache=False)


WORKING, FINISHED, FAILED = range(3)  # what a process says before each pass
