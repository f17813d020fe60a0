"""How the GPU kernels are launched: measured choices where there are any, a heuristic of the backend otherwise.

`measured.json` holds, for each device kind, the fastest configuration found for a problem; `scripts/tune_scan.py`
writes it. Nothing is ever timed while a model runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan.routes import Route, ScanInputs

Config = TypeVar("Config")


Direction = Literal["forward", "backward"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the speed of a scan depends on."""

    direction: Direction
    batch: int
    height: int
    width: int
    channels: int
    states: int
    routes: int
    dtype: str  # of u: float32 or bfloat16
    delta_dtype: str | None = None  # where it differs from that of u

    @classmethod
    def of(cls, direction: Direction, inputs: ScanInputs, routes: tuple[Route, ...]) -> Problem:
        """That of these inputs."""
        batch, height, width, channels = inputs.u.shape
        dtype, delta_dtype = inputs.u.dtype.name, inputs.delta.dtype.name
        return cls(
            direction=direction,
            batch=batch,
            height=height,
            width=width,
            channels=channels,
            states=inputs.A.shape[1],
            routes=len(routes),
            dtype=dtype,
            delta_dtype=None if delta_dtype == dtype else delta_dtype,
        )

    @property
    def key(self) -> str:
        """As it stands in `measured.json`."""
        shape = f"{self.batch}x{self.height}x{self.width}x{self.channels}"
        delta = f" delta={self.delta_dtype}" if self.delta_dtype else ""
        return f"{self.direction} {self.dtype} {shape} states={self.states} routes={self.routes}{delta}"


@dataclasses.dataclass(frozen=True)
class Device:
    """What a heuristic may know of the GPU."""

    kind: str
    multiprocessors: int
    shared_memory: int = 227 * 1024  # bytes that a block may ask for


H100 = Device("NVIDIA H100 80GB HBM3", 132)
"""Assumed where a kernel is only lowered, on a machine without a GPU."""


def compute_capability(device: jax.Device) -> float | None:
    """Of an NVIDIA GPU, such as 9.0; None for any other device (an AMD GPU has a name such as gfx942 there)."""
    capability = str(getattr(device, "compute_capability", ""))
    is_number = capability.replace(".", "", 1).isdigit()
    return float(capability) if device.platform == "gpu" and is_number else None


def local_device() -> Device:
    """The GPU of this process, or an H100 where there is none."""
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        return H100
    return Device(
        kind=device.device_kind,
        multiprocessors=getattr(device, "core_count", H100.multiprocessors),
        shared_memory=getattr(device, "shared_memory_per_block_optin", H100.shared_memory),
    )


def float64_refusal(inputs: ScanInputs) -> str | None:
    """Why a backend that computes in float32 does not take these inputs, as a clause; None if it does."""
    names = [name for name, x in inputs._asdict().items() if x.dtype == jnp.float64]
    return f"it computes in float32, and {names[0]} is float64" if names else None


def choose(
    implementation: str, problem: Problem, device: Device, heuristic: Callable[[Problem, Device], Config]
) -> Config:
    """The configuration of `problem` on `device`.

    Args:
        implementation: name of the backend.
        problem: what is to be computed.
        device: where.
        heuristic: used where nothing was measured; it returns a frozen dataclass, of which a measured entry overrides
            fields.

    Returns:
        An instance of the heuristic's dataclass.
    """
    if (implementation, problem) in _thread.forced:
        entry = _thread.forced[implementation, problem]
        entry.chosen = True
        return entry.config
    config = heuristic(problem, device)
    fields = measured().get(device.kind, {}).get(implementation, {}).get(problem.key, {})
    return dataclasses.replace(config, **fields) if fields else config  # type: ignore[type-var]


@contextlib.contextmanager
def forced(implementation: str, problem: Problem, config: Any) -> Iterator[None]:
    """Within it, `choose` gives `config` to that backend for `problem`, in this thread; all else is as ever.

    For `scripts/tune_scan.py`. A configuration is chosen while a function is traced, and `jax.jit` keeps what it has
    traced, of functions inside the backend as well: call `jax.clear_caches()` before, and trace a new function.

    Raises:
        RuntimeError: on leaving, if nothing asked for the configuration of `problem`.
    """
    before, entry = _thread.forced, _Forced(config)
    _thread.forced = {**before, (implementation, problem): entry}
    try:
        yield
    finally:
        _thread.forced = before
    if not entry.chosen:
        raise RuntimeError(f"nothing chose a configuration for {problem.key}: was the function traced before?")


@dataclasses.dataclass
class _Forced:
    config: Any
    chosen: bool = False


class _Thread(threading.local):
    """The configurations that are forced in this thread."""

    def __init__(self) -> None:
        self.forced: dict[tuple[str, Problem], _Forced] = {}


_thread = _Thread()


@functools.cache
def measured() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Contents of `measured.json`: device kind, implementation, problem, then fields of the configuration."""
    text = resources.files(__package__).joinpath("measured.json").read_text(encoding="utf-8")
    return json.loads(text)
