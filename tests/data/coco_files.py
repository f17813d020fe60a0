"""A small data set in COCO's form, made up; the tests change what they are about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
SIZES = {5: (40, 60), 3: (64, 48), 21: (50, 50), 8: (45, 70), 34: (70, 40)}  # by the images' ids
SPLITS = {"train": "train2017", "val": "val2017"}


def pixels(identifier: int) -> np.ndarray:
    return np.random.default_rng(identifier).integers(0, 256, (*SIZES[identifier], 3), np.uint8)


def annotation(identifier: int, image: int, **options: Any) -> dict[str, Any]:
    """An object somewhere on its image; its mask is a polygon with decimals."""
    rng = np.random.default_rng([identifier, image])
    height, width = SIZES[image]
    x1, y1 = (round(float(value), 2) for value in rng.uniform(1, (width / 2, height / 2)))
    x2, y2 = (round(float(value), 2) for value in rng.uniform((x1 + 5, y1 + 5), (width, height)))
    result = {
        "id": identifier,
        "image_id": image,
        "category_id": CATEGORIES[int(rng.integers(3))]["id"],
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "area": round((x2 - x1) * (y2 - y1) / 2, 4),
        "iscrowd": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2]],
    }
    result.update(options)
    return {key: value for key, value in result.items() if value is not ...}


def run_lengths(identifier: int) -> dict[str, Any]:
    """Of a mask of the image's size."""
    height, width = SIZES[identifier]
    return {"size": [height, width], "counts": [height, 2 * height, height * width - 3 * height]}


def content() -> dict[str, Any]:
    """Five images, of which one has no object; 12 objects and a crowd, in no order."""
    owners = [5, 21, 3, 5, 8, 3, 5, 21, 3, 5, 5, 8]
    annotations = [annotation(100 + 7 * number, image) for number, image in enumerate(owners)]
    annotations.append(annotation(99, 3, iscrowd=1, segmentation=run_lengths(3)))
    images = [
        {"id": identifier, "file_name": f"{identifier:012}.png", "height": height, "width": width}
        for identifier, (height, width) in SIZES.items()
    ]
    return {
        "info": {"description": "made up [{"},
        "images": images,
        "licenses": [],
        "annotations": annotations,
        "categories": [dict(category) for category in CATEGORIES],
    }


def write(root: Path, split: str, data: Any) -> Path:
    """Writes the JSON file of a split."""
    path = root / "annotations" / f"instances_{SPLITS[split]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def make(root: Path) -> Path:
    """Both splits hold the same."""
    for split, folder in SPLITS.items():
        (root / folder).mkdir(parents=True)
        for identifier in SIZES:
            Image.fromarray(pixels(identifier)).save(root / folder / f"{identifier:012}.png")  # lossless, to compare
        write(root, split, content())
    return root
