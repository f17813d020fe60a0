"""What the scripts that make up data sets share: a new folder, and many processes that write into it."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from msvmamba_jax.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def new_folder(root: Path) -> Iterator[None]:
    """Makes a folder for a data set, to be filled inside the context.

    Raises:
        InputError: `root` exists and is not empty, or (also from inside) cannot be written.
    """
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise InputError(f"{root} exists and is not empty: name another folder, or remove it first.")
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"Cannot write {root}: {error.strerror or error}.") from error


def run(function: Callable[[T], R], jobs: Sequence[T], *, processes: int) -> list[R]:
    """Calls a function, which must be picklable, for every job, with a progress bar on a terminal.

    Returns:
        What it returned for each job, in their order.
    """
    # Spawned: forked children of a program with threads may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap(function, jobs, chunksize=8)
        return list(tqdm(done, total=len(jobs), unit="image", disable=not sys.stderr.isatty()))
