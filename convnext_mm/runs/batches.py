"""A data loader that starts at any batch, and draws the same augmentations wherever it starts."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

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


class EndlessOrder:
    """The order of mmengine's InfiniteSampler, from any place on without drawing what is before it.

    It draws one permutation for each pass over the data set. The state of the generator before a
    pass is kept until the samples of the passes before are used, and is part of a checkpoint.

    Args:
        sampler: The sampler.
    """

    def __init__(self, sampler: InfiniteSampler) -> None:
        self.sampler = sampler
        self.states: dict[int, Tensor] = {}

    def batches(self, first: int, size: int) -> Iterator[list[int]]:
        """This process's batches.

        Args:
            first: The number of samples of all processes that are before them.
            size: Samples in a batch.
        """
        indices = self._indices(first)
        while True:
            yield list(itertools.islice(indices, size))

    def _indices(self, first: int) -> Iterator[int]:
        count, step = self.sampler.size, self.sampler.world_size
        number, place = first // count, first + self.sampler.rank
        generator = torch.Generator()
        if number in self.states:
            generator.set_state(self.states[number])
        else:  # a checkpoint of mmengine's own
            generator.manual_seed(self.sampler.seed)
            for _ in range(number):
                self._permutation(generator)
        self.states = {number: generator.get_state()}
        while True:
            own = self._permutation(generator)[place - number * count::step]
            number += 1
            self.states[number] = generator.get_state()
            yield from own
            place += len(own) * step

    def _permutation(self, generator: torch.Generator) -> list[int]:
        if not self.sampler.shuffle:
            return list(range(self.sampler.size))
        return torch.randperm(self.sampler.size, generator=generator).tolist()

    def state(self, first: int) -> dict[str, Any] | None:
        """What is needed to go on after some samples; the states of passes before are dropped."""
        number = first // self.sampler.size
        for used in [one for one in self.states if one < number]:
            del self.states[used]
        return dict(size=self.sampler.size, number=number, generator=self.states[number]
                    ) if number in self.states else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on with a state, unless it is that of another data set."""
        if state and state['size'] == self.sampler.size:
            self.states = {state['number']: state['generator'].cpu()}


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
        # Samplers and batch samplers of other types may draw in other ways.
        sampler = getattr(batches, 'sampler', None)
        self.endless = (EndlessOrder(sampler) if type(sampler) is InfiniteSampler
                        and type(batches) is BatchSampler else None)

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be that of an epoch, from a batch on."""
        self.epoch, self.start = epoch, batch
        sampler: Any = getattr(self.batches, 'sampler', None)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        rank, processes = get_dist_info()
        drawn, first, batches = rank, 0, self.batches
        if self.endless is not None:
            first = self.start
            drawn += self._samples(first)
            batches = self.endless.batches(self._samples(first), self.batches.batch_size)
        for number, batch in enumerate(batches, first):
            if number >= self.start:  # those before, of an epoch, are drawn again but not loaded
                yield [(index, (self.seed, SAMPLE, self.epoch, drawn + i * processes))
                       for i, index in enumerate(batch)]
            drawn += len(batch) * processes

    def state(self, batches: int) -> dict[str, Any] | None:
        """The state of an endless order after a number of batches; None: there is none."""
        return self.endless.state(self._samples(batches)) if self.endless else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on with the state of an endless order."""
        if self.endless is not None:
            self.endless.restore(state)

    def _samples(self, batches: int) -> int:
        """The number of samples of all processes in a number of batches."""
        return batches * self.batches.batch_size * get_dist_info()[1]

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

    def order(self, batches: int) -> dict[str, Any] | None:
        """What a resumed run needs of the sampler after a number of batches; None: nothing."""
        return self.batch_sampler.state(batches)  # type: ignore[union-attr]

    def restore(self, order: dict[str, Any] | None) -> None:
        """Go on with what :meth:`order` has returned."""
        self.batch_sampler.restore(order)  # type: ignore[union-attr]

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
