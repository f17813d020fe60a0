"""The made-up detection data set: in COCO's form, reproducible, and read by COCO's tools as it was drawn."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from dataset_scripts import check_options, check_that_nothing_is_overwritten, contents, load_script, run
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from msvmamba_jax.data.object_scenes import Instance
from msvmamba_jax.data.scenes import THINGS

script = load_script("make_objects_dataset")

LOOK = {"seed": 0, "low": 128, "high": 192}


def overlap(first, second):
    return (first & second).sum() / (first | second).sum()


def test_the_folder_is_read_back_and_reproducible(monkeypatch, tmp_path):
    sizes = ("--low", 80, "--high", 120)
    run(monkeypatch, script, tmp_path / "one", "--train", 7, "--val", 4, "--processes", 1, *sizes)
    run(monkeypatch, script, tmp_path / "two", "--train", 7, "--val", 4, "--processes", 2, *sizes)
    assert len(contents(tmp_path / "one")) == 13
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    run(monkeypatch, script, tmp_path / "three", "--train", 1, "--val", 1, "--seed", 1, "--processes", 1, *sizes)
    first = Path("train2017/000000000001.jpg")
    assert (tmp_path / "three" / first).read_bytes() != (tmp_path / "one" / first).read_bytes()

    image_ids, annotation_ids = [], []
    for split, (name, count) in enumerate({"train2017": 7, "val2017": 4}.items()):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(tmp_path / "one" / "annotations" / f"instances_{name}.json"))
        assert len(coco.imgs) == count
        assert {entry["name"]: entry["id"] for entry in coco.cats.values()} == dict(
            zip(THINGS, script.CATEGORY_IDS, strict=True)
        )
        for number, (image_id, entry) in enumerate(coco.imgs.items()):
            drawn = script.scene(split, number, seed=0, low=80, high=120)
            with Image.open(tmp_path / "one" / name / entry["file_name"]) as image:
                assert image.size == (entry["width"], entry["height"])
                assert np.abs(np.asarray(image).astype(int) - drawn.image).mean() < 16  # JPEG
            found = coco.imgToAnns[image_id]
            assert len(found) == len(drawn.instances)
            for annotation, instance in zip(found, drawn.instances, strict=True):
                assert coco.cats[annotation["category_id"]]["name"] == THINGS[instance.label]
                assert annotation["iscrowd"] == instance.crowd
                mask = coco.annToMask(annotation).astype(bool)
                assert mask.shape == drawn.image.shape[:2]
                assert overlap(mask, instance.mask) > 0.8
        image_ids += coco.imgs
        annotation_ids += coco.anns
    assert len(set(image_ids)) == 11
    assert sorted(annotation_ids) == list(range(1, len(annotation_ids) + 1))


@pytest.fixture(scope="module")
def annotated():
    """Instances and what the file says of them, of 60 scenes."""
    instances = [instance for number in range(60) for instance in script.scene(0, number, **LOOK).instances]
    return [(instance, script.annotation(instance)) for instance in instances]


def code(annotation, mask):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        return masks.merge(masks.frPyObjects(segmentation, *mask.shape))
    return masks.frPyObjects(segmentation, *mask.shape) if annotation["iscrowd"] else segmentation


def test_masks_are_those_that_were_drawn(annotated):
    large = 0
    for instance, annotation in annotated:
        found = masks.decode(code(annotation, instance.mask)).astype(bool)
        if isinstance(annotation["segmentation"], dict):
            np.testing.assert_array_equal(found, instance.mask)
        elif instance.mask.sum() > 200:
            assert overlap(found, instance.mask) > 0.95
            large += 1
        else:
            assert overlap(found, instance.mask) > 0.8
    assert large > 150


def test_areas_and_boxes_are_those_of_the_masks(annotated):
    for instance, annotation in annotated:
        mask = masks.decode(code(annotation, instance.mask))
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
        assert annotation["bbox"] == [float(value) for value in box]
        assert annotation["area"] == mask.sum()


def test_all_forms_of_segmentation_occur(annotated):
    crowds = [annotation["segmentation"] for _, annotation in annotated if annotation["iscrowd"]]
    assert len(crowds) > 2
    assert all(isinstance(segmentation["counts"], list) for segmentation in crowds)
    others = [annotation["segmentation"] for _, annotation in annotated if not annotation["iscrowd"]]
    polygons = [segmentation for segmentation in others if isinstance(segmentation, list)]
    compressed = [segmentation for segmentation in others if isinstance(segmentation, dict)]
    assert len(polygons) > 5 * len(compressed) > 50
    assert all(isinstance(segmentation["counts"], str) for segmentation in compressed)
    assert sum(len(parts) > 1 for parts in polygons) > 10
    assert all(len(part) >= 6 and len(part) % 2 == 0 for parts in polygons for part in parts)
    assert np.mean([len(part) // 2 for parts in polygons for part in parts]) < 70  # no stairs along slanting edges
    json.dumps([annotation for _, annotation in annotated])


def test_outlines_by_hand():
    mask = np.zeros((20, 30), bool)
    mask[4:12, 3:9] = mask[4:12, 15:25] = True
    mask[18, 1] = True  # too small to be drawn
    parts = sorted(script.outlines(mask))
    assert len(parts) == 2
    # Corners may be cut, by no more than a pixel.
    for part, box in zip(parts, ((3, 4, 9, 12), (15, 4, 25, 12)), strict=True):
        points = np.array(part).reshape(-1, 2)
        np.testing.assert_allclose([*points.min(axis=0), *points.max(axis=0)], box, atol=0.2)
    mask[6:8, 5:7] = False
    assert script.outlines(mask) == []
    holed = script.annotation(Instance(4, mask, False))
    assert masks.decode(holed["segmentation"]).sum() == mask.sum() == holed["area"]
    assert holed["category_id"] == script.CATEGORY_IDS[4]


def test_preview(monkeypatch, tmp_path, capsys):
    options = ("--train", 1, "--val", 1, "--low", 64, "--high", 70, "--processes", 1)
    run(monkeypatch, script, tmp_path / "data", "--preview", tmp_path / "objects.png", *options)
    assert "2 images of 10 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "objects.png") as sheet:
        assert sheet.width > 4 * 600
        colours = sheet.convert("RGB").getcolors(sheet.width * sheet.height)
    assert len(colours) > 1000
    with pytest.raises(SystemExit, match="cannot write"):
        run(monkeypatch, script, tmp_path / "other", "--preview", tmp_path / "objects.unknown", *options)


def test_nothing_is_overwritten_and_options_are_checked(monkeypatch, tmp_path):
    check_that_nothing_is_overwritten(monkeypatch, script, tmp_path / "data")
    check_options(monkeypatch, script, tmp_path / "other", least=64)


def test_needs_opencv_and_pycocotools(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'msvmamba_jax\[data\]'"):
        run(monkeypatch, script, tmp_path / "other")
    assert not (tmp_path / "other").exists()
