"""Several processes that train together, on one host or many: how they find each other and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from msvmamba_jax.errors import InputError


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
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


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
