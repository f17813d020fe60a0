"""Records of COCO through augmentation, preprocessing and the batches of evaluation."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from coco_files import SIZES, make, pixels

from msvmamba_jax.data.coco import load_coco
from msvmamba_jax.data.detection_augment import CropOption, DetectionAugmentation, aspect_groups, slots
from msvmamba_jax.data.detection_preprocessing import DetectionPreprocessing, detection_example, detection_shapes
from msvmamba_jax.data.pipeline import Dataset, evaluation_batches, plan_evaluation

PREPROCESSING = DetectionPreprocessing(scale=(60, 40), divisor=8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "coco")


@pytest.mark.parametrize("bucket", [0, 64])
def test_evaluation(root: Path, bucket: int) -> None:
    damaged = root / "val2017" / "000000000008.png"
    damaged.write_bytes(damaged.read_bytes()[:-300])
    train, evaluation, names = load_coco(root)
    dataset = Dataset(
        train=train,
        evaluation=evaluation,
        class_names=names,
        preprocessing=PREPROCESSING,
        augment=DetectionAugmentation(),
        prepare=functools.partial(detection_example, PREPROCESSING, bucket),
        evaluation_shapes=functools.partial(detection_shapes, PREPROCESSING, bucket, evaluation.sizes),
    )
    plan = plan_evaluation(dataset, batch_size=2)
    assert plan.shapes == (1 if bucket else 4)
    seen = []
    for batch in evaluation_batches(dataset, plan):
        assert {name: value.dtype for name, value in batch.items()} == {
            "image": np.uint8,
            "extent": np.int32,
            "scale": np.float32,
            "index": np.int32,
            "mask": bool,
        }
        for row in np.flatnonzero(batch["mask"]):
            identifier = int(evaluation.image_ids[batch["index"][row]])
            seen.append(identifier)
            expected, extent, scale = PREPROCESSING.prepare(pixels(identifier), bucket)
            np.testing.assert_array_equal(batch["image"][row], expected)
            np.testing.assert_array_equal(batch["extent"][row], extent)
            np.testing.assert_array_equal(batch["scale"][row], scale)
    assert sorted(seen) == sorted(set(SIZES) - {8})


def test_training_examples_of_a_group_can_be_stacked(root: Path) -> None:
    train, _, _ = load_coco(root)
    augment = DetectionAugmentation(
        scales=((60, 40), (60, 32)), crop=CropOption(scales=((60, 40),), low=20, high=40), divisor=8
    )
    groups = aspect_groups(train.sizes)
    assert set(groups) == {0, 1}
    for group in (0, 1):
        members = np.flatnonzero(groups == group)
        room = slots(int(train.counts[members].max()))
        examples = [
            augment({**train[int(index)], "slots": room}, np.random.default_rng(seed))
            for index in members
            for seed in range(5)
        ]
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        shape = (64, 40) if group else (40, 64)
        assert batch["image"].shape[1:3] == shape == (*batch["masks"].shape[2:3], 8 * batch["masks"].shape[3])
        assert batch["valid"].any(axis=0).sum() == train.counts[members].max()
        assert (batch["boxes"] <= np.array([shape[1], shape[0]] * 2)).all()
