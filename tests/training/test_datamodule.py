from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image

from povid.fault import Fault
from povid.method.distortions.crop import Crop
from povid.method.distortions.other_picture import OtherPicture
from povid.model.packing import Encoded, pack
from povid.model.template import pad_to_square
from povid.training.datamodule import EpochBatches, PreferenceDataModule, PreferenceDataset, collate

TERMS = frozenset({"preferred", "text", "noise"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.load(tiny.save_tiny_llava(folder)), tiny.triples(folder)


def test_a_packed_pair_by_hand():
    """Shared 1 2 3 (3 is the first token of both responses), y_w continues 4 9, y_l 5 6 9.

    Token 3 is predicted from column 1, 4 and 5 both from column 2; 9 of y_w from its 4 in column 3; of y_l, 6 from its
    5 in column 5 and 9 from its 6 in column 6.
    """
    w = Encoded([1, 2, 3, 4, 9], [False, False, True, True, True])
    l = Encoded([1, 2, 3, 5, 6, 9], [False, False, True, True, True, True])
    packed = pack([w], [l])
    assert packed.input_ids_BT.tolist() == [[1, 2, 3, 4, 9, 5, 6, 9]]
    assert packed.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert packed.segment_BT.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert packed.column_U.tolist() == [1, 2, 3, 5, 6]
    columns = packed.column_U
    assert columns[packed.preferred.position_N].tolist() == [1, 2, 3]
    assert packed.preferred.token_N.tolist() == [3, 4, 9]
    assert columns[packed.dispreferred.position_N].tolist() == [1, 2, 5, 6]
    assert packed.dispreferred.token_N.tolist() == [3, 5, 6, 9]
    assert packed.attention()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 1, 1, 1],
    ]


def test_every_record_appears_once_per_epoch_and_epochs_differ():
    batches = [list(EpochBatches(list(range(23)), 4, seed=1, epoch=epoch)) for epoch in (0, 0, 1)]
    for epoch in batches:
        assert sorted(record for batch in epoch for record, _ in batch) == list(range(23))
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 4, 3]
    assert batches[0] == batches[1] != batches[2]
    assert {epoch for batch in batches[2] for _, epoch in batch} == {1}


def test_devices_share_the_same_global_batches():
    """Two devices with batches of 2 see together what one device with batches of 4 sees; the odd record of the
    last global batch (3 records on 2 devices) is dropped."""
    lengths = [7 * i % 13 for i in range(11)]
    one = [{record for record, _ in batch} for batch in EpochBatches(lengths, 4, seed=5)]
    shards = [list(EpochBatches(lengths, 2, seed=5, rank=rank, world=2)) for rank in (0, 1)]
    assert len(shards[0]) == len(shards[1]) == len(EpochBatches(lengths, 2, seed=5, world=2)) == 3
    together = [{record for record, _ in (*a, *b)} for a, b in zip(*shards)]
    assert together[:2] == one[:2] and together[2] < one[2] and len(together[2]) == 2


def test_skipping_resumes_where_an_interrupted_epoch_stopped():
    whole = list(EpochBatches([1] * 10, 3, seed=2, epoch=4))
    assert list(EpochBatches([1] * 10, 3, seed=2, epoch=4, skip=2)) == whole[2:]


def test_batches_group_similar_lengths():
    lengths = torch.randint(1, 200, (640,), generator=torch.Generator().manual_seed(0)).tolist()

    def spread(**options):
        batches = EpochBatches(lengths, 8, seed=0, **options)
        return sum(max(lengths[r] for r, _ in b) - min(lengths[r] for r, _ in b) for b in batches)

    assert spread() < spread(group_by_length=False) / 4


def test_noise_does_not_depend_on_the_batch(loaded):
    (_, template), triples = loaded
    noise = tiny.noise()
    dataset = PreferenceDataset(triples, template, noise, seed=7)
    alone = collate([dataset[2, 1]], TERMS, packable=True, padding_id=2)
    batch = collate([dataset[i, 1] for i in (0, 3, 2)], TERMS, packable=True, padding_id=2)
    assert torch.equal(batch.noised["pixel_values"][2], alone.noised["pixel_values"][0])
    assert not torch.equal(batch.noised["pixel_values"][2], dataset[2, 0].noised["pixel_values"][0])


def test_pixel_noise_is_added_before_padding(loaded):
    """The bars that padding adds stay the mean colour, which normalises to about zero."""
    (_, template), triples = loaded
    template = tiny.Template(template.processor, system="", pad_square=True, max_length=128)
    example = PreferenceDataset(triples, template, tiny.noise(space="pixel"), seed=0)[0, 0]
    rows = example.noised["pixel_values"][0].abs().amax(dim=(0, 2))  # pictures are 40 x 32, so the top is a bar
    assert rows[0] < 0.02 < rows[16]


@pytest.mark.parametrize("space", ["pixel", "normalized"])
def test_each_picture_of_a_record_is_distorted_with_its_own_noise(loaded, space):
    """The first as if it were alone; the same picture in second place in another way, and again in the next epoch."""
    (_, template), triples = loaded
    image = triples[0].image
    records = [replace(triples[0], image=shown) for shown in (image, (image, image))]

    def noised(record, epoch=0, draws=1):
        dataset = PreferenceDataset([records[record]], template, tiny.noise(space=space), 5, distorted_images=draws)
        return dataset[0, epoch]

    alone, both = noised(0).noised["pixel_values"], noised(1).noised["pixel_values"]
    assert both.shape == (2, *alone.shape[1:])
    if space == "pixel":
        assert torch.equal(both[:1], alone)
    assert (both[0] - both[1]).abs().mean() > 0.1
    assert torch.equal(noised(1).noised["pixel_values"], both)
    assert not torch.equal(noised(1, epoch=1).noised["pixel_values"][1], both[1])
    twice = noised(1, draws=2)
    assert torch.equal(twice.noised["pixel_values"], both)
    assert (twice.noised_for_reference["pixel_values"] - both).abs().flatten(1).mean(1).min() > 0.1


def test_a_record_without_a_picture_has_nothing_to_distort(loaded):
    (_, template), triples = loaded
    records = [triples[1], replace(triples[0], image=None)]
    with pytest.raises(Fault, match="record 'short' has no picture to be distorted.*ablation=text"):
        PreferenceDataset(records, template, tiny.noise(), seed=0)[1, 0]
    dataset = PreferenceDataset(records, template, None, seed=0)
    assert dataset[1, 0].images == {} and dataset[1, 0].noised is None


@pytest.mark.parametrize(("space", "mb"), [("pixel", 0), ("pixel", 1), ("normalized", 0)])
def test_a_picture_is_decoded_once_an_epoch(loaded, monkeypatch, space, mb):
    (_, template), triples = loaded
    opened = []
    monkeypatch.setattr(Image, "open", lambda file, open=Image.open: opened.append(file) or open(file))
    dataset = PreferenceDataset(triples, template, tiny.noise(space=space), 0, cache_mb=mb)
    for epoch in range(2):
        _ = [dataset[record, epoch] for record in range(3)]
    assert opened == [triple.image for triple in triples[:3]] * 2


def test_cache_is_bounded_and_changes_nothing(loaded):
    (_, template), triples = loaded
    plain, cached = (PreferenceDataset(triples, template, tiny.noise(), 0, cache_mb=mb) for mb in (0, 1))
    cached.cache_bytes = 30_000  # room for two pictures of 12,288 bytes
    for record in (0, 1, 2, 3, 2, 3):
        assert torch.equal(plain[record, 0].noised["pixel_values"], cached[record, 0].noised["pixel_values"])
    assert list(cached.cache) == [2, 3] and cached.cached_bytes == 2 * 3 * 32 * 32 * 4
    assert not plain.cache


def test_workers_give_the_same_batches(loaded):
    (_, template), triples = loaded
    loaders = [
        PreferenceDataModule(
            triples,
            template,
            terms=TERMS,
            distortion=tiny.noise(),
            packable=True,
            batch_size=2,
            seed=3,
            workers=workers,
        ).train_dataloader()
        for workers in (0, 2)
    ]
    for here, there in zip(*loaders):
        assert here.names == there.names
        assert torch.equal(here.noised["pixel_values"], there.noised["pixel_values"])
        assert torch.equal(here.pairs.input_ids_BT, there.pairs.input_ids_BT)


def test_pad_to_square_by_hand():
    """A 2 x 4 picture (width x height) goes between two columns of the mean colour (0.5 -> int(127.5) = 127)."""
    square = pad_to_square(Image.new("RGB", (2, 4), (255, 0, 0)), (0.5, 0.5, 0.5))
    assert square.size == (4, 4)
    assert [square.getpixel((x, 0)) for x in range(4)] == [(127,) * 3, (255, 0, 0), (255, 0, 0), (127,) * 3]


def test_the_references_own_distorted_image_is_a_second_draw(loaded):
    """The first draw is what it is without a second one, in both spaces."""
    (_, template), triples = loaded
    for distortion in (Crop(0.3, 0.6), tiny.noise()):
        one = PreferenceDataset(triples, template, distortion, seed=3)
        two = PreferenceDataset(triples, template, distortion, seed=3, distorted_images=2)
        assert one[1, 0].noised_for_reference is None
        first, second = (two[1, 0].noised["pixel_values"], two[1, 0].noised_for_reference["pixel_values"])
        assert torch.equal(first, one[1, 0].noised["pixel_values"]) and not torch.equal(first, second)
        assert torch.equal(second, two[1, 0].noised_for_reference["pixel_values"])
        batch = collate([two[i, 0] for i in (1, 2)], TERMS, packable=True, padding_id=2)
        assert torch.equal(batch.noised_for_reference["pixel_values"][0], second[0])
        assert collate([one[1, 0]], TERMS, packable=True, padding_id=2).noised_for_reference is None


def test_loader_processes_draw_the_same_other_pictures(loaded):
    (_, template), triples = loaded

    def noised(workers: int, batch_size: int) -> dict[int, torch.Tensor]:
        data = PreferenceDataModule(
            triples,
            template,
            terms=TERMS,
            distortion=OtherPicture(),
            packable=True,
            batch_size=batch_size,
            seed=0,
            workers=workers,
        )
        return {
            record: image
            for batch in data.train_dataloader()
            for record, image in zip(batch.records, batch.noised["pixel_values"])
        }

    alone, together = noised(0, 4), noised(2, 1)
    assert alone.keys() == together.keys() == {0, 1, 2, 3}
    own = [template.encode((t.preferred,), t.image, t.id)[1]["pixel_values"][0] for t in triples]
    for record, image in alone.items():
        assert torch.equal(image, together[record])
        assert [i for i in range(4) if torch.equal(image, own[i])] not in ([], [record])
