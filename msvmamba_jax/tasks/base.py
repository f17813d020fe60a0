"""The protocol between a task and the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from PIL import Image

from msvmamba_jax.checkpoint import Description

Batch = Mapping[str, Any]
Mirror = Callable[[jax.Array], jax.Array]


class Evaluator(Protocol):
    """Collects predictions of one pass over a split, on the host."""

    def update(self, predictions: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Adds the predictions of one batch; `mask` (b,) is False where a row is padding."""

    def result(self) -> dict[str, float]:
        """The metrics of all that was added."""

    def per_class(self) -> list[dict[str, Any]]:
        """Metrics of each class, with its `name`: plain JSON values."""

    def sentence(self) -> str:
        """The most important metrics for a person to read."""


class Task(Protocol):
    """What the loop knows of a task."""

    @property
    def description(self) -> Description:
        """The model and everything that a checkpoint says of it."""

    @property
    def score(self) -> str:
        """The metric (of `Evaluator.result`) by which the best checkpoint is chosen; higher is better."""

    def prepare(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, mirror: Mirror) -> Batch:
        """The training batch as `loss` takes it: what is done on the device before the model, traced.

        Args:
            batch: a whole host batch, or one device's rows of it.
            keys: (b,), a random key for each example.
            batch_key: the random key of the whole batch, the same on every device.
            mirror: maps an array (b, ...) to that of each example's partner: in a batch of n, example i's is n - 1 - i.
        """

    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a prepared batch, or part of one, and scalar metrics, traced.

        `keys` (b,): a random key for each example, other than those of `prepare`.
        """

    def predict(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """All that `evaluator` and `draw` need of a batch, its truth included, traced; leading axis b."""

    def evaluator(self) -> Evaluator:
        """A new, empty evaluator."""

    def draw(self, examples: Sequence[tuple[Batch, Batch]]) -> Image.Image:
        """A picture of some evaluated images.

        Args:
            examples: for each its row of an evaluation batch, and its row of what `predict` made of it; NumPy arrays.
        """
