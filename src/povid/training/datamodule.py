"""PreferenceDataModule: batches of <image, preferred, dispreferred>, noised images made ahead of the step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from povid.fault import Fault
from povid.method import noise
from povid.model.packing import Encoded, Packed, pack, stack
from povid.model.template import Template
from povid.preferences.pictures import open_picture
from povid.preferences.triple import Triple
from povid.training.digest import record_digest


@dataclass(frozen=True, slots=True)
class NoiseSettings:
    """Eq. 4: ``schedule`` sigmoid, linear or cosine; ``step`` k in 0..999; ``space`` where the noise is added.

    ``normalized``: the tensor that the model sees. ``pixel``: the picture in [0, 1], before padding and resizing, then
    back to 8 bits: clamped, or (``wrap_around``) with the released code's wrap-around of values outside [0, 1].
    """

    schedule: str = "sigmoid"
    step: int = 500
    space: str = "normalized"
    beta_start: float = 1e-5
    beta_end: float = 5e-3
    wrap_around: bool = False

    def distort(self, x: Tensor, eps: Tensor) -> Tensor:
        return noise.distort(
            x, eps, step=self.step, schedule=self.schedule, beta_start=self.beta_start, beta_end=self.beta_end
        )

    def distort_picture(self, picture: Image.Image, *, seed: int, epoch: int, record: int) -> Image.Image:
        """A noised 8-bit picture of the same size (space ``pixel``)."""
        import numpy as np

        x = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        noised = self.distort(x, noise.draw(tuple(x.shape), seed=seed, epoch=epoch, record=record))
        values = noise.to_bytes(noised, wrap_around=self.wrap_around).permute(1, 2, 0)
        return Image.fromarray(values.numpy())


class Example(NamedTuple):
    """One record, ready to be packed. ``noised`` is None where the stage adds none; ``digest`` names the content."""

    record: int
    name: str
    preferred: Encoded
    dispreferred: Encoded
    images: dict[str, Tensor]
    noised: dict[str, Tensor] | None
    digest: str = ""


class PreferenceBatch(NamedTuple):
    """What one step reads.

    ``pairs`` packs preferred and dispreferred together, or the preferred side alone where the stage has no text
    dispreference; ``preferred`` packs the preferred side alone for the noised image (None without noise). For models
    whose sequences cannot be packed ``pairs`` is the preferred side and ``dispreferred`` the other.
    ``images`` and ``noised`` hold the processor's tensors, one row (or more) per example.
    """

    names: list[str]
    records: list[int]
    pairs: Packed
    preferred: Packed | None
    dispreferred: Packed | None
    images: dict[str, Tensor]
    noised: dict[str, Tensor] | None
    digests: Sequence[str] = ()


class PreferenceDataset(Dataset):
    """Triples as examples; an item is asked for as (record number, epoch), since each epoch draws new noise."""

    def __init__(
        self,
        triples: Sequence[Triple],
        template: Template,
        noise_settings: NoiseSettings | None,
        seed: int,
        cache_mb: int = 0,
    ) -> None:
        self.triples, self.template, self.noise, self.seed = triples, template, noise_settings, seed
        self.cache_bytes, self.cached_bytes = cache_mb * 2**20, 0
        self.cache: OrderedDict[int, tuple] = OrderedDict()

    def __len__(self) -> int:
        return len(self.triples)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        record, epoch = key
        triple = self.triples[record]
        (preferred, dispreferred), images, digest = self._encoded(record)
        noised = self._noised(triple, images, record, epoch)
        return Example(record, triple.id, preferred, dispreferred, images, noised, digest)

    def _encoded(self, record: int) -> tuple[list[Encoded], dict[str, Tensor], str]:
        if record in self.cache:
            self.cache.move_to_end(record)
            return self.cache[record]
        triple = self.triples[record]
        encoded, images = self.template.encode((triple.preferred, triple.dispreferred), triple.image, triple.id)
        entry = encoded, images, record_digest(*encoded, images)
        size = sum(tensor.nbytes for tensor in images.values())
        if size <= self.cache_bytes:
            self.cache[record], self.cached_bytes = entry, self.cached_bytes + size
            while self.cached_bytes > self.cache_bytes:
                _, (_, old, _) = self.cache.popitem(last=False)
                self.cached_bytes -= sum(tensor.nbytes for tensor in old.values())
        return entry

    def _noised(self, triple: Triple, images: dict[str, Tensor], record: int, epoch: int) -> dict[str, Tensor] | None:
        if self.noise is None:
            return None
        if self.noise.space == "pixel":
            noised = self.noise.distort_picture(open_picture(triple.image), seed=self.seed, epoch=epoch, record=record)
            return self.template.see(self.template.prompt(triple.question), self.template.picture(noised))[1]
        pixels = images["pixel_values"]
        eps = noise.draw(tuple(pixels.shape), seed=self.seed, epoch=epoch, record=record)
        return {**images, "pixel_values": self.noise.distort(pixels, eps)}


def collate(examples: Sequence[Example], *, text: bool, packable: bool, padding_id: int) -> PreferenceBatch:
    """Pack a list of examples; ``text`` says whether the stage scores the text-dispreferred responses."""
    preferred = [example.preferred for example in examples]
    dispreferred = [example.dispreferred for example in examples] if text else None
    noised = examples[0].noised is not None
    pairs = pack(preferred, dispreferred if packable else None, padding_id=padding_id)
    together = pairs.dispreferred is not None
    return PreferenceBatch(
        [example.name for example in examples],
        [example.record for example in examples],
        pairs,
        (pack(preferred, None, padding_id=padding_id) if together else pairs) if noised else None,
        pack(dispreferred, None, padding_id=padding_id) if text and not packable else None,
        stack([example.images for example in examples]),
        stack([example.noised for example in examples]) if noised else None,
        [example.digest for example in examples],
    )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (record number, epoch): shuffled by seed and epoch, like lengths together, shared out over devices.

    A global batch is ``batch_size`` x ``world`` records and each device takes every ``world``-th of it, so that the
    same seed and global batch give the same gradient on any number of devices. Records that do not fill the last
    global batch evenly over the devices are left out of that epoch. ``skip`` leaves out batches that a run has seen
    before it was interrupted.
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


class PreferenceDataModule(L.LightningDataModule):
    """Serves <image, preferred, dispreferred> triples to one stage of training.

    Args:
        triples: the records.
        template: turns a record into tokens and image tensors.
        noise: distortion of the image; None in a stage without noise.
        text: whether the stage scores text-dispreferred responses.
        packable: whether the model takes packed sequences (``Policy.packable``).
        batch_size: records per device and step; seed: order and noise; workers: loader processes;
        cache_mb: bound of the memory in which each loader process keeps processed images.
    """

    def __init__(
        self,
        triples: Sequence[Triple],
        template: Template,
        *,
        noise: NoiseSettings | None,
        text: bool,
        packable: bool,
        batch_size: int,
        seed: int,
        workers: int = 0,
        cache_mb: int = 0,
        group_by_length: bool = True,
    ) -> None:
        super().__init__()
        if not triples:
            raise Fault("the preference data holds no record; check data.preferences")
        self.dataset = PreferenceDataset(triples, template, noise, seed, cache_mb)
        self.lengths = [sum(len(turn.text) for turn in (*t.preferred, *t.dispreferred)) for t in triples]
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.text, self.packable, self.group_by_length = text, packable, group_by_length
        self.padding_id = template.processor.tokenizer.pad_token_id or 0
        self.seen = (0, 0)  # epoch and batches of it that an interrupted run had trained on

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
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global one, dropout's, alone
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the data, for checkpoints (Lightning's hook)."""
        return {"epoch": self.trainer.current_epoch, "batches": self.trainer.fit_loop.batch_idx + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind that position (Lightning's hook)."""
        self.seen = (state["epoch"], state["batches"])

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        return collate(examples, text=self.text, packable=self.packable, padding_id=self.padding_id)
