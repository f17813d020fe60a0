"""Image classification: cross-entropy with label smoothing, top-1 and top-5 accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.errors import InputError
from msvmamba_jax.pictures import prediction_sheet
from msvmamba_jax.tasks.base import Batch, Mirror
from msvmamba_jax.tasks.erasing import erase
from msvmamba_jax.tasks.mixing import Mixing
from msvmamba_jax.tasks.pixels import normalise


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
        """See `Task`.

        Returns:
            `label` (b,), as in the batch; `top` int32 (b, 5), the most probable labels, and `probability` (b, 5),
            theirs; `loss` (b,), the cross-entropy without smoothing.
        """
        logits: jax.Array = model(normalise(batch["image"], self.description.preprocessing))
        probability, top = jax.lax.top_k(jax.nn.softmax(logits), min(5, logits.shape[-1]))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"label": batch["label"], "top": top, "probability": probability, "loss": loss}

    def evaluator(self) -> ClassificationEvaluator:
        """See `Task`."""
        return ClassificationEvaluator(self.description.class_names)

    def draw(self, examples: Sequence[tuple[Batch, Batch]]) -> Image.Image:
        """See `Task`: each image under the name of its class, with the most probable classes."""
        names = self.description.class_names
        predictions = [
            {
                "file": names[int(found["label"])],
                "classes": [
                    {"name": names[int(label)], "probability": float(probability)}
                    for label, probability in zip(found["top"], found["probability"], strict=True)
                ],
            }
            for _, found in examples
        ]
        return prediction_sheet([np.asarray(batch["image"]) for batch, _ in examples], predictions)


class ClassificationEvaluator:
    """Exact counts over a split; rows whose mask is False count nowhere."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = class_names
        self._of_class = np.zeros((len(class_names), 2), np.int64)  # images, and those that are right
        self.examples = self.top1 = self.top5 = 0
        self.loss = 0.0

    def update(self, predictions: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """See `Evaluator`."""
        hits = (predictions["top"] == predictions["label"][:, None]) & mask[:, None]
        self.examples += int(mask.sum())
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.sum())
        np.add.at(self._of_class[:, 0], predictions["label"][mask], 1)
        np.add.at(self._of_class[:, 1], predictions["label"][hits[:, 0]], 1)
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

    def per_class(self) -> list[dict[str, Any]]:
        """Of each class the number of images, and the accuracy in 0..1; None where it has no image."""
        return [
            {"name": name, "images": int(images), "accuracy_top1": int(right) / int(images) if images else None}
            for name, (images, right) in zip(self._names, self._of_class, strict=True)
        ]

    def sentence(self) -> str:
        """See `Evaluator`."""
        result = self.result()
        return (
            f"top-1 {result['accuracy_top1']:.2%}, top-5 {result['accuracy_top5']:.2%}, "
            f"loss {result['loss']:.4f} on {self.examples:,} images"
        )
