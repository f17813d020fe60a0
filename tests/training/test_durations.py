"""Lengths of time in a configuration."""

import pytest

from msvmamba_jax import InputError
from msvmamba_jax.training.durations import Clock

CLOCK = Clock(steps_per_epoch=7, steps=50)


@pytest.mark.parametrize(
    ("value", "steps"),
    [("2 epochs", 14), ("1 epoch", 7), ("2.5epochs", 18), ("3 steps", 3), (" 1 step ", 1), ("10 %", 5), ("5%", 2)],
)
def test_lengths(value, steps):
    assert CLOCK.steps_of("save_every", value) == steps


@pytest.mark.parametrize("value", ["", "3", "epochs", "-1 steps", "3 hours", "1e3 steps", "5 %s", "1 2 steps"])
def test_other_forms(value):
    with pytest.raises(InputError, match=r"config\.save_every must be like"):
        CLOCK.steps_of("save_every", value)


def test_too_short():
    with pytest.raises(InputError, match=r"config\.save_every must be at least 1 step;"):
        CLOCK.steps_of("save_every", "0 steps")
    assert CLOCK.steps_of("optimizer.warmup", "0 steps", least=0) == 0
