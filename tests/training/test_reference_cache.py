"""The cached reference: the same loss, hit only by the same content, shared by processes, unharmed by a kill."""

from __future__ import annotations

import lightning as L
import pytest
import tiny
import torch

from povid.method.objectives import ON_DISTORTED, Terms
from povid.method.objectives.dpo import DPO
from povid.method.objectives.povid import POVID
from povid.method.objectives.released import Released
from povid.model.packing import Encoded
from povid.training.datamodule import PreferenceDataModule, PreferenceDataset, collate
from povid.training.digest import record_digest
from povid.training.reference_cache import STEPS_KEPT_BACK, ReferenceCache, folder_key
from povid.training.scoring import score


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tiny_llava(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder):
    return tiny.load(folder)


def batch_of(template, tmp_path, which, terms=DPO.needs):
    distortion = tiny.noise() if terms & ON_DISTORTED else None
    dataset = PreferenceDataset([tiny.triples(tmp_path)[i] for i in which], template, distortion, seed=3)
    return collate([dataset[i, 0] for i in range(len(which))], terms, packable=True, padding_id=2)


def test_cached_equals_uncached(loaded, tmp_path):
    policy, template = loaded
    batch = batch_of(template, tmp_path, (0, 1, 2, 3), POVID.needs)
    plain = score(policy, batch, POVID.needs)
    cache = ReferenceCache(tmp_path, "k" * 64)
    assert cache.find(batch) is None
    cache.keep(batch, plain[1])
    cache.flush()
    known = ReferenceCache(tmp_path, "k" * 64).find(batch)
    for term in ("preferred", "text"):
        assert torch.equal(getattr(known, term), getattr(plain[1], term))
    cached = score(policy, batch, POVID.needs, known_reference=known)
    for one, other in zip((*plain[0][:3], *plain[1][:3]), (*cached[0][:3], *cached[1][:3])):
        assert torch.equal(one, other)


def test_noise_on_clean_cannot_use_it(loaded, tmp_path):
    policy, template = loaded
    batch = batch_of(template, tmp_path, (0,), Released.needs)
    with pytest.raises(ValueError, match="logits"):
        score(policy, batch, Released.needs, known_reference=Terms(torch.zeros(1), torch.zeros(1)))


def test_a_batch_with_an_unknown_record_is_not_found(loaded, tmp_path):
    _, template = loaded
    cache = ReferenceCache(tmp_path, "k" * 64)
    first = batch_of(template, tmp_path, (0, 1))
    cache.keep(first, Terms(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])))
    cache.flush()
    assert cache.find(first).text.tolist() == [-3, -4]
    assert cache.find(batch_of(template, tmp_path, (1, 0))).preferred.tolist() == [-2, -1]
    assert cache.find(batch_of(template, tmp_path, (1, 2))) is None


def test_every_part_of_a_record_counts():
    one, other = Encoded([1, 2, 3], [False, False, True]), Encoded([1, 2, 4], [False, False, True])
    images = {"pixel_values": torch.zeros(1, 3, 2, 2)}
    digests = {
        record_digest(one, other, images),
        record_digest(other, one, images),
        record_digest(one, one, images),
        record_digest(one, Encoded([1, 2, 4], [False, True, True]), images),
        record_digest(one, other, {"pixel_values": torch.full((1, 3, 2, 2), 1e-7)}),
        record_digest(one, other, {"pixel_values": torch.zeros(1, 3, 4, 1)}),
        record_digest(one, other, {**images, "image_sizes": torch.tensor([2, 2])}),
        record_digest(Encoded([1, 2], [False, False]), Encoded([3, 1, 2, 4], [True, False, False, True]), images),
    }
    assert len(digests) == 8
    assert record_digest(one, other, images) == record_digest(one, other, {"pixel_values": torch.zeros(1, 3, 2, 2)})


def test_key_follows_the_reference_and_not_the_adapter(folder):
    def key(change=None, run=None, **load):
        policy, _ = tiny.load(folder, **load)
        if change:
            change(policy)
        return folder_key(policy, **(run or {"precision": "32-true"}))

    def nudge(name):
        def change(policy):
            parameter = next(p for n, p in policy.network.named_parameters() if name in n and not p.requires_grad)
            parameter.data.view(-1)[7] += 1e-6

        return change

    def train(policy):
        for parameter in (p for group in policy.trained_parameters() for p in group):
            parameter.data += 1.0

    def config(policy):
        policy.network.config.text_config.rms_norm_eps *= 2

    base = key()
    assert base == key() == key(train)
    others = [
        key(nudge("vision_tower")),
        key(nudge("lm_head")),
        key(nudge("original_module")),
        key(config),
        key(nudge("q_proj.base_layer")),
        key(run={"precision": "bf16-mixed"}),
        key(dtype=torch.float64),
        key(attention="eager"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_another_process_and_a_torn_line(loaded, tmp_path):
    _, template = loaded
    batch = batch_of(template, tmp_path, (0, 1))
    mine, theirs = ReferenceCache(tmp_path, "k" * 64), ReferenceCache(tmp_path, "k" * 64)
    mine.keep(batch, Terms(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])))
    mine.flush()
    (file,) = mine.folder.glob("*.jsonl")
    file.write_text(file.read_text().rstrip()[:-5])  # killed in the second record's line
    assert theirs.find(batch) is None
    theirs.load()
    assert theirs.known == {batch.digests[0]: [-1.0, -3.0]}
    theirs.keep(batch, Terms(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])))  # appends behind the tear
    theirs.flush()
    assert ReferenceCache(tmp_path, "k" * 64).find(batch).preferred.tolist() == [-1, -2]


def test_a_damaged_line_is_dropped_counted_and_computed_again(loaded, tmp_path, caplog):
    _, template = loaded
    batch = batch_of(template, tmp_path, (0, 1))
    honest = Terms(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0]))
    cache = ReferenceCache(tmp_path, "k" * 64)
    cache.keep(batch, honest)
    cache.flush()
    (file,) = cache.folder.glob("*.jsonl")
    content = file.read_text()
    first = batch.digests[0]
    for old, new in (
        ("[-1.0, -3.0]", "[9.0, -3.0]"),
        ("2, [-1.0, -3.0]", "1, [-1.0]"),
        ("[-1.0, -3.0]", '"ab"'),
        (first, batch.digests[0][::-1]),
        ("[-1.0, -3.0]", "[" * 5000),
    ):
        assert old in content
        file.write_text(content.replace(old, new, 1))
        caplog.clear()
        again = ReferenceCache(tmp_path, "k" * 64)
        assert list(again.known) == [batch.digests[1]] and again.find(batch) is None, new[:40]
        assert "fail their checksum and are not used: 1;" in caplog.text
        again.load()
        assert caplog.text.count("fail their checksum") == 1, "told once"
        again.keep(batch, honest)
        again.flush()
        assert ReferenceCache(tmp_path, "k" * 64).find(batch).preferred.tolist() == [-1, -2]
    file.rename(tmp_path / "moved.jsonl")
    (tmp_path / ("l" * 32)).mkdir()
    (tmp_path / "moved.jsonl").rename(tmp_path / ("l" * 32) / file.name)
    assert not ReferenceCache(tmp_path, "l" * 64).known, "values of another key"


def test_values_wait_before_they_are_written(loaded, tmp_path):
    _, template = loaded
    batch, cache = batch_of(template, tmp_path, (0,)), ReferenceCache(tmp_path, "k" * 64)
    for _ in range(STEPS_KEPT_BACK - 1):
        cache.keep(batch, Terms(torch.tensor([-1.0]), torch.tensor([-2.0])))
    assert not cache.folder.exists()
    cache.keep(batch, Terms(torch.tensor([-1.0]), torch.tensor([-2.0])))
    assert cache.folder.exists()


def test_what_is_not_a_number_is_not_kept(loaded, tmp_path):
    _, template = loaded
    batch, cache = batch_of(template, tmp_path, (0,)), ReferenceCache(tmp_path, "k" * 64)
    cache.keep(batch, Terms(torch.tensor([float("nan")]), torch.tensor([-2.0])))
    cache.flush()
    assert not cache.known and not cache.folder.exists()


def test_training_with_and_without_is_the_same(folder, tmp_path, monkeypatch):
    """Three epochs of stage 1: reference forwards in the first alone; a repeated run is the same bit for bit."""
    scored = []
    from povid.training import module as module_file

    monkeypatch.setattr(module_file, "score", lambda *a, **k: scored.append(k["known_reference"]) or score(*a, **k))

    def train(cache):
        scored.clear()
        L.seed_everything(0, verbose=False)
        policy, template = tiny.load(folder, perturb=False)
        stage = tiny.stage("text", epochs=3, projector_lr=1e-3, warmup_ratio=0.03)
        module = tiny.module(policy, DPO(), stage, DPO.needs, reference_cache=cache)
        data = PreferenceDataModule(
            tiny.triples(tmp_path),
            template,
            terms=DPO.needs,
            packable=True,
            batch_size=2,
            seed=5,
            group_by_length=False,
        )
        trainer = L.Trainer(
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module, data)
        return [p.detach().clone() for group in policy.trained_parameters() for p in group], [
            known is not None for known in scored
        ]

    plain, none = train(None)
    first, filled = train(tmp_path / "cache")
    second, full = train(tmp_path / "cache")
    assert none == [False] * 6 and filled == [False] * 2 + [True] * 4 and full == [True] * 6
    assert all(map(torch.equal, first, second))
    for ours, theirs in zip(first, plain):  # a record's padding differs between epochs
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
