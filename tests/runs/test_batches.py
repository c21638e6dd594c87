"""Batches carry seeds that depend on their place in the run only."""
import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler

from convnext_mm.runs import batches
from convnext_mm.runs.random_state import seed_generators


def draws(start: int = 0, epoch: int = 0, size: int = 2, rank: int = 0, processes: int = 1,
          monkeypatch=None) -> list:
    if monkeypatch is not None:
        for module in ('mmengine.dataset.sampler', 'convnext_mm.runs.batches'):
            monkeypatch.setattr(f'{module}.get_dist_info', lambda: (rank, processes))
    sampler = DefaultSampler(range(8), seed=3)
    numbered = batches.NumberedBatches(BatchSampler(sampler, size, drop_last=False), seed=5)
    numbered.start_at(epoch, start)
    return list(numbered)


def test_a_later_start_gives_the_same_rest():
    assert draws(start=2) == draws()[2:]
    assert draws(start=4) == []
    assert len(draws()) == 4


def test_epochs_draw_differently_and_samples_too():
    places = [place for epoch in (0, 1) for batch in draws(epoch=epoch) for _, place in batch]
    assert len(set(places)) == 16


@pytest.mark.parametrize('processes', [2, 4])
def test_more_processes_draw_the_same_in_total(processes, monkeypatch):
    wanted = draws(size=4)
    parts = [draws(size=4 // processes, rank=rank, processes=processes, monkeypatch=monkeypatch)
             for rank in range(processes)]
    assert [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)] == [
        sorted(batch) for batch in wanted]


def test_a_seeded_dataset_is_the_dataset_in_all_else():
    class Data:
        names = ('a',)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index, random.random(), np.random.rand(), float(torch.rand(()))
    data = Data()
    seeded = batches.SeededDataset(data)
    assert seeded[1, (0, 2, 0, 7)] == seeded[1, (0, 2, 0, 7)]
    assert seeded[1, (0, 2, 0, 7)] != seeded[1, (0, 2, 0, 8)]
    assert seeded[1] != seeded[1]
    assert (len(seeded), seeded.names) == (3, ('a',))
    seeded.names = ('b',)
    assert data.names == ('b',)
    with pytest.raises(AttributeError):
        seeded.nothing  # noqa: B018


def test_they_can_be_sent_to_workers():
    seeded = pickle.loads(pickle.dumps(batches.SeededDataset([1, 2])))
    assert seeded[0, (0, 0)].data == 1
    numbered = pickle.loads(pickle.dumps(batches.NumberedBatches([[0, 1]], seed=0)))
    assert [index for index, _ in next(iter(numbered))] == [0, 1]


def test_all_generators_are_seeded():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))
    seed_generators(1, 2, 3)
    first = draw()
    seed_generators(1, 2, 4)
    assert all(a != b for a, b in zip(first, draw(), strict=True))
    seed_generators(1, 2, 3)
    assert draw() == first


@pytest.mark.parametrize(('shuffle', 'size', 'batch', 'processes'), [
    (True, 7, 2, 1), (True, 7, 2, 2), (False, 5, 4, 3), (True, 2, 1, 3), (True, 6, 3, 2)])
def test_an_endless_order_is_that_of_mmengine(shuffle, size, batch, processes, monkeypatch):
    """From the beginning and, with and without a state, from any later batch."""
    for rank in range(processes):
        for module in ('mmengine.dataset.sampler', 'convnext_mm.runs.batches'):
            monkeypatch.setattr(f'{module}.get_dist_info', lambda rank=rank: (rank, processes))

        def build():
            return BatchSampler(InfiniteSampler(range(size), shuffle, seed=3), batch, False)

        def take(numbered, start=0):
            numbered.start_at(0, start)
            return [[index for index, _ in one] for one in itertools.islice(numbered, 12)]
        wanted = list(itertools.islice(build(), 24))
        places = list(itertools.islice(batches.NumberedBatches(build(), seed=5), 24))
        assert [[index for index, _ in one] for one in places] == wanted
        for start in range(12):
            first = batches.NumberedBatches(build(), seed=5)
            assert take(first) == wanted[:12]
            later = batches.NumberedBatches(build(), seed=5)
            assert take(later, start) == wanted[start:start + 12]
            state = first.state(start)
            if start:
                assert len(first.endless.states) <= 2 + 12 * batch * processes // size
            resumed = batches.NumberedBatches(build(), seed=5)
            resumed.restore(state)
            assert take(resumed, start) == wanted[start:start + 12]
            resumed.start_at(0, start)
            assert list(itertools.islice(resumed, 12)) == places[start:start + 12]


def test_a_state_of_another_data_set_is_not_used():
    def build(size):
        return batches.NumberedBatches(
            BatchSampler(InfiniteSampler(range(size), seed=3), 2, False), seed=5)
    small = build(4)
    next(iter(small))
    large = build(8)
    large.restore(small.state(0))
    assert large.endless.states == {}
