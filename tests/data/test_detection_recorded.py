"""Loading, resizing, flipping and cropping against a recording of mmdetection, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import CATEGORIES, write
from PIL import Image

from msvmamba_jax.data.coco import load_coco
from msvmamba_jax.data.detection_geometry import Crop, Flip, Resize, Step
from msvmamba_jax.data.resizing import rescale_size

RECORDED = Path(__file__).parents[1] / "parity" / "detection" / "augment.npz"
PLANS = ("flip_last", "flip_first", "crop", "crop_far")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.fixture(scope="module")
def record(recorded: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("recorded")
    height, width = recorded["image"].shape[:2]
    data = {
        "images": [{"id": 5, "file_name": "one.png", "height": height, "width": width}],
        "annotations": json.loads(str(recorded["annotations"])),
        "categories": CATEGORIES,
    }
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        Image.fromarray(recorded["image"]).save(root / f"{split}2017" / "one.png")
        write(root, split, data if split == "train" else {**data, "annotations": []})
    return load_coco(root)[0][0]


def step_of(name: str, *arguments: Any, size: tuple[int, int]) -> Step:
    if name == "resize":
        return Resize(*rescale_size(*size, tuple(arguments[0])))
    return Flip() if name == "flip" else Crop(*arguments)


def categories(labels: np.ndarray) -> np.ndarray:
    return np.sort([category["id"] for category in CATEGORIES])[labels]


def test_loading(recorded: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """mmdetection sets the ignored ones aside later; nothing here is a crowd."""
    kept = ~recorded["loaded_ignored"]
    assert len(json.loads(str(recorded["annotations"]))) > len(kept) > kept.sum() == 7
    np.testing.assert_array_equal(record["image"], recorded["image"])
    np.testing.assert_array_equal(record["boxes"], recorded["loaded_boxes"][kept])
    np.testing.assert_array_equal(categories(record["labels"]), recorded["loaded_categories"][kept])
    assert not record["crowd"].any()
    masks = np.packbits([mask.pixels() for mask in record["masks"]], axis=-1)
    np.testing.assert_array_equal(masks, recorded["loaded_masks"][kept])


@pytest.mark.parametrize("name", PLANS)
def test_steps(recorded: dict[str, np.ndarray], record: dict[str, Any], name: str) -> None:
    image, boxes, kept = record["image"], record["boxes"], np.arange(len(record["boxes"]))
    size = image.shape[:2]
    steps = []
    for kind, *arguments in json.loads(str(recorded["plans"]))[name]:
        step = step_of(kind, *arguments, size=size)
        image, boxes, size = step.image(image), step.boxes(boxes, size), step.size(size)
        touching = step.touches(boxes)
        boxes, kept = boxes[touching], kept[touching]
        steps.append(step)
    assert (len(kept) < 7) == name.startswith("crop")
    np.testing.assert_array_equal(image, recorded[f"{name}/image"])
    assert boxes.dtype == np.float32
    np.testing.assert_array_equal(boxes, recorded[f"{name}/boxes"])
    np.testing.assert_array_equal(categories(record["labels"][kept]), recorded[f"{name}/categories"])
    for number, expected in zip(kept, recorded[f"{name}/masks"], strict=True):
        mask = record["masks"][number].pixels()
        for step in steps:
            mask = step.mask(mask)
        np.testing.assert_array_equal(np.packbits(mask, axis=-1), expected)
