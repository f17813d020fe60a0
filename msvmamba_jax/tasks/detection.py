"""Object detection and instance segmentation with Mask R-CNN; COCO's average precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.coco import CocoRecords
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.inference import detect
from msvmamba_jax.models.detection.masks import paste_masks
from msvmamba_jax.models.detection.rpn import TEST_LIMITS, TRAINING_LIMITS, ProposalLimits
from msvmamba_jax.models.detection.sampling import HEAD_QUOTA, RPN_QUOTA, Quota
from msvmamba_jax.pictures_detection import Found, detection_sheet
from msvmamba_jax.pictures_detection import Truth as TrueObjects
from msvmamba_jax.tasks.base import Batch, Mirror
from msvmamba_jax.tasks.detection_losses import Truth, detection_loss
from msvmamba_jax.tasks.detection_metrics import DetectionEvaluator
from msvmamba_jax.tasks.pixels import normalise, zero_beyond


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detection:
    """The detection task; see `Task`.

    Attributes:
        description: the model and its classes.
        records: the split that predictions are evaluated on; None where none are.
        proposals: how many the RPN makes in training.
        evaluation_proposals: how many in evaluation.
        anchor_samples: anchors of an image that the RPN learns from, at most half of them positive.
        region_samples: proposals of an image that the heads learn from, at most a quarter of them positive.

    Raises:
        InputError: on construction, when a number is too small.
    """

    description: Description
    records: CocoRecords | None = None
    proposals: ProposalLimits = TRAINING_LIMITS
    evaluation_proposals: ProposalLimits = TEST_LIMITS
    anchor_samples: int = RPN_QUOTA.total
    region_samples: int = HEAD_QUOTA.total
    score: str = "bbox_mAP"

    def __post_init__(self) -> None:
        least = {"proposals": min(self.proposals), "evaluation_proposals": min(self.evaluation_proposals)}
        for name, value in {
            **least,
            "anchor_samples": self.anchor_samples,
            "region_samples": self.region_samples,
        }.items():
            if value < 4:
                raise InputError(f"config.regions.{name} must be at least 4; got {value}")

    def prepare(self, batch: Batch, keys: jax.Array, batch_key: jax.Array, mirror: Mirror) -> Batch:
        """See `Task`.

        Args:
            batch: `image` uint8 (b, h, w, 3) and `extent` int32 (b, 2), the rows and columns that an image fills;
                `boxes` float32 (b, g, 4), `labels` int32 (b, g), `valid` bool (b, g) and `masks` uint8
                (b, g, h, ceil(w / 8)), see `Truth`.
            keys: not used.
            batch_key: not used.
            mirror: not used.

        Returns:
            The same; `image` is float32, normalised, and 0 beyond `extent`.
        """
        return {**batch, "image": self._normalised(batch)}

    def loss(self, model: Any, batch: Batch, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task`: the sum of the losses of the RPN and of the two heads."""
        truth = Truth(batch["boxes"], batch["labels"], batch["valid"], batch["masks"], batch["extent"])
        loss, metrics = detection_loss(
            model,
            batch["image"],
            truth,
            keys,
            limits=self.proposals,
            rpn_quota=Quota(self.anchor_samples, self.anchor_samples // 2),
            head_quota=Quota(self.region_samples, self.region_samples // 4),
        )
        return loss, dict(metrics)

    def predict(self, model: Any, batch: Batch) -> dict[str, jax.Array]:
        """See `Task`.

        Args:
            model: the model.
            batch: `image` and `extent` as for `prepare`; `scale` float32 (b, 2), by how much width and height were
                resized; `index` int32 (b,), the image's place in the split.

        Returns:
            `index`, and the fields of `Predictions`, boxes in pixels of the images before they were resized.
        """
        limits = self.evaluation_proposals
        found = detect(model, self._normalised(batch), batch["extent"], batch["scale"], limits)
        return {"index": batch["index"], **found._asdict()}

    def _normalised(self, batch: Batch) -> jax.Array:
        return zero_beyond(normalise(batch["image"], self.description.preprocessing), batch["extent"])

    def evaluator(self) -> DetectionEvaluator:
        """See `Task`."""
        assert self.records is not None
        return DetectionEvaluator(
            self.records.ground_truth(),
            self.records.image_ids,
            self.records.category_ids,
            self.description.class_names,
        )

    def draw(self, examples: Sequence[tuple[Batch, Batch]]) -> Image.Image:
        """See `Task`: what was found in each image, and the true objects beside it."""
        assert self.records is not None
        return detection_sheet([_drawn(self.records, found) for _, found in examples], self.description.class_names)


def _drawn(records: CocoRecords, found: Batch) -> tuple[np.ndarray, Found, TrueObjects]:
    """An image as it is in its file, what was found in it, and its true objects without crowds."""
    record = records[int(found["index"])]
    height, width = record["image"].shape[:2]
    valid = np.asarray(found["valid"])
    boxes, labels, scores = (np.asarray(found[name])[valid] for name in ("box", "label", "score"))
    masks = paste_masks(np.asarray(found["mask"])[valid], boxes, height, width)
    objects = np.flatnonzero(~record["crowd"])
    true_masks = [record["masks"][index].pixels().astype(bool) for index in objects]
    truth = (
        record["boxes"][objects],
        np.stack(true_masks) if true_masks else np.zeros((0, height, width), bool),
        record["labels"][objects],
    )
    return record["image"], (boxes, masks, labels, scores), truth
