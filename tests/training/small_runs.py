"""Whole runs with a model that compiles in no time.

All but the model is what users run: the loop, the data pipeline, the optimiser, checkpoints and the command.
`run` runs in this process. In another, `python small_runs.py [--real] [--at STEP SIGNALS] OPTIONS` is `train`:
--real keeps the configuration's model, and --at sends signals to the process itself after a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from msvmamba_jax import command
from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data import datasets
from msvmamba_jax.models.batch_norm import BatchNorm
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training import loop

ROOT = Path(__file__).parents[2]
BATCH, STEPS = 8, 6
OPTIONS = {
    "batch_size": BATCH,
    "duration": "1 epoch",
    "log_every": "1 step",
    "evaluate_every": "3 steps",
    "save_every": "2 steps",
    "optimizer.batch_size": BATCH,
    "optimizer.learning_rate": 0.02,
}


class TinyModel(nnx.Module):
    """A backbone, features that may be normalised over the batch and are dropped at random, and a head."""

    def __init__(self, rngs: nnx.Rngs, num_classes: int, normalised: bool = True) -> None:
        self.backbone = nnx.Linear(192, 64, rngs=rngs)
        self.norm = BatchNorm(64, axis=None, dtype=jnp.float32) if normalised else None
        self.head = nnx.Linear(64, num_classes, rngs=rngs)
        self.num_classes = num_classes

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        b, height, width, _ = images.shape
        x = images.reshape(b, 8, height // 8, 8, width // 8, 3).mean((2, 4)).reshape(b, -1)
        x = jax.nn.gelu(self.backbone(x))
        if self.norm is not None:
            x = self.norm(x, train=keys is not None)
        if keys is not None:
            x = x * jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (64,)))(keys).astype(x.dtype)
        return self.head(x)


def build(self: Description, *, rngs: nnx.Rngs, **options: Any) -> TinyModel:
    """In the place of `Description.build`."""
    return TinyModel(rngs, self.model["num_classes"])


@functools.cache
def few_digits() -> Any:
    """Six batches of digits to train on, and ten digits to evaluate."""
    full = load_dataset({"source": "digits"})
    few = lambda source, count: [source[i] for i in range(count)]  # noqa: E731
    return dataclasses.replace(full, train=few(full.train, BATCH * STEPS), evaluation=few(full.evaluation, 10))


load_dataset = datasets.load_dataset


def load_few(options: Any) -> Any:
    """In the place of `load_dataset`."""
    return few_digits() if options["source"] == "digits" else load_dataset(options)


def configuration(**options: Any) -> Any:
    """The configuration of the digits, with dotted options."""
    sys.path.insert(0, str(ROOT))
    from msvmamba_jax.configs.digits import get_config

    config = get_config()
    config.update_from_flattened_dict({**OPTIONS, **options})
    return config


@contextlib.contextmanager
def calling_after(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Calls a function as soon as the metrics of a step are there, before anything of it is written."""
    check = loop._check_finite

    def checked(of: int, *arguments: Any) -> None:
        check(of, *arguments)
        if of == step:
            action()

    with mock.patch.object(loop, "_check_finite", checked):
        yield


def run(workdir: Path, **options: Any) -> tuple[int, str, str]:
    """Runs in this process: exit status, standard output, standard error."""
    config = configuration(**options)

    def train() -> int | None:
        dataset = load_few(config.data)
        stopped_by = loop.train(config, make_task(config, dataset), dataset, workdir)
        return None if stopped_by is None else 128 + stopped_by

    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(Description, "build", build),
        jax.numpy_dtype_promotion("standard"),  # optax itself mixes dtypes
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = command.run(train)
    return status, out.getvalue(), err.getvalue()


def command_line(workdir: Path | None, *given: str, **options: Any) -> list[str]:
    """The command for a process of its own."""
    flags = [f"--config.{name}={value}" for name, value in {**OPTIONS, **options}.items()]
    where = [] if workdir is None else [f"--workdir={workdir}"]
    return [sys.executable, __file__, *given, f"--config={ROOT / 'configs' / 'digits.py'}", *where, *flags]


def main() -> None:
    """The command `train` with this model."""
    from msvmamba_jax import train

    if sys.argv[1] == "--real":
        del sys.argv[1]
    else:
        Description.build = build  # type: ignore[method-assign]
        datasets.load_dataset = load_few
    action: Any = contextlib.nullcontext()
    if "--at" in sys.argv:
        place = sys.argv.index("--at")
        step, names = sys.argv[place + 1 : place + 3]
        del sys.argv[place : place + 3]
        action = calling_after(int(step), lambda: send(names.split(",")))
    with action:
        train.main()


def send(names: list[str]) -> None:
    """Sends signals to this process; Python handles each before the next line."""
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    main()
