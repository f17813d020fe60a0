"""Make a detection data set of ten classes of shapes, in files as COCO lies.

Textured ground with objects that hide one another (see data/object_scenes.py), each with its class, box and mask:
train2017/, val2017/ and annotations/instances_{train,val}2017.json. Masks are polygons, several where something lies
across an object; run lengths where an object has holes; and uncompressed run lengths for crowds. As in COCO the ids of
the classes have gaps. An image is a function of the seed, the split and its number alone: the same command makes the
same files, with any number of processes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msvmamba_jax.data import making
from msvmamba_jax.data.object_scenes import Instance, ObjectScene, draw_object_scene
from msvmamba_jax.data.run_lengths import run_lengths
from msvmamba_jax.data.scenes import THINGS
from msvmamba_jax.pictures_detection import detection_picture

CATEGORY_IDS = (1, 2, 3, 5, 6, 8, 11, 13, 16, 20)  # of the classes, in their order
_SPLITS = ("train2017", "val2017")
_QUALITY = 90
_FINER = 4  # pixels of the raster that outlines are found on, for each of the image
_TOLERANCE = 0.4  # pixels that a polygon may leave the outline by
_MIN_PART = 4  # pixels of the smallest part that gets a polygon


def scene(split: int, number: int, *, seed: int, low: int, high: int) -> ObjectScene:
    """Draws a scene; each side has `low` to `high` pixels."""
    rng = np.random.default_rng([seed, split, number])
    height, width = (int(side) for side in rng.integers(low, high + 1, 2))
    return draw_object_scene(rng, height, width)


def image_id(split: int, number: int) -> int:
    """Of an image; those of the two splits differ, and have gaps."""
    return 4 * number + 2 * split + 1


def annotation(instance: Instance) -> dict[str, Any]:
    """What COCO's file says of an instance, without the ids of itself and its image.

    Area and box are those of the mask that COCO's tools make of the segmentation.
    """
    from pycocotools import mask as masks

    height, width = instance.mask.shape
    if instance.crowd:
        segmentation: Any = {"size": [height, width], "counts": run_lengths(instance.mask)}
        code = masks.frPyObjects(segmentation, height, width)
    elif polygons := outlines(instance.mask):
        segmentation = polygons
        code = masks.merge(masks.frPyObjects(polygons, height, width))
    else:
        code = masks.encode(np.asfortranarray(instance.mask, np.uint8))
        segmentation = {"size": [height, width], "counts": code["counts"].decode()}
    return {
        "segmentation": segmentation,
        "area": float(masks.area(code)),
        "iscrowd": int(instance.crowd),
        "bbox": masks.toBbox(code).tolist(),
        "category_id": CATEGORY_IDS[instance.label],
    }


def outlines(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask's parts as polygons, x and y in turn, in pixels; none where a part has a hole."""
    import cv2

    # On a finer raster, where slanting edges are no stairs, since OpenCV's outlines run through the centres of pixels.
    finer = cv2.resize(mask.astype(np.float32), None, fx=_FINER, fy=_FINER, interpolation=cv2.INTER_LINEAR) > 0.5
    contours, hierarchy = cv2.findContours(finer.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None or (hierarchy[..., 3] >= 0).any():  # one lies in another
        return []
    polygons = []
    for contour in contours:
        points = (cv2.approxPolyDP(contour, _FINER * _TOLERANCE, True)[:, 0] + 0.5) / _FINER
        if len(points) >= 3 and cv2.contourArea(contour) >= _MIN_PART * _FINER**2:
            polygons.append(points.round(2).ravel().tolist())
    return polygons


def _write(job: tuple[int, int], *, root: Path, seed: int, low: int, high: int) -> tuple[dict[str, Any], list[Any]]:
    """Draws and writes one scene (the split's number, its own); returns what the JSON file says of it."""
    drawn = scene(*job, seed=seed, low=low, high=high)
    identifier = image_id(*job)
    height, width = drawn.image.shape[:2]
    name = f"{identifier:012}.jpg"
    Image.fromarray(drawn.image).save(root / _SPLITS[job[0]] / name, quality=_QUALITY)
    entry = {"license": 1, "file_name": name, "height": height, "width": width, "id": identifier}
    return entry, [{**annotation(instance), "image_id": identifier} for instance in drawn.instances]


def make(root: Path, *, train: int, val: int, seed: int, low: int, high: int, processes: int) -> None:
    """Writes the data set.

    Raises:
        InputError: `root` exists and is not empty, or cannot be written.
    """
    with making.new_folder(root):
        (root / "annotations").mkdir()
        number = 0  # of the annotation
        for split, count in enumerate((train, val)):
            (root / _SPLITS[split]).mkdir()
            jobs = [(split, number) for number in range(count)]
            write = functools.partial(_write, root=root, seed=seed, low=low, high=high)
            images, annotations = [], []
            for image, entries in making.run(write, jobs, processes=processes):
                images.append(image)
                for entry in entries:
                    number += 1
                    annotations.append({**entry, "id": number})
            contents = {
                "info": {"description": "Made-up objects", "version": "1.0"},
                "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
                "images": images,
                "annotations": annotations,
                "categories": [
                    {"supercategory": "shape", "id": identifier, "name": name}
                    for identifier, name in zip(CATEGORY_IDS, THINGS, strict=True)
                ],
            }
            (root / "annotations" / f"instances_{_SPLITS[split]}.json").write_text(json.dumps(contents))


def preview(*, seed: int, low: int, high: int, rows: int = 3, columns: int = 4) -> Image.Image:
    """The first training scenes with their objects' boxes, masks and names."""
    tiles = []
    for number in range(rows * columns):
        image, instances = scene(0, number, seed=seed, low=low, high=high)
        masks = np.array([instance.mask for instance in instances], bool).reshape(-1, *image.shape[:2])
        boxes = np.array([annotation(instance)["bbox"] for instance in instances], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        names = [THINGS[instance.label] + ("s" if instance.crowd else "") for instance in instances]
        tiles.append(detection_picture(image, boxes, masks, np.arange(len(names)), None, names))
    return making.contact_sheet(tiles, columns=columns, gap=16)


def main() -> None:
    """The command."""
    options = making.parse_scene_options(
        __doc__, example="scripts/make_objects_dataset.py datasets/objects --preview objects.png",
        contents="train2017/, val2017/ and annotations/", train=1000, val=100, low=128, high=192, least=64,
    )  # fmt: skip
    for module in ("cv2", "pycocotools"):
        if importlib.util.find_spec(module) is None:
            sys.exit("error: masks are encoded with OpenCV and pycocotools: pip install 'msvmamba_jax[data]'")
    making.make_scenes(options, make, preview, classes=len(THINGS))


if __name__ == "__main__":
    main()
