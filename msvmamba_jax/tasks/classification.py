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
from msvmamba_jax.errors import InputError
from msvmamba_jax.inference import normalise
from msvmamba_jax.tasks.base import Batch, Mirror
from msvmamba_jax.tasks.erasing import erase
from msvmamba_jax.tasks.mixing import Mixing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification:
    """The classification task; see `Task`.

    Attributes:
        description: the model and its classes.
        label_smoothing: probability mass spread evenly over all classes.
        erase_probability: of random erasing, for each training image; see `erasing`.
        mixing: mixup and CutMix of the training batch.

    Raises:
        InputError: on construction, when a probability is out of range.
    """

    description: Description
    label_smoothing: float = 0.0
    erase_probability: float = 0.0
    mixing: Mixing = dataclasses.field(default_factory=Mixing)
    score: str = "accuracy_top1"

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "erase_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"config.{name} must be in 0..1; got {getattr(self, name)}")

    def prepare(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, mirror: Mirror) -> Batch:
        """See `Task`. Batch: `image` uint8 (b, h, w, 3), `label` int32 (b,).

        Returns:
            `image` float32 (b, h, w, 3): normalised, then erased, then mixed; `target` float32 (b, classes), a
            distribution; `label` int32 (b,): of a mixed image, the one that it has more of.
        """
        images = normalise(batch["image"], self.description.preprocessing)
        targets = jax.nn.one_hot(batch["label"], len(self.description.class_names))
        images, targets = self.mixing(
            erase(images, keys, self.erase_probability),
            optax.smooth_labels(targets, self.label_smoothing),
            batch_key,
            mirror,
        )
        label = jnp.argmax(targets, axis=-1).astype(jnp.int32) if self.mixing.on else batch["label"]
        return {"image": images, "label": label, "target": targets}

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task`. `accuracy_top1` of mixed images counts the class that an image has more of."""
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
