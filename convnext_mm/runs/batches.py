"""A data loader that starts at any batch, and draws the same augmentations wherever it starts."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from mmengine.dist import get_dist_info
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..datasets.bad_files import BadFile, SkippedFiles
from ..errors import UserError
from .random_state import SAMPLE, seed_generators

Draw = tuple[int, tuple[int, ...]]
"""The index of a sample, and the place in the run that seeds its augmentation."""

HUNG_AFTER = 1800
"""Seconds that a batch is waited for, unless the data loader's ``timeout`` is set."""
MAX_BAD_FILES = 10
"""Bad files that a run leaves out, unless the config's ``max_bad_files`` is set."""
TRIES = 100
"""How often another sample is drawn in place of one whose files are bad."""


class Drawn(NamedTuple):
    """A sample.

    Args:
        data: What the dataset has returned; None: all files that were tried are bad.
        bad: What was wrong with the files in whose place it stands.
    """

    data: Any
    bad: tuple[str, ...] = ()


class SeededDataset(Dataset):
    """A dataset whose samples can be asked for with the seed of their augmentation.

    In place of a sample whose files are bad, another one is drawn, by the same seed. All other
    attributes are read from and written to the dataset inside.
    """

    def __init__(self, dataset: Any) -> None:
        self.__dict__['dataset'] = dataset

    def __getitem__(self, draw: int | Draw) -> Any:
        if not isinstance(draw, tuple):
            return self.dataset[draw]
        index, place = draw
        bad: list[str] = []
        seed_generators(*place)
        while True:
            try:
                return Drawn(self.dataset[index], tuple(bad))
            except BadFile as error:
                bad.append(str(error))
                if len(bad) > TRIES:
                    return Drawn(None, tuple(bad))
                seed_generators(*place, len(bad))
                index = int(np.random.randint(len(self)))

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


class CollateDrawn:
    """Collates samples, and beside them what was wrong with the files that they replace."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, drawn: list[Drawn]) -> Drawn:
        samples = [one.data for one in drawn]
        bad = tuple(message for one in drawn for message in one.bad)
        return Drawn(None if any(one is None for one in samples) else self.collate(samples), bad)


class ResumableLoader(DataLoader):
    """A data loader like another one, with seeded samples and a start, that leaves out bad files.

    Args:
        loader: The other one; it must have a batch sampler.
        seed: That of the run.
        max_bad_files: How many are left out; one more is an error.
    """

    def __init__(self, loader: DataLoader, seed: int,
                 max_bad_files: int = MAX_BAD_FILES) -> None:
        self.skipped = SkippedFiles(max_bad_files)
        newer = {key: getattr(loader, key) for key in ('in_order',) if hasattr(loader, key)}
        super().__init__(
            SeededDataset(loader.dataset), batch_sampler=NumberedBatches(
                loader.batch_sampler, seed),
            num_workers=loader.num_workers,
            collate_fn=CollateDrawn(loader.collate_fn),
            pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
            timeout=loader.timeout or (HUNG_AFTER if loader.num_workers else 0),
            multiprocessing_context=loader.multiprocessing_context, generator=loader.generator,
            prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers,
            **newer)

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be that of an epoch, from a batch on."""
        self.batch_sampler.start_at(epoch, batch)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterate; workers start with the first batch, not before (mmengine asks early).

        Raises:
            UserError: Too many files are bad; lists them.
        """
        for batch in super().__iter__():
            self.skipped.add(batch.bad)
            if batch.data is None:
                raise UserError(f'no sample could be loaded in {TRIES} draws; the last one: '
                                f'{batch.bad[-1]}')
            yield batch.data


def make_resumable(loader: DataLoader, seed: int,
                   max_bad_files: int = MAX_BAD_FILES) -> DataLoader:
    """A :class:`ResumableLoader`, or the same loader where its order is not a sampler's."""
    if isinstance(loader, ResumableLoader) or loader.batch_sampler is None or isinstance(
            loader.dataset, IterableDataset):
        return loader
    return ResumableLoader(loader, seed, max_bad_files)
