"""Image classification: cross-entropy with label smoothing, top-1 and top-5 accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.inference import normalise
from msvmamba_jax.tasks.base import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """The classification task; see `Task`.

    Attributes:
        description: the model and its classes.
        label_smoothing: probability mass spread evenly over all classes.
    """

    description: Description
    label_smoothing: float = 0.0
    score: str = "accuracy_top1"

    def loss(self, model: nnx.Module, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task`. Batch: `image` uint8 (b, h, w, 3), `label` int32 (b,)."""
        logits = self._logits(model, batch["image"], keys)
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return loss, {"accuracy_top1": jnp.mean(correct.astype(jnp.float32))}

    def predict(self, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """`top` int32 (b, 5): the most probable labels; `loss` (b,): cross-entropy without smoothing."""
        logits = self._logits(model, batch["image"], None)
        _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        return {"top": top, "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])}

    def evaluator(self) -> ClassificationEvaluator:
        """See `Task`."""
        return ClassificationEvaluator()

    def _logits(self, model: Any, images: jax.Array, keys: jax.Array | None) -> jax.Array:
        return model(normalise(images, self.description.preprocessing), keys)


class ClassificationEvaluator:
    """Exact counts over a split; rows whose mask is False count nowhere."""

    def __init__(self) -> None:
        self.examples = self.top1 = self.top5 = 0
        self.loss = 0.0

    def update(self, predictions: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> None:
        """See `Evaluator`."""
        mask = batch["mask"]
        hits = (predictions["top"] == batch["label"][:, None]) & mask[:, None]
        self.examples += int(mask.sum())
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        self.loss += float(np.sum(predictions["loss"], where=mask, dtype=np.float64))

    def result(self) -> dict[str, float]:
        """Accuracies in 0..1, mean loss, and the number of images."""
        count = max(self.examples, 1)
        return {
            "accuracy_top1": self.top1 / count,
            "accuracy_top5": self.top5 / count,
            "loss": self.loss / count,
            "images": self.examples,
        }
