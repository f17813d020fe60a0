"""Lengths of time in a configuration: "300 epochs", "160000 steps", or, of a whole run, "10 %"."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from msvmamba_jax.data.pipeline import Dataset, train_steps_per_epoch
from msvmamba_jax.errors import InputError

_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(epochs?|steps?|%)\s*")


@dataclasses.dataclass(frozen=True)
class Clock:
    """The lengths of a run in steps.

    Attributes:
        steps_per_epoch: steps in one pass over the training records.
        steps: of the whole run.
    """

    steps_per_epoch: int
    steps: int

    def steps_of(self, name: str, value: str, *, least: int = 1) -> int:
        """A length as a number of steps.

        Args:
            name: the key of the configuration that holds it, for messages.
            value: such as "5 epochs", "100 steps" or "10 %"; parts of a step are rounded.
            least: the shortest that makes sense.

        Raises:
            InputError: it is not of this form, or shorter than `least`.
        """
        number, unit = _parse(name, value, ("epochs", "steps", "%"))
        whole = {"epochs": self.steps_per_epoch, "steps": 1, "%": self.steps / 100}[unit]
        steps = round(number * whole)
        if steps < least:
            raise InputError(f"config.{name} must be at least {least} step{'s' if least > 1 else ''}; got {value!r}")
        return steps


def make_clock(config: Any, dataset: Dataset) -> Clock:
    """The lengths of the run that `config` describes: `duration`, in epochs or steps, and `batch_size`.

    Raises:
        InputError: the duration makes no step, or there are fewer records than one batch holds.
    """
    epoch = train_steps_per_epoch(dataset, batch_size=config.batch_size)
    number, unit = _parse("duration", config.duration, ("epochs", "steps"))
    steps = math.ceil(number * (epoch if unit == "epochs" else 1))
    if steps < 1:
        raise InputError(f"config.duration is {config.duration!r}, which makes no step")
    return Clock(epoch, steps)


def _parse(name: str, value: str, units: tuple[str, ...]) -> tuple[float, str]:
    match = _FORM.fullmatch(value)
    unit = match[2] if match else ""
    unit = unit if unit in ("", "%") else unit.rstrip("s") + "s"
    if match is None or unit not in units:
        examples = {"epochs": '"5 epochs"', "steps": '"100 steps"', "%": '"10 %"'}
        raise InputError(f"config.{name} must be like {' or '.join(examples[u] for u in units)}; got {value!r}")
    return float(match[1]), unit
