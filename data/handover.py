"""How a worker hands its batches over: through memory that is shared with the reader and used again and again.

Memory that is new to a process costs more than what is written to it: where it was made anew for each batch, its pages
took some percent of the time of decoding the photographs. So a worker keeps a few regions. It stacks a batch straight
into one that is free; the reader gets arrays that lie there; when the last of them is gone the region is free again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence

import numpy as np

from msvmamba_jax.errors import InputError

_Batch = dict[str, np.ndarray]
_Region = tuple[int, int, int]

_ALIGNMENT = 64  # bytes; the first of a region say whether it is in use
_SMALL = 4096  # bytes; shorter arrays are sent as they are


def shared_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder for the files of regions, in memory where the system has a place for that."""
    return tempfile.TemporaryDirectory(prefix="msvmamba_jax_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


@dataclasses.dataclass(frozen=True)
class Sent:
    """A batch on its way.

    Attributes:
        region: process and thread of the worker and its number of the region; None where there is nothing in one.
        path: the region's file.
        placed: for each array in the region its place in bytes, shape and dtype.
        small: the other arrays.
    """

    region: _Region | None
    path: str
    placed: dict[str, tuple[int, tuple[int, ...], np.dtype]]
    small: _Batch


class Sender:
    """The worker's side: from the examples of a batch to what is sent; picklable until it is first called."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        # By thread: a Python without the global lock has threads for workers.
        self._regions: dict[int, list[tuple[str, mmap.mmap]]] = {}

    def __call__(self, examples: Sequence[_Batch]) -> Sent:
        """Stacks examples.

        Raises:
            InputError: there is not enough shared memory.
            ValueError: the examples differ in their shapes.
        """
        placed, small, end = {}, {}, _ALIGNMENT
        for name, array in examples[0].items():
            shape = (len(examples), *array.shape)
            size = math.prod(shape) * array.dtype.itemsize
            if size < _SMALL:
                small[name] = np.stack([example[name] for example in examples])
            else:
                placed[name] = (end, shape, array.dtype)
                end += -(-size // _ALIGNMENT) * _ALIGNMENT
        if not placed:
            return Sent(None, "", placed, small)
        number, (path, memory) = self._free_region(end)
        for name, (start, shape, dtype) in placed.items():
            array = np.ndarray(shape, dtype, buffer=memory, offset=start)
            np.stack([example[name] for example in examples], out=array, casting="no")
        memory[0] = 1
        return Sent((os.getpid(), threading.get_ident(), number), path, placed, small)

    def _free_region(self, size: int) -> tuple[int, tuple[str, mmap.mmap]]:
        """A region that nobody reads: one of those there are, a larger one in its place, or one more."""
        regions = self._regions.setdefault(threading.get_ident(), [])
        free = [number for number, (_, memory) in enumerate(regions) if not memory[0]]
        for number in free:
            if len(regions[number][1]) >= size:
                return number, regions[number]
        region = _make_region(self._folder, size)
        if free:
            regions[free[0]] = region
            return free[0], region
        regions.append(region)
        return len(regions) - 1, region


class Receiver:
    """The reader's side: from what a `Sender` sent to arrays."""

    def __init__(self) -> None:
        self._regions: dict[_Region, tuple[str, mmap.mmap]] = {}

    def __call__(self, sent: Sent) -> _Batch:
        """The batch; its large arrays lie in shared memory, which is used anew when none of them is left."""
        if sent.region is None:
            return sent.small
        path, memory = self._regions.get(sent.region, ("", None))
        if memory is None or path != sent.path:
            with open(sent.path, "r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
            self._regions[sent.region] = (sent.path, memory)
            # Without a name it cannot outlive its users; Windows keeps it until then.
            with contextlib.suppress(OSError):
                os.unlink(sent.path)
        arrays = {
            name: np.ndarray(shape, dtype, buffer=memory, offset=start)
            for name, (start, shape, dtype) in sent.placed.items()
        }
        left = [len(arrays)]
        for array in arrays.values():
            weakref.finalize(array, _release, memory, left).atexit = False
        return {**sent.small, **arrays}


def _make_region(folder: str, size: int) -> tuple[str, mmap.mmap]:
    try:
        descriptor, path = tempfile.mkstemp(dir=folder)
        with open(descriptor, "r+b") as file:
            file.write(bytes(size))  # written, it is there: a page that cannot be had would kill the worker
            file.flush()
            return path, mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise InputError(
            f"The workers' batches do not fit into {os.path.dirname(folder)} ({error.strerror or error}): take "
            "fewer workers (config.data.workers), or make it larger, such as with docker run --shm-size=16g."
        ) from error


def _release(memory: mmap.mmap, left: list[int]) -> None:
    left[0] -= 1
    if not left[0]:
        memory[0] = 0
