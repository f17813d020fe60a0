"""Which implementation of the selective scan runs: the one asked for, or the fastest that can run here."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from msvmamba_jax.kernels.selective_scan.routes import Route, ScanInputs

VARIABLE = "MSVMAMBA_SCAN"
"""Environment variable with the name of an implementation, for where none is given in the program."""

FALLBACK = "xla"
"""Runs anywhere, for any dtype."""

_NAMES = ("mosaic", "triton", FALLBACK)  # modules of this package, the fastest first
_LOGGER = logging.getLogger("msvmamba_jax.kernels.selective_scan")


class Implementation(NamedTuple):
    """What the module of an implementation provides."""

    run: Callable[[ScanInputs, tuple[Route, ...]], jax.Array]
    """The scan, where no derivative is wanted."""

    forward: Callable[[ScanInputs, tuple[Route, ...]], tuple[jax.Array, Any]]
    """The scan, and what the backward needs of it."""

    backward: Callable[[Any, jax.Array, tuple[Route, ...]], ScanInputs]
    """The gradient of every input, given that of the result."""

    unavailable: Callable[[], str | None]
    """None where it can run; otherwise one clause that says why it cannot."""


def implementations() -> tuple[str, ...]:
    """Names that `implementation=` accepts, the fastest first."""
    return _NAMES


def available_implementations() -> dict[str, str | None]:
    """For each name None if that implementation can run here, or else the reason why it cannot."""
    return {name: load(name).unavailable() for name in implementations()}


@functools.cache
def load(name: str) -> Implementation:
    """Imports an implementation: not before it is needed, since GPU ones take long and may not be installed."""
    module = importlib.import_module(f"{__package__}.{name}")
    return Implementation(module.run, module.forward, module.backward, module.unavailable)


def requested_implementation(implementation: str | None) -> str | None:
    """The name that is asked for, by the argument or else by MSVMAMBA_SCAN, if any.

    Raises:
        ValueError: there is no such implementation, or it cannot run here.
    """
    name, source = implementation, ""
    if name is None:
        name, source = os.environ.get(VARIABLE) or None, f" (from {VARIABLE})"
    if name is None:
        return None
    if name not in implementations():
        raise ValueError(f"no scan implementation {name!r}{source}; there is {', '.join(implementations())}")
    reason = load(name).unavailable()
    if reason is not None:
        can = [other for other, problem in available_implementations().items() if problem is None]
        raise ValueError(f"scan implementation {name!r}{source} cannot run here: {reason}; what can: {', '.join(can)}")
    return name


def choose(implementation: str | None, *, float64: bool) -> str:
    """The implementation that runs: the one asked for, or the fastest that can run here.

    Args:
        implementation: a name, or None.
        float64: whether an input has that dtype, which only the fallback takes.

    Raises:
        ValueError: as `requested_implementation`, or the one asked for does not take float64.
    """
    name = requested_implementation(implementation)
    if name is None:
        name, reason = _best(float64)
        _log_once(f"selective scan: {name} ({reason}; {VARIABLE} or implementation= chooses another)")
    elif float64 and name != FALLBACK:
        raise ValueError(f"scan implementation {name!r} takes no float64 inputs; {FALLBACK!r} does")
    elif implementation is None:
        _log_once(f"selective scan: {name} (from {VARIABLE})")
    return name


def _best(float64: bool) -> tuple[str, str]:
    """The fastest implementation that can run here, and why it is the one."""
    if float64:
        return FALLBACK, "the one that takes float64"
    device = _default_device()
    name = FALLBACK
    if device.platform == "gpu":
        name = next(name for name in implementations() if load(name).unavailable() is None)
    return name, f"the fastest that runs on {device.device_kind}"


def _default_device() -> jax.Device:
    """Where JAX computes if nothing says otherwise."""
    config: Any = jax.config  # whose type does not list its options
    default = config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]  # a platform's name, or None for the best platform


@functools.cache
def _log_once(message: str) -> None:
    _LOGGER.info(message)
