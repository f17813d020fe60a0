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
"""Runs anywhere and takes any scan."""

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

    refusal: Callable[[ScanInputs, tuple[Route, ...]], str | None]
    """None if it takes this scan, forward and backward; otherwise one clause that says why it does not."""


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
    return Implementation(module.run, module.forward, module.backward, module.unavailable, module.refusal)


def requested_implementation(implementation: str | None) -> str | None:
    """The name that is asked for, by the argument or else by MSVMAMBA_SCAN, if any.

    Raises:
        ValueError: there is no such implementation, or it cannot run here.
    """
    name, source = _request(implementation)
    if name is None:
        return None
    if name not in implementations():
        raise ValueError(f"no scan implementation {name!r}{source}; there is {', '.join(implementations())}")
    reason = load(name).unavailable()
    if reason is not None:
        can = [other for other, problem in available_implementations().items() if problem is None]
        raise ValueError(f"scan implementation {name!r}{source} cannot run here: {reason}; what can: {', '.join(can)}")
    return name


def preferred_implementation() -> str:
    """The name that `MSVMAMBA_SCAN` asks for, or of the fastest that runs on the default device, whatever the scan.

    Raises:
        ValueError: as `requested_implementation`.
    """
    name = requested_implementation(None)
    if name is not None:
        return name
    if _default_device().platform != "gpu":
        return FALLBACK
    return next(name for name in implementations() if load(name).unavailable() is None)


def choose(implementation: str | None, inputs: ScanInputs, routes: tuple[Route, ...]) -> str:
    """The implementation that runs: the one asked for, or the fastest that can run here and takes this scan.

    Args:
        implementation: a name, or None.
        inputs: of the scan; only their shapes and dtypes matter.
        routes: of the scan.

    Raises:
        ValueError: as `requested_implementation`, or the one asked for does not take this scan.
    """
    name = requested_implementation(implementation)
    if name is None:
        name, reason = _best(inputs, routes)
        _log_once(f"selective scan: {name} ({reason}; {VARIABLE} or implementation= chooses another)")
        return name
    refusal = load(name).refusal(inputs, routes)
    if refusal is not None:
        _, source = _request(implementation)
        raise ValueError(
            f"scan implementation {name!r}{source} does not take this scan: {refusal}; use implementation={FALLBACK!r}"
        )
    if implementation is None:
        _log_once(f"selective scan: {name} (from {VARIABLE})")
    return name


def _request(implementation: str | None) -> tuple[str | None, str]:
    """The name that is asked for, if any, and where it comes from if not from the argument."""
    if implementation is not None:
        return implementation, ""
    return os.environ.get(VARIABLE) or None, f" (from {VARIABLE})"


def _best(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[str, str]:
    """The fastest implementation that can run here and takes this scan, and why it is the one."""
    device = _default_device()
    reasons = [f"the fastest that runs on {device.device_kind}"]
    if device.platform == "gpu":
        for name in implementations():
            implementation = load(name)
            if implementation.unavailable() is not None:
                continue
            refusal = implementation.refusal(inputs, routes)
            if refusal is None:
                return name, "; ".join(reasons)
            reasons.append(f"{name} does not take this scan: {refusal}")
    return FALLBACK, "; ".join(reasons)


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
