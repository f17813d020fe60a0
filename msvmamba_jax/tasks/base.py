"""The protocol between a task and the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from msvmamba_jax.checkpoint import Description

Batch = Mapping[str, Any]


class Evaluator(Protocol):
    """Collects predictions of one pass over a split, on the host."""

    def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """Adds one batch; `batch["mask"]` is False where a row is padding."""

    def result(self) -> dict[str, float]:
        """The metrics of all that was added."""


class Task(Protocol):
    """What the loop knows of a task."""

    @property
    def description(self) -> Description:
        """The model and everything that a checkpoint says of it."""

    @property
    def score(self) -> str:
        """The metric (of `Evaluator.result`) by which the best checkpoint is chosen; higher is better."""

    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a training batch and scalar metrics, traced. `keys` (b,): a random key for each example."""

    def predict(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """What the evaluator needs of a batch, traced; leading axis b."""

    def evaluator(self) -> Evaluator:
        """A new, empty evaluator."""
