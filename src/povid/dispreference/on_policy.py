"""Preference pairs from what the policy itself says: several captions of a picture, the truest against the falsest.

The policy is asked for K captions of each picture (:class:`OnPolicy`), a judge says which objects of each caption are
in the picture and which are not (:mod:`povid.dispreference.judging`), and :func:`choose` takes a pair. Every caption is
kept in ``OUT.run/captions`` the moment it arrives, with what identifies the policy beside it, so that a killed run
resumes and captions of another policy are never mixed in.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, Strict

from povid.benchmarks.suite import kept_answers
from povid.dispreference.judging import Judge, Reading
from povid.dispreference.rows import Made, Row
from povid.fault import Fault
from povid.files import read_json, write_json
from povid.model.adapters import adapter_chain, adapter_digest
from povid.model.question import Decoding, Question
from povid.preferences.differences import words
from povid.run.build import make
from povid.run.content import computing, weights_digest
from povid.run.identity import Identity, flat, identity, is_free
from povid.run.processes import device
from povid.run.quiet import quiet_imported

Place = Annotated[Path, Strict(False)]

# Settings of a model that matter when it is trained, or not at all, and change nothing that it says.
SILENT = ("compile", "fused", "gradient_checkpointing", "lora", "masking", "name", "train_projector")

NO_DESCRIPTION = "asks for no description"
ALL_THE_SAME = "all captions are the same"
EQUALLY_FALSE = "equally many false objects"
NOT_COMPARABLE = "no pair of equal coverage and length"


class Tolerances(NamedTuple):
    """How far two captions may differ and still be compared.

    Attributes:
        coverage: in the number of true objects that they name.
        length: in words, as a share of the longer one.
    """

    coverage: int = 0
    length: float = 0.2


def choose(captions: Sequence[str], readings: Sequence[Reading], most: Tolerances) -> tuple[int, int] | str:
    """The places of the preferred and of the dispreferred caption, or why there is no pair.

    Two captions may be paired if the numbers of true objects that they name differ by at most ``most.coverage``, their
    words by at most ``most.length`` of the longer one's, and one names fewer false objects, which is then preferred. An
    object counts once for each caption. Of all such pairs the one with the largest difference in false objects is
    taken; of several, the one with the smallest difference in true objects, then in words, then the pair whose
    preferred and then whose dispreferred caption was sampled first. Empty captions and repetitions do not count.
    """
    lengths = [len(words(caption)) for caption in captions]
    first_said = {caption: place for place, caption in reversed(list(enumerate(captions)))}
    distinct = sorted(place for place in first_said.values() if lengths[place])
    if len(distinct) < 2:
        return ALL_THE_SAME
    found, differ = [], False
    for good in distinct:
        for bad in distinct:
            fewer = len(readings[bad].false) - len(readings[good].false)
            if fewer <= 0:
                continue
            differ = True
            true = abs(len(readings[good].true) - len(readings[bad].true))
            longer = abs(lengths[good] - lengths[bad])
            if true <= most.coverage and longer <= most.length * max(lengths[good], lengths[bad]):
                found.append((-fewer, true, longer, good, bad))
    if found:
        return min(found)[3:]
    return NOT_COMPARABLE if differ else EQUALLY_FALSE


class OnPolicy(BaseModel):
    """Pairs of captions that the policy samples: fewest false objects against most, at equal coverage and length.

    Only records that ask for a description are used (:func:`povid.dispreference.prompts.kind_of`, or their own
    ``prompt``); their answers are not needed and not looked at.

    Attributes:
        model: who is asked: a model of conf/model, loaded here or served.
        judge: says which objects of a caption are in the picture.
        adapters: of the policy, in order; ``init_from``: a run folder or an adapter folder whose adapters come last.
        captions: sampled for each picture, K.
        temperature, max_new_tokens: of sampling.
        batch_size: captions sampled together.
        coverage_tolerance, length_tolerance: see :class:`Tolerances`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    needs_answers: ClassVar[bool] = False

    name: str = "on_policy"
    model: Any
    judge: Any
    adapters: tuple[Place, ...] = Field((), strict=False)
    init_from: Place | None = None
    captions: int = Field(4, ge=2, le=256)
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    coverage_tolerance: int = Field(0, ge=0)
    length_tolerance: float = Field(0.2, ge=0, le=1)

    @property
    def chain(self) -> list[Path]:
        """All adapters of the policy, in order.

        Raises:
            Fault: a folder holds no adapter.
        """
        for adapter in self.adapters:
            if not (adapter / "adapter_config.json").is_file():
                raise Fault(f"adapters: {adapter} holds no adapter_config.json; name folders that hold an adapter")
        return [*self.adapters, *(adapter_chain(self.init_from) if self.init_from is not None else ())]

    def trained_on(self, adapters: Sequence[Path]) -> Self:
        """The same with another policy: the model with ``adapters``."""
        return self.model_copy(update={"adapters": tuple(adapters), "init_from": None})

    def identity(self, rows: Sequence[Row], seed: int) -> dict[str, Any]:
        """What the pairs depend on besides questions and pictures."""
        self._prepare()
        judge: Judge = self.judge
        tolerances = {"coverage": self.coverage_tolerance, "length": self.length_tolerance}
        return {**self._policy(seed).parts, "tolerances": tolerances, "judge": judge.identity(rows)}

    def generate(self, rows: Sequence[Row], folder: Path, seed: int) -> Made | None:
        """Sample, judge and choose; captions and replies are kept in ``folder``. None if only an estimate was wanted.

        Raises:
            Fault: the captions in ``folder`` are of another policy, a question cannot be asked, or a server did not
                answer; what has arrived is kept.
        """
        made = Made()
        described = [row for row in rows if row.kind == "captioning"]
        if any(row.earlier for row in described):
            raise Fault("the policy is asked one question at a time; use questions=first, not each")
        if not described:
            raise Fault(
                "no record asks for a description of its picture, and only what captions name can be judged; set "
                "prompt=captioning if they do"
            )
        captions = self._sample(described, folder / "captions", seed)
        judge: Judge = self.judge
        several = [place for place, said in enumerate(captions) if len({one for one in said if words(one)}) > 1]
        judged = judge.read([described[place] for place in several], [captions[place] for place in several], folder)
        if judged is None:
            return None
        most = Tolerances(self.coverage_tolerance, self.length_tolerance)
        known = dict(zip(several, judged, strict=True))
        verdicts = iter([(said, known.get(place, ALL_THE_SAME)) for place, said in enumerate(captions)])
        false: list[tuple[int, int]] = []
        for row in rows:
            if row.kind != "captioning":
                made.rejects.append((row.id, [NO_DESCRIPTION]))
                continue
            said, readings = next(verdicts)
            chosen = readings if isinstance(readings, str) else choose(said, readings, most)
            if isinstance(chosen, str):
                made.rejects.append((row.id, [chosen]))
                continue
            good, bad = chosen
            made.triples.append(row.triple(said[good], said[bad]))
            made.kinds.append(row.kind)
            false.append((len(readings[good].false), len(readings[bad].false)))
        made.figures = _figures(captions, judged, false) | judge.figures()
        print("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in made.figures.items()))
        return made

    def _sample(self, rows: Sequence[Row], folder: Path, seed: int) -> list[list[str]]:
        """``captions`` captions of every row, those on disk first."""
        policy, note = self._policy(seed), folder / "policy.json"
        cure = f"move {folder} away to sample again, or choose another out"
        if note.is_file():
            policy.check(read_json(note, dict, cure), f"{folder}", cure)
        else:
            write_json(note, policy.record())
        questions = [
            Question(f"{number}/{row.id}/{sample}", row.image, row.question, {}, sample)
            for number, row in enumerate(rows)
            for sample in range(self.captions)
        ]
        decoding = Decoding(self.max_new_tokens, self.temperature)

        def answer(asked: Sequence[Question], how: Decoding) -> Iterator[tuple[int, str]]:
            if self.model.trainable:
                quiet_imported()
            ask = self.model.answerer(self.chain, batch_size=self.batch_size, seed=seed, device=device())
            yield from ask(asked, how)

        said = kept_answers("captions", questions, decoding, answer, folder, policy.digest)
        return [said[start : start + self.captions] for start in range(0, len(said), self.captions)]

    def _policy(self, seed: int) -> Identity:
        """What a sampled caption depends on besides its question and picture."""
        said = self.model.model_dump(mode="json", exclude=set(SILENT))
        parts = {key: value for key, value in flat({"model": said}) if not is_free(key)}
        source = getattr(self.model, "source", None)
        parts |= computing(None if source is None else weights_digest(source)) if self.model.trainable else {}
        if self.model.answers_depend_on_batch:
            parts["batch_size"] = self.batch_size
        parts |= {"adapters": [adapter_digest(adapter) for adapter in self.chain], "seed": seed}
        parts |= {
            "captions": self.captions,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }
        return identity(parts, {})

    def _prepare(self) -> None:
        """Make the model's folder where the model is made on first use."""
        if getattr(self.model, "prepare", None):
            make(self.model.prepare)


def _figures(
    captions: Sequence[Sequence[str]],
    judged: Sequence[Sequence[Reading] | str],
    false: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """Counts, and means over captions: of all, of the preferred and of the dispreferred ones."""
    readings = [reading for found in judged if not isinstance(found, str) for reading in found]
    means = {
        "false_objects": [len(reading.false) for reading in readings],
        "true_objects": [len(reading.true) for reading in readings],
        "false_objects_preferred": [good for good, _ in false],
        "false_objects_dispreferred": [bad for _, bad in false],
    }
    figures: dict[str, Any] = {"captions": sum(map(len, captions)), "pictures": len(captions)}
    return figures | {name: round(statistics.mean(values), 3) for name, values in means.items() if values}
