"""PreferenceDataModule: batches of <image, preferred, dispreferred>, with distorted images made ahead of the step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from povid.fault import Fault
from povid.method.distortions import Distortion, distort_picture, generator
from povid.method.objectives import ON_DISTORTED, Terms, Weigh
from povid.model.packing import Encoded, Packed, pack, stack
from povid.model.template import Template
from povid.preferences.pictures import Pictures, open_picture
from povid.preferences.triple import Triple
from povid.training.digest import record_digest


class Example(NamedTuple):
    """One record, ready to be packed. ``digest`` names the content.

    ``noised``: x^n, None if the stage uses none; ``noised_for_reference``: one that is the reference's own, if any.
    """

    record: int
    name: str
    preferred: Encoded
    dispreferred: Encoded
    images: dict[str, Tensor]
    noised: dict[str, Tensor] | None
    digest: str = ""
    noised_for_reference: dict[str, Tensor] | None = None


class PreferenceBatch(NamedTuple):
    """The input of one training step.

    ``pairs`` packs preferred and dispreferred together, or the preferred side alone if no term needs the other;
    ``preferred`` packs the preferred side alone for the distorted image (None without one). For models whose sequences
    cannot be packed, ``pairs`` is the preferred side and ``dispreferred`` the other. ``images`` and ``noised`` hold the
    processor's tensors of x and x^n, of all examples in their order; ``noised_for_reference`` those of the x^n that
    only the reference sees, None if it sees the policy's. ``tokens``: the number of tokens of each response [B], or the
    sum of their weights.
    """

    names: list[str]
    records: list[int]
    pairs: Packed
    preferred: Packed | None
    dispreferred: Packed | None
    images: dict[str, Tensor]
    noised: dict[str, Tensor] | None
    digests: Sequence[str] = ()
    tokens: Terms = Terms()
    noised_for_reference: dict[str, Tensor] | None = None


class PreferenceDataset(Dataset):
    """Triples as examples, indexed by (record number, epoch) because each epoch has its own distortions.

    ``distorted_images``: how many of a record's x^n are drawn, one after the other; the second is the reference's.
    """

    def __init__(
        self,
        triples: Sequence[Triple],
        template: Template,
        distortion: Distortion | None,
        seed: int,
        cache_mb: int = 0,
        distorted_images: int = 1,
    ) -> None:
        self.triples, self.template, self.seed = triples, template, seed
        everything = Pictures([picture for triple in triples for picture in triple.pictures])
        self.distortion = distortion and distortion.among(everything)
        self.distorted_images = distorted_images
        self.cache_bytes, self.cached_bytes = cache_mb * 2**20, 0
        self.cache: OrderedDict[int, tuple] = OrderedDict()

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        record, epoch = key
        triple = self.triples[record]
        of_pixels = self.distortion is not None and self.distortion.space == "pixel"
        needed = triple.pictures if of_pixels or record not in self.cache else ()
        pictures = tuple(map(open_picture, needed))  # decoded once
        (preferred, dispreferred), images, digest = self._encoded(record, pictures)
        noised, *second = self._distorted(triple, pictures, images, record, epoch)
        return Example(record, triple.id, preferred, dispreferred, images, noised, digest, *second)

    def _encoded(self, record: int, pictures: tuple[Image.Image, ...]) -> tuple[list[Encoded], dict[str, Tensor], str]:
        if record in self.cache:
            self.cache.move_to_end(record)
            return self.cache[record]
        triple = self.triples[record]
        encoded, images = self.template.encode((triple.preferred, triple.dispreferred), pictures, triple.id)
        preferred, dispreferred = encoded
        entry = encoded, images, record_digest(preferred, dispreferred, images)
        size = sum(tensor.nbytes for tensor in images.values())
        if size <= self.cache_bytes:
            self.cache[record], self.cached_bytes = entry, self.cached_bytes + size
            while self.cached_bytes > self.cache_bytes:
                _, (_, old, _) = self.cache.popitem(last=False)
                self.cached_bytes -= sum(tensor.nbytes for tensor in old.values())
        return entry

    def _distorted(
        self, triple: Triple, pictures: Sequence[Image.Image], images: dict[str, Tensor], record: int, epoch: int
    ) -> list[dict[str, Tensor] | None]:
        if self.distortion is None:
            return [None]
        if not images:
            raise Fault(
                f"record {triple.id!r} has no picture to be distorted; remove it, or leave the noise dispreference out "
                "with ablation=text"
            )
        count = range(len(triple.pictures))
        sources = [generator(seed=self.seed, epoch=epoch, record=record, picture=number) for number in count]
        if self.distortion.space == "normalized":
            pixels = images["pixel_values"]
            draws = [self.distortion(pixels, sources[0]) for _ in range(self.distorted_images)]
            return [{**images, "pixel_values": drawn} for drawn in draws]
        prompt = self.template.prompt(triple.question, pictures=len(pictures))
        found = []
        for _ in range(self.distorted_images):
            drawn = [distort_picture(self.distortion, *pair) for pair in zip(pictures, sources)]
            found.append(self.template.see(prompt, *map(self.template.picture, drawn))[1])
        return found


def collate(
    examples: Sequence[Example], terms: Set[str], *, packable: bool, padding_id: int, weigh: Weigh | None = None
) -> PreferenceBatch:
    """Pack a list of examples for an objective that reads ``terms`` and may ``weigh`` tokens."""
    preferred = [example.preferred for example in examples]
    dispreferred = [example.dispreferred for example in examples] if "text" in terms else None
    noised = bool(ON_DISTORTED & terms)
    pairs = pack(preferred, dispreferred if packable else None, padding_id=padding_id)
    alone = (
        (pack(preferred, None, padding_id=padding_id) if pairs.dispreferred is not None else pairs) if noised else None
    )
    apart = pack(dispreferred, None, padding_id=padding_id) if dispreferred is not None and not packable else None
    counts: list[float] = [sum(example.preferred.response[1:]) for example in examples]
    text_counts: list[float] = [sum(example.dispreferred.response[1:]) for example in examples]
    if weigh is not None:
        weights = [weigh(response_tokens(e.preferred), response_tokens(e.dispreferred)) for e in examples]
        w_N, l_N = (torch.tensor([weight for pair in weights for weight in pair[side]]) for side in (0, 1))
        counts, text_counts = ([float(sum(pair[side])) for pair in weights] for side in (0, 1))
        pairs = pairs._replace(preferred=pairs.preferred._replace(weight_N=w_N))
        if pairs.dispreferred is not None:
            pairs = pairs._replace(dispreferred=pairs.dispreferred._replace(weight_N=l_N))
        if alone is not None:
            alone = alone._replace(preferred=alone.preferred._replace(weight_N=w_N))
        if apart is not None:
            apart = apart._replace(preferred=apart.preferred._replace(weight_N=l_N))
    counted = {term: torch.tensor(text_counts if term == "text" else counts) for term in terms}
    return PreferenceBatch(
        [example.name for example in examples],
        [example.record for example in examples],
        pairs,
        alone,
        apart,
        stack([example.images for example in examples]),
        stack([example.noised for example in examples]) if noised else None,
        [example.digest for example in examples],
        Terms(**counted),
        stack([example.noised_for_reference for example in examples])
        if noised and examples[0].noised_for_reference is not None
        else None,
    )


def response_tokens(encoded: Encoded) -> list[int]:
    """The token ids of a conversation's responses, in order."""
    return [token for token, marked in zip(encoded.input_ids[1:], encoded.response[1:]) if marked]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (record number, epoch): shuffled by seed and epoch, grouped by length, split over devices.

    A global batch is ``batch_size`` x ``world`` records and each device takes every ``world``-th of it, so that the
    same seed and global batch give the same gradient on any number of devices. Records of the last global batch that
    cannot be split evenly over the devices are dropped in that epoch. ``skip`` is the number of batches that an
    interrupted run has already trained on.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        group_by_length: bool = True,
        skip: int = 0,
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch
        self.rank, self.world, self.group_by_length, self.skip = rank, world, group_by_length, skip

    def order(self) -> list[list[int]]:
        """All global batches of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        size = self.batch_size * self.world
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length or size == 1:
            return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        # Sorting within 16 batches keeps padding rare and the order of the records close to random.
        pool = 16 * size
        batches = []
        for start in range(0, len(shuffled), pool):
            chunk = sorted(shuffled[start : start + pool], key=lambda i: self.lengths[i], reverse=True)
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        full = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        return [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + rest

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order()[self.skip :]:
            even = len(batch) - len(batch) % self.world
            if even:
                yield [(record, self.epoch) for record in batch[self.rank : even : self.world]]

    def __len__(self) -> int:
        size = self.batch_size * self.world
        full, rest = divmod(len(self.lengths), size)
        return full + (rest >= self.world)


def even_batches(lengths: Sequence[int], batch_size: int, *, rank: int = 0, world: int = 1) -> list[list[int]]:
    """One device's batches of all records, in order of length.

    Every record is in one batch of one device, and every device has as many batches, since in each of them all devices
    work together. Where that does not come out even a batch may hold more than ``batch_size`` records, at most twice.

    Raises:
        Fault: there are fewer records than devices.
    """
    if len(lengths) < world:
        raise Fault(
            f"data.validation: {len(lengths)} held-out records cannot be divided among {world} devices; hold out more"
        )
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    count = min(-(-len(order) // (batch_size * world)), len(order) // world)
    ends = [len(order) * number // count for number in range(count + 1)]
    return [order[start:end][rank::world] for start, end in pairwise(ends)]


def _lengths(triples: Sequence[Triple]) -> list[int]:
    """Characters of each record's responses and questions, by which records are grouped."""
    return [sum(len(turn.text) for turn in (*t.preferred, *t.dispreferred)) for t in triples]


class PreferenceDataModule(L.LightningDataModule):
    """Serves <image, preferred, dispreferred> triples to one stage of training.

    Args:
        triples: the records.
        template: turns a record into tokens and image tensors.
        terms: what the stage's objective reads (:class:`povid.method.objectives.Terms`).
        distortion: makes x^n; used where a term needs it.
        distorted_images: 2: the reference sees an x^n of its own (``Objective.distorted_images``).
        weigh: the objective's token weights; None if all tokens count equally.
        packable: whether the model takes packed sequences (``Policy.packable``).
        batch_size: records per device and step.
        seed: of the order of the records and of the noise.
        workers: number of loader processes.
        cache_mb: how many MiB of processed images each loader process may keep.
        group_by_length: whether batches group records of similar length.
        held_out: records for validation.

    Raises:
        Fault: there are no records, or fewer held-out ones than devices.
        ValueError: a term needs a distortion and there is none.
    """

    def __init__(
        self,
        triples: Sequence[Triple],
        template: Template,
        *,
        terms: Set[str],
        packable: bool,
        batch_size: int,
        seed: int,
        distortion: Distortion | None = None,
        distorted_images: int = 1,
        weigh: Weigh | None = None,
        workers: int = 0,
        cache_mb: int = 0,
        group_by_length: bool = True,
        held_out: Sequence[Triple] = (),
    ) -> None:
        super().__init__()
        if not triples:
            raise Fault("the preference data contain no record; check data.preferences")
        needs_distortion = bool(ON_DISTORTED & terms)
        if needs_distortion and distortion is None:
            raise ValueError(f"the terms {', '.join(sorted(ON_DISTORTED & terms))} need a distortion")
        used = distortion if needs_distortion else None
        self.dataset = PreferenceDataset(triples, template, used, seed, cache_mb, distorted_images)
        self.held_out = PreferenceDataset(held_out, template, used, seed, cache_mb, distorted_images)
        self.lengths, self.held_out_lengths = _lengths(triples), _lengths(held_out)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.terms, self.weigh, self.packable, self.group_by_length = frozenset(terms), weigh, packable, group_by_length
        self.padding_id = template.processor.tokenizer.pad_token_id or 0
        self.seen = (0, 0)  # epoch, and number of its batches that an interrupted run had trained on

    def train_dataloader(self) -> DataLoader:
        """The loader of the trainer's current epoch (the trainer asks for a new one each epoch)."""
        trainer = self.trainer
        epoch = trainer.current_epoch if trainer else 0
        batches = EpochBatches(
            self.lengths,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            group_by_length=self.group_by_length,
            skip=self.seen[1] if epoch == self.seen[0] else 0,
        )
        return DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # not the global one, which dropout uses
        )

    def val_dataloader(self) -> DataLoader | list:
        """The loader of the held-out records: always in the same batches, with the noise of epoch 0."""
        if not len(self.held_out):
            return []
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        batches = even_batches(self.held_out_lengths, self.batch_size, rank=rank, world=world)
        return DataLoader(
            self.held_out,
            batch_sampler=[[(record, 0) for record in batch] for batch in batches],
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the data, for checkpoints (Lightning's hook)."""
        return {"epoch": self.trainer.current_epoch, "batches": self.trainer.fit_loop.batch_idx + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position (Lightning's hook)."""
        self.seen = (state["epoch"], state["batches"])

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        return collate(examples, self.terms, packable=self.packable, padding_id=self.padding_id, weigh=self.weigh)
