"""vLLM as the engine that answers benchmarks, in place of the model's own generation.

The prompts are the model's own: the same tokens and the same padded picture. vLLM's kernels, its batches and its image
processor are others, so answers may differ in places; they have an identity of their own.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from povid import files
from povid.fault import Fault
from povid.model.adapters import SHARD, VLLM_RANKS, adapter_digest
from povid.model.loading import LocalModel
from povid.model.question import WHOLE, Answerer, Decoding, Question, Share
from povid.model.template import Template
from povid.preferences.pictures import open_picture
from povid.preferences.triple import pictures_of

log = logging.getLogger(__name__)

BATCHES = 16  # that are handed over at once, so that an interrupted run loses no more
OWN = ("model", "dtype", "seed", "max_num_seqs", "enable_lora", "max_lora_rank", "max_loras")
VISIBLE = "CUDA_VISIBLE_DEVICES"
PLACES = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the run's processes


class VLLM(BaseModel):
    """The engine's settings. ``generation.batch_size`` is its ``max_num_seqs``.

    Attributes:
        folder: for merged models. vLLM adds a single LoRA adapter to the weights by itself. A model with several
            adapters, or with a trained projector, is merged here first, in ``model.dtype``, and kept for the next run;
            it may be deleted.
        arguments: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``. For questions about several
            pictures, ``limit_mm_per_prompt.image`` must be as many; it is one otherwise.

    Raises:
        pydantic.ValidationError: vLLM is not installed, or an argument is one that the run sets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    answers_depend_on_batch: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("vllm",)  # what else computes: a part of the answers' identity

    folder: Annotated[Path, Strict(False)]
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _left_to_the_user(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in arguments if name in OWN]:
            raise ValueError(f"the run sets {', '.join(taken)} itself; remove that")
        return arguments

    @model_validator(mode="after")
    def _is_installed(self) -> Self:
        if find_spec("vllm") is None:
            raise ValueError("vLLM is not installed: pip install 'povid[vllm]', or leave out generation.engine")
        return self

    def unsuited(self, model: Any) -> str | None:
        """Why this engine cannot run a model's settings; None if nothing is known against it."""
        if not isinstance(model, LocalModel):
            return f"model {model.name!r} is not loaded here and answers by itself; leave the engine out"
        if model.quantize:
            return "vLLM would load whole weights, which are another model; set model.quantize=null"
        if model.dtype == "float64":
            return "vLLM computes in float32 at most; set model.dtype=float32"
        if model.style == "bare":
            return "vLLM needs a prompt that marks the picture, and model.style=bare does not; leave the engine out"
        return None

    def answerer(
        self,
        model: LocalModel,
        adapters: Sequence[Path] = (),
        *,
        batch_size: int,
        seed: int = 0,
        device: torch.device | None = None,
        share: Share = WHOLE,
    ) -> Answerer:
        """The model with its adapters in an engine on ``device``, ready to answer ``share`` of the questions.

        Raises:
            Fault: an adapter or the model cannot be loaded.
        """
        import vllm

        options = {
            "dtype": model.dtype,
            "seed": seed,
            "max_num_seqs": batch_size,
            "limit_mm_per_prompt": {"image": 1},
            **self.arguments,
        }
        lora = None
        if len(adapters) == 1 and (rank := _lora_rank(adapters[0])) and not model.merge:
            from vllm.lora.request import LoRARequest

            lora = LoRARequest("policy", 1, str(adapters[0].resolve()))
            options |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        source = model.source if lora or not adapters else str(self._merged(model, adapters))
        with _alone_on(device if share.of > 1 else None):  # a single process may use several GPUs
            engine = vllm.LLM(model=source, **options)
        template = model.template(model.load_processor())
        return VLLMAnswers(engine, template, vllm.SamplingParams, lora, batch_size, seed, share)

    def _merged(self, model: LocalModel, adapters: Sequence[Path]) -> Path:
        """The folder of the merged model, which the first process that needs it writes."""
        parts = [model.source, _digests(model.source), [*map(adapter_digest, adapters)], model.dtype, model.merge]
        place = self.folder / files.digest(json.dumps(parts).encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{place.name}.lock"):
            if not place.is_dir():
                log.info("the model with its adapters is merged for vLLM: %s", place)
                with files.draft(place) as folder:
                    folder.mkdir()
                    model.load_model(adapters, merged=True).save_pretrained(folder, max_shard_size=SHARD)
                    model.copy_processor(folder)
        return place


@dataclass(slots=True)
class VLLMAnswers:
    """An ``Answerer`` through ``engine``, a ``vllm.LLM``; ``sampling`` is ``vllm.SamplingParams``."""

    engine: Any
    template: Template
    sampling: Any
    lora: Any
    batch_size: int
    seed: int
    share: Share

    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        """Yield (index, answer), some batches at a time.

        Raises:
            Fault: an image is missing or broken, or vLLM refuses a prompt, such as one that is too long.
        """
        own, size = self.share.by_picture(questions), BATCHES * self.batch_size
        for part in (own[i : i + size] for i in range(0, len(own), size)):
            shown = dict.fromkeys(picture for i in part for picture in pictures_of(questions[i].image))
            pictures = {picture: self.template.picture(open_picture(picture)) for picture in shown}
            prompts = [self._prompt(questions[i], pictures) for i in part]
            settings = [self._decoding(questions[i], decoding) for i in part]
            try:
                outputs = self.engine.generate(prompts, settings, use_tqdm=False, lora_request=self.lora)
            except ValueError as error:
                first = questions[part[0]].id
                raise Fault(f"vLLM refuses a question among the {len(part)} from {first!r} on: {error}") from error
            for index, output in zip(part, outputs, strict=True):
                tokens = list(output.outputs[0].token_ids)
                yield index, self.template.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _prompt(self, question: Question, pictures: dict[Any, Any]) -> dict[str, Any]:
        """Token ids with one token for each picture, which vLLM replaces by as many as the processor makes of it."""
        shown = [pictures[picture] for picture in pictures_of(question.image)]
        prompt: dict[str, Any] = {"prompt_token_ids": self.template.unexpanded(question.text, len(shown), question.id)}
        return prompt | ({"multi_modal_data": {"image": shown if len(shown) > 1 else shown[0]}} if shown else {})

    def _decoding(self, question: Question, decoding: Decoding) -> Any:
        return self.sampling(
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            seed=question.seed(self.seed) if decoding.temperature else None,
            stop=[decoding.stop] if decoding.stop else None,
            include_stop_str_in_output=True,
            stop_token_ids=[self.template.processor.tokenizer.eos_token_id],
        )


def _lora_rank(adapter: Path) -> int | None:
    """The smallest of vLLM's ranks that holds an adapter; None if it is more than a LoRA, or larger.

    Raises:
        Fault: the folder holds no adapter.
    """
    file = adapter / "adapter_config.json"
    config = files.read_json(file, dict, "name a run folder or an adapter folder", ("r",))
    if config.get("modules_to_save"):
        return None
    return next((rank for rank in VLLM_RANKS if rank >= config["r"]), None)


def _digests(source: str) -> Any:
    """What names the weights at a model's source: a local folder's files, or the commit of one from the hub."""
    folder = Path(source)
    if folder.is_dir():
        return [[file.name, files.digest(file)] for file in sorted(folder.iterdir()) if file.is_file()]
    from transformers.utils import cached_file

    return Path(cached_file(source, "config.json")).parent.name


@contextmanager
def _alone_on(device: torch.device | None) -> Iterator[None]:
    """Inside, the processes that vLLM starts see this GPU alone, and nothing of the run's other processes."""
    before = {name: os.environ.pop(name, None) for name in PLACES} | {VISIBLE: os.environ.get(VISIBLE)}
    if device is not None and device.type == "cuda":
        every = [str(number) for number in range(torch.cuda.device_count())]
        os.environ[VISIBLE] = (before[VISIBLE].split(",") if before[VISIBLE] else every)[device.index]
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
