"""A data loader that starts at any batch, and draws the same augmentations wherever it starts."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .random_state import SAMPLE, seed_generators

Draw = tuple[int, tuple[int, ...]]
"""The index of a sample, and the place in the run that seeds its augmentation."""

HUNG_AFTER = 1800
"""Seconds that a batch is waited for, unless the data loader's ``timeout`` is set."""


class SeededDataset(Dataset):
    """A dataset whose samples can be asked for with the seed of their augmentation.

    All other attributes are read from and written to the dataset inside.
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__['dataset'] = dataset

    def __getitem__(self, draw: int | Draw) -> Any:
        if isinstance(draw, tuple):
            index, place = draw
            seed_generators(*place)
            return self.dataset[index]
        return self.dataset[draw]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


class NumberedBatches:
    """A batch sampler whose indices come with seeds, and which can start at a later batch.

    A sample's seed follows from the run's, the epoch, and the sample's number among those of all
    processes, so that it is the same for any number of workers and, as far as the sampler deals
    out one order to all, of processes.

    Args:
        batches: The batch sampler inside, whose other attributes this one has as well.
        seed: That of the run, the same for all processes.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.epoch = self.start = 0

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be that of an epoch, from a batch on."""
        self.epoch, self.start = epoch, batch
        sampler: Any = getattr(self.batches, 'sampler', None)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        rank, processes = get_dist_info()
        drawn = rank
        for number, batch in enumerate(self.batches):
            if number >= self.start:  # those before are drawn again, but not loaded
                yield [(index, (self.seed, SAMPLE, self.epoch, drawn + i * processes))
                       for i, index in enumerate(batch)]
            drawn += len(batch) * processes

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == 'batches' or name.startswith('__'):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.batches, name)


class ResumableLoader(DataLoader):
    """A data loader like another one, with seeded samples and a start.

    Args:
        loader: The other one; it must have a batch sampler.
        seed: That of the run.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        newer = {key: getattr(loader, key) for key in ('in_order',) if hasattr(loader, key)}
        super().__init__(
            SeededDataset(loader.dataset), batch_sampler=NumberedBatches(
                loader.batch_sampler, seed),
            num_workers=loader.num_workers, collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
            timeout=loader.timeout or (HUNG_AFTER if loader.num_workers else 0),
            multiprocessing_context=loader.multiprocessing_context, generator=loader.generator,
            prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers,
            **newer)

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be that of an epoch, from a batch on."""
        self.batch_sampler.start_at(epoch, batch)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate; workers start with the first batch, not before (mmengine asks early)."""
        yield from super().__iter__()


def make_resumable(loader: DataLoader, seed: int) -> DataLoader:
    """A :class:`ResumableLoader`, or the same loader where its order is not a sampler's."""
    if isinstance(loader, ResumableLoader) or loader.batch_sampler is None or isinstance(
            loader.dataset, IterableDataset):
        return loader
    return ResumableLoader(loader, seed)
