"""What the tests of training share."""

from __future__ import annotations

import signal

import jax
import pytest


@pytest.fixture(autouse=True)
def handlers():
    """The loop handles signals; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def quick_compilation():
    """For what takes longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
