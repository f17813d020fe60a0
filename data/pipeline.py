"""Batches for training and evaluation: from a data set's records to arrays on this process's host.

Training batches are a function of the seed, the step and the number of processes alone. All randomness hangs on a
record's position in one endless global order, so neither the number of workers nor a restart changes a single bit.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
from absl import flags

from msvmamba_jax.data import handover
from msvmamba_jax.errors import InputError

Record = dict[str, Any]  # such as {"image": uint8 (height, width, 3), "label": int}
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to records, such as ``{"image": uint8 (height, width, 3), "label": int}``.

    A record may have ``"corrupt"`` too: 1 where its image is damaged, 0 elsewhere; see `encoded`. Where workers are
    used the source must be picklable.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a model is trained and evaluated on.

    Attributes:
        train: the training records.
        evaluation: the evaluation records.
        class_names: the name of every label.
        preprocessing: how images are prepared for evaluation, as a checkpoint remembers it.
        augment: maps a training record and a `np.random.Generator` to the fields of a training example, all of one
            shape; a function or a `grain.transforms.RandomMap`.
        prepare: maps an evaluation record to the fields of an evaluation example.
        evaluation_shapes: for each evaluation record something that is equal where the shapes of its example are; None:
            all have the same.
        train_groups: int (n,), a group for each training record: a batch holds records of one group alone, and only
            examples of one group have the same shape. None: all are of one group.
        train_slots: int (n,): a training record, as `augment` gets it, has the greatest of these numbers in its global
            batch as ``"slots"``, so that examples of as many objects can be made. None: it has no such field.
    """

    train: Source
    evaluation: Source
    class_names: tuple[str, ...]
    preprocessing: Any
    augment: Callable[[Record, np.random.Generator], Record]
    prepare: Callable[[Record], Record]
    evaluation_shapes: Callable[[], Sequence[Hashable]] | None = None
    train_groups: np.ndarray | None = None
    train_slots: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """Which records make up each evaluation batch: every record once, in batches of equal shapes.

    Attributes:
        rows: int64 (steps, batch): indices of records; -1 where a row is padding.
        shapes: how many different shapes there are.
        images: how many records.
    """

    rows: np.ndarray
    shapes: int
    images: int


def train_steps_per_epoch(dataset: Dataset, *, batch_size: int) -> int:
    """The number of global batches in one pass over the training records, without the last partial one.

    Raises:
        InputError: there are fewer records than one batch holds.
    """
    _positive("batch_size", batch_size)
    sizes = [len(dataset.train)] if dataset.train_groups is None else np.bincount(dataset.train_groups)
    steps = sum(int(size) // batch_size for size in sizes)
    if not steps:
        largest = f", at most {max(sizes)} of one shape" if len(sizes) > 1 else ""
        raise InputError(
            f"The training set has {len(dataset.train)} images{largest}, which do not fill one batch: "
            f"lower batch_size from {batch_size} to at most that."
        )
    return steps


def unused_records(dataset: Dataset, *, batch_size: int) -> int:
    """How many training records no epoch uses, since their group has fewer than a batch holds."""
    if dataset.train_groups is None:
        return 0
    sizes = np.bincount(dataset.train_groups)
    return int(sizes[sizes < batch_size].sum())


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[Batch, None, None]:
    """Endless training batches of this process, from `start_step` on.

    Every epoch is a new shuffle of the training records and takes `train_steps_per_epoch` steps; what does not fill a
    last batch (of its group) is left out until the next shuffle; groups smaller than a batch are never used, see
    `unused_records`. The batches that the processes get for a step are disjoint and make up the global batch: process p
    holds its rows p, p + process_count, ..., so the global batch and its augmentation are the same for every number of
    processes.

    Args:
        dataset: the data set.
        batch_size: the global batch; each process gets ``b = batch_size // process_count`` of it.
        seed: of the shuffles and the augmentation; not negative.
        start_step: the step of the first batch; 0, or where a resumed run goes on.
        workers: processes that load and augment; 0 does it on threads of this process. The batches are the same, bit by
            bit. With workers the main script needs the usual ``if __name__ == "__main__"`` guard.
        process_index: which of the processes this one is.
        process_count: how many processes train together.

    Yields:
        The fields of `Dataset.augment` as arrays with the leading axis b, and ``"corrupt": int32 (b,)`` where the
        source's records have it. Closing the generator stops its threads and workers.

    Raises:
        InputError: an argument is out of range, Grain is not installed, or (while iterating) an image cannot be read.
    """
    grain = _import_grain()
    local_batch = _local_batch(batch_size, process_index, process_count)
    epoch_records = train_steps_per_epoch(dataset, batch_size=batch_size) * batch_size
    for name, value in (("seed", seed), ("start_step", start_step), ("workers", workers)):
        if value < 0:
            raise InputError(f"{name} must not be negative, but is {value}.")
    # Seeds of their own, since those that Grain would derive change with the number of transformations in between.
    shuffle_seed, augment_seed = map(int, np.random.SeedSequence(seed).generate_state(2))

    # Maps over numbers: a Grain source would measure every record that it gives.
    if dataset.train_groups is None and dataset.train_slots is None:
        numbers = grain.MapDataset.range(len(dataset.train)).shuffle(shuffle_seed)[:epoch_records].repeat(None)
        records = numbers.map(dataset.train.__getitem__)
    else:
        ordered = _OrderedRecords(dataset.train, dataset.train_groups, dataset.train_slots, batch_size, shuffle_seed)
        records = grain.MapDataset.range(_ENDLESS).map(ordered)
    # Before the processes part: the generator is seeded by the position in the global order.
    records = records.random_map(dataset.augment, seed=augment_seed)
    if process_count > 1:
        records = records[process_index::process_count]
    # Batched here, a batch is one item for the workers, and its step is its index.
    if not workers:
        batches = records.batch(local_batch, drop_remainder=True, batch_fn=_stack)[start_step:]
        return _iterate(iter(batches.to_iter_dataset(_thread_options(grain))))
    return _from_workers(grain, records, local_batch, start_step, workers)


def plan_evaluation(dataset: Dataset, *, batch_size: int) -> EvaluationPlan:
    """Puts every evaluation record into a batch of its shape; shapes come in the order of their first record.

    Raises:
        InputError: the evaluation set is empty.
    """
    _positive("batch_size", batch_size)
    count = len(dataset.evaluation)
    if not count:
        raise InputError("The evaluation set holds no image.")
    groups: dict[Hashable, list[int]] = {}
    shapes = dataset.evaluation_shapes() if dataset.evaluation_shapes is not None else [None] * count
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    rows = []
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            rows.append(part + [-1] * (batch_size - len(part)))
    return EvaluationPlan(np.asarray(rows, np.int64), len(groups), count)


def evaluation_batches(
    dataset: Dataset, plan: EvaluationPlan, *, process_index: int = 0, process_count: int = 1
) -> Generator[Batch, None, None]:
    """The whole evaluation set once, prepared, in the order of `plan`.

    Every process yields as many batches; process p holds the rows p, p + process_count, ... of each. A row of padding
    repeats the first record of its batch, with mask False; so do the rows of images that are damaged (see `encoded`).

    Args:
        dataset: the data set.
        plan: of `plan_evaluation`; its batch is the global one.
        process_index: which of the processes this one is.
        process_count: how many processes evaluate together.

    Yields:
        The fields of `Dataset.prepare` as arrays with the leading axis b = batch // process_count, and ``"mask"``, bool
        (b,). Closing the generator stops its threads.

    Raises:
        InputError: an argument is out of range, Grain is not installed, or (while iterating) an image cannot be read.
    """
    grain = _import_grain()
    _local_batch(plan.rows.shape[1], process_index, process_count)
    batches = grain.MapDataset.source(plan.rows)
    batches = batches.map(functools.partial(_evaluation_batch, dataset, process_index, process_count))
    return _iterate(iter(batches.to_iter_dataset(_thread_options(grain))))


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise InputError("Batches are made with Grain: pip install 'msvmamba_jax[data]'.") from error
    return grain


def _thread_options(grain: Any) -> Any:
    # A thread makes one whole batch at a time: the buffer counts batches, feeds the threads and decides the memory.
    threads = min(8, os.cpu_count() or 1)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)


def _iterate(batches: Any) -> Generator[Batch, None, None]:
    """Yields from a Grain iterator and closes it at the end, whoever ends it."""
    try:
        yield from batches
    finally:
        batches.close()


def _from_workers(
    grain: Any, records: Any, batch_size: int, start_step: int, workers: int
) -> Generator[Batch, None, None]:
    """The batches of `records` from `start_step` on, made by worker processes; see `handover`."""
    if not flags.FLAGS.is_parsed():  # Grain reads its flags here, also in a notebook or a program without absl.
        flags.FLAGS.mark_as_parsed()
    with handover.shared_folder() as folder:
        send = functools.partial(_send, handover.Sender(folder))
        batches = records.batch(batch_size, drop_remainder=True, batch_fn=send)[start_step:]
        # No threads in a worker: it has nothing to do while it makes a batch, and the queue behind it holds two.
        batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=_ignore_signals)
        try:
            yield from _iterate(iter(batches.map(handover.Receiver())))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise InputError(
                "A process that loads data was killed, perhaps because memory ran out: lower data.workers, or give the "
                "job more memory."
            ) from error


def _ignore_signals(index: int, count: int) -> None:
    """In a worker: Ctrl-C and SIGTERM may reach a whole group of processes, of which the training one decides."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, but is {value}.")


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    _positive("batch_size", batch_size)
    _positive("process_count", process_count)
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index must be in 0..{process_count - 1}, but is {process_index}.")
    if batch_size % process_count:
        raise InputError(f"batch_size {batch_size} does not divide among {process_count} processes: choose a multiple.")
    return batch_size // process_count


def _arrays(example: Record) -> Record:
    """The fields of an example as arrays; Python's integers become int32, and texts (names of files) are left out."""
    return {
        name: np.int32(value) if isinstance(value, int) else np.asarray(value)
        for name, value in example.items()
        if not isinstance(value, str)
    }


def _stack(examples: Sequence[Record]) -> Batch:
    arrays = [_arrays(example) for example in examples]
    return {name: np.stack([example[name] for example in arrays]) for name in arrays[0]}


def _send(sender: handover.Sender, examples: Sequence[Record]) -> handover.Sent:
    return sender([_arrays(example) for example in examples])


class _OrderedRecords:
    """The endless order of training records for a data set with groups or slots: a function of a position in it."""

    def __init__(
        self, source: Source, groups: np.ndarray | None, slots: np.ndarray | None, batch_size: int, seed: int
    ) -> None:
        self._source = source
        self._groups = np.zeros(len(source), np.int64) if groups is None else groups
        self._slots = slots
        self._batch_size = batch_size
        self._seed = seed
        self._steps = int((np.bincount(self._groups) // batch_size).sum())  # of an epoch
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> Record:
        epoch, place = divmod(int(position), self._steps * self._batch_size)
        step, row = divmod(place, self._batch_size)
        batch = self._batches(epoch)[step]
        record = self._source[int(batch[row])]
        return record if self._slots is None else {**record, "slots": int(self._slots[batch].max())}

    def _batches(self, epoch: int) -> np.ndarray:
        """Of one epoch: (steps, batch) indices of records. Threads may work it out twice, to the same."""
        if (known := self._epochs.get(epoch)) is not None:
            return known
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = rng.permutation(len(self._source))
        batches = []
        for group in np.unique(self._groups):
            members = shuffled[self._groups[shuffled] == group]
            steps = len(members) // self._batch_size
            batches.append(members[: steps * self._batch_size].reshape(steps, self._batch_size))
        found = rng.permutation(np.concatenate(batches))
        # The one before may still be in use where the epochs meet.
        self._epochs = {**{e: b for e, b in self._epochs.items() if e == epoch - 1}, epoch: found}
        return found


_ENDLESS = 2**40  # records; more than any run sees


def _evaluation_batch(dataset: Dataset, process_index: int, process_count: int, rows: np.ndarray) -> Batch:
    local = rows[process_index::process_count]
    examples, mask = [], []
    for index in local[local >= 0] if local[0] >= 0 else rows[:1]:  # for its shape, where all are padding
        record = dict(dataset.evaluation[int(index)])
        mask.append(not record.pop("corrupt", 0) and local[0] >= 0)
        examples.append(dataset.prepare(record))
    padding = len(local) - len(examples)
    examples += examples[:1] * padding
    return {**_stack(examples), "mask": np.array(mask + [False] * padding)}
