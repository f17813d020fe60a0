"""Several processes that train together, on one host or many: how they find each other and what they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from msvmamba_jax.errors import InputError

_REASON = 1000  # bytes of another process's reason that are told


def join(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins the other processes of a run, if there are any. Before anything else uses a device.

    Arguments that are None come from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; without those from Slurm, inside an `srun` of several tasks.

    Args:
        coordinator: "host:port" of process 0, reachable from all.
        processes: how many there are.
        index: which of them this one is, from 0.

    Raises:
        InputError: only a part of the three is known, one is out of range, or the others do not answer.
    """
    environment = os.environ
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    index = _number("JAX_PROCESS_ID") if index is None else index
    given = [value is not None for value in (coordinator, processes, index)]
    slurm = int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment
    if not any(given) and not slurm:
        return
    if any(given):
        if not all(given):
            raise InputError(
                "several processes need all of --coordinator, --num_processes and --process_id "
                "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
            )
        assert processes is not None and index is not None  # noqa: PT018
        if not 0 <= index < processes:
            raise InputError(f"process_id must be in 0..{processes - 1}, but is {index}")
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot join the other processes ({coordinator or 'through Slurm'}): {reason}") from error


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def largest(value: int) -> int:
    """The largest of the values that the processes give; all must call it."""
    return max(_of_all(value))


def total(value: int) -> int:
    """The sum of the values that the processes give; all must call it."""
    return sum(_of_all(value))


def same(value: int) -> bool:
    """Whether all processes give the same value, of 31 bits; all must call it."""
    return len(set(_of_all(value))) == 1


def _of_all(value: int) -> list[int]:
    if jax.process_count() == 1:
        return [value]
    return [int(x) for x in multihost_utils.process_allgather(np.int32(value))]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is done here succeeds on all processes or ends all of them, or those that went on would wait for ever.

    All must enter it, and nothing in it may wait for the other processes.

    Raises:
        InputError: it failed on another process, with that one's reason. Its own exception goes on as it is.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        reason = "" if error is None else str(error) or type(error).__name__
        row = np.zeros(_REASON, np.uint8)
        encoded = reason.encode()[:_REASON]
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        rows = multihost_utils.process_allgather(row)
        failed = np.flatnonzero(rows[:, 0])
        if error is None and failed.size:
            first = bytes(rows[failed[0]]).rstrip(b"\0").decode(errors="ignore")
            raise InputError(f"on process {failed[0]}: {first}")
    if error is not None:
        raise error


def gather_rows(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of all processes, those of process 0 first; all must call it."""
    if jax.process_count() == 1:
        return dict(batch)
    return {name: multihost_utils.process_allgather(array, tiled=True) for name, array in batch.items()}


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{variable} must be a number, but is {text!r}") from error
