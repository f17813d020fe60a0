"""Image classification: cross-entropy with label smoothing, top-1 and top-5 accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.inference import normalise
from msvmamba_jax.tasks.base import Batch, Mirror


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

    def prepare(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, mirror: Mirror) -> Batch:
        """See `Task`. Batch: `image` uint8 (b, h, w, 3), `label` int32 (b,).

        Returns:
            `image` float32 (b, h, w, 3), normalised; `label`; `target` float32 (b, classes), a distribution.
        """
        targets = jax.nn.one_hot(batch["label"], len(self.description.class_names))
        return {
            "image": normalise(batch["image"], self.description.preprocessing),
            "label": batch["label"],
            "target": optax.smooth_labels(targets, self.label_smoothing),
        }

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task`."""
        logits: jax.Array = model(batch["image"], keys)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, batch["target"]))
        correct = jnp.argmax(logits, axis=-1) == batch["label"]
        return loss, {"accuracy_top1": jnp.mean(correct.astype(jnp.float32))}

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """`top` int32 (b, 5): the most probable labels; `loss` (b,): cross-entropy without smoothing."""
        logits: jax.Array = model(normalise(batch["image"], self.description.preprocessing))
        _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        return {"top": top, "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])}

    def evaluator(self) -> ClassificationEvaluator:
        """See `Task`."""
        return ClassificationEvaluator()


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
