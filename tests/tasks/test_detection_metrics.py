"""COCO's metrics of detections, against pycocotools driven by hand on made-up annotations."""

from __future__ import annotations

import builtins
import copy
import json
import math

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msvmamba_jax.command import table
from msvmamba_jax.data.run_lengths import run_lengths
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.masks import paste_masks
from msvmamba_jax.tasks.detection_metrics import DetectionEvaluator

IDS = (7, 90, 3)  # of the categories, with gaps and not sorted
NAMES = ("cat", "kite", "dog")
IMAGES = {139: (220, 260), 25: (90, 200), 8: (64, 64), 1000: (250, 250), 4: (50, 40)}  # height, width
STATS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


def disc(height, width, box):
    """An ellipse that fills a box, bool."""
    x1, y1, x2, y2 = box
    y, x = np.mgrid[:height, :width] + 0.5
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1


def annotation(number, image_id, category_id, mask, iscrowd=0):
    y, x = np.nonzero(mask)
    left, top = int(x.min()), int(y.min())
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "iscrowd": iscrowd,
        "bbox": [left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }


def made_up(seed=0, objects=8):
    """Annotations of discs of all sizes, polygons and crowds among them; the fifth image has none."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id, (height, width) in list(IMAGES.items())[:4]:
        for count in range(objects):
            side = np.exp(rng.uniform(np.log(10), np.log(300), 2))
            x, y = rng.uniform(0.1, 0.9, 2) * (width, height) - side / 2
            mask = disc(height, width, (x, y, x + side[0], y + side[1]))
            category_id = int(rng.choice([7, 3, 55]))  # of 90 there is none, nobody asks for 55
            entry = annotation(len(annotations) + 1, image_id, category_id, mask, iscrowd=int(count == 0))
            if count % 3 == 1:
                x1, y1, w, h = entry["bbox"]
                entry["segmentation"] = [[x1, y1, x1 + w, y1, x1 + w / 2, y1 + h], [x1, y1, x1, y1 + 4, x1 + 4, y1]]
            annotations.append(entry)
    return {
        "images": [{"id": number, "height": h, "width": w} for number, (h, w) in IMAGES.items()],
        "categories": [{"id": number, "name": str(number)} for number in (3, 7, 55, 90)],
        "annotations": annotations,
    }


def coco(dataset):
    result = COCO()
    result.dataset = copy.deepcopy(dataset)
    result.createIndex()
    return result


def guesses(dataset, seed=0, slots=12, size=28):
    """Predictions in all images: objects moved a little, some with another class, and some out of nowhere."""
    rng = np.random.default_rng(seed)
    count = len(IMAGES)
    found = {
        "index": np.arange(count, dtype=np.int32),
        "box": np.zeros((count, slots, 4), np.float32),
        "score": rng.uniform(0.05, 1, (count, slots)).astype(np.float32).round(1),  # ties
        "label": rng.integers(0, 3, (count, slots)).astype(np.int32),
        "mask": np.stack([disc(size, size, (0, 0, size, size))] * (count * slots)).reshape(count, slots, size, size),
        "valid": rng.random((count, slots)) < 0.9,
    }
    found["mask"] = (found["mask"] * rng.uniform(0.4, 1, found["mask"].shape)).astype(np.float32)
    for index, image_id in enumerate(IMAGES):
        objects = [entry for entry in dataset["annotations"] if entry["image_id"] == image_id]
        height, width = IMAGES[image_id]
        for slot in range(slots):
            corner, side = rng.uniform(0, 0.7, 2) * (width, height), rng.uniform(5, 80, 2)
            if slot < len(objects):
                x, y, w, h = objects[slot]["bbox"]
                corner, side = rng.normal((x, y), 1.5), rng.normal((w, h), 1.5)
                if objects[slot]["category_id"] in IDS and rng.random() < 0.8:
                    found["label"][index, slot] = IDS.index(objects[slot]["category_id"])
            found["box"][index, slot] = *corner, *(corner + np.maximum(side, 2))
    return found


def by_hand(dataset, found, rows, kind):
    """pycocotools' own way: results through `loadRes`, its dense encoder, its summary."""
    results = []
    for row in rows:
        image_id = list(IMAGES)[found["index"][row]]
        for slot in np.flatnonzero(found["valid"][row]):
            x1, y1, x2, y2 = found["box"][row, slot].tolist()
            pasted = paste_masks(found["mask"][row, slot][None], found["box"][row, slot][None], *IMAGES[image_id])[0]
            result = {
                "image_id": image_id,
                "category_id": IDS[found["label"][row, slot]],
                "score": float(found["score"][row, slot]),
            }
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["segmentation"] = mask_utils.encode(np.asfortranarray(pasted.astype(np.uint8)))
            results.append(result)
    truth = coco(dataset)
    evaluation = COCOeval(truth, truth.loadRes(results), kind)
    evaluation.params.imgIds = [list(IMAGES)[found["index"][row]] for row in rows]
    evaluation.params.catIds = list(IDS)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def evaluator_of(dataset):
    return DetectionEvaluator(coco(dataset), np.array(list(IMAGES)), IDS, NAMES)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_pycocotools(seed, capsys):
    dataset = made_up(seed)
    found = guesses(dataset, seed)
    evaluator = evaluator_of(dataset)
    mask = np.array([True, False, True, True, True])  # the second row is padding
    for part in (slice(3, 5), slice(0, 3)):  # in any order
        evaluator.update({name: array[part] for name, array in found.items()}, mask[part])
    assert capsys.readouterr().out == "creating index...\nindex created!\n"  # of this test
    result, classes = evaluator.result(), evaluator.per_class()
    assert capsys.readouterr().out == ""
    expected = {}
    for kind in ("bbox", "segm"):
        evaluation = by_hand(dataset, found, np.flatnonzero(mask), kind)
        expected |= {
            f"{kind}_{name}": value for name, value in zip(STATS, evaluation.stats[:6], strict=True) if value > -1
        }
        for k, category_id in enumerate(evaluation.params.catIds):
            precision = evaluation.eval["precision"][:, :, k, 0, -1]
            value = precision[precision > -1].mean() if (precision > -1).any() else None
            assert classes[IDS.index(category_id)][f"{kind}_AP"] == pytest.approx(value, abs=1e-12)
    assert result == pytest.approx({**expected, "images": 4}, abs=1e-12)
    assert 0.02 < result["bbox_mAP"] < 0.98
    assert 0.01 < result["segm_mAP"] < 0.98
    assert result["segm_mAP"] != result["bbox_mAP"]
    counted = [
        sum(a["category_id"] == i and a["image_id"] != 25 and not a["iscrowd"] for a in dataset["annotations"])
        for i in IDS
    ]
    assert [row["objects"] for row in classes] == counted
    assert [row["name"] for row in classes] == list(NAMES)
    assert classes[1] == {"name": "kite", "bbox_AP": None, "segm_AP": None, "objects": 0}
    assert "\nkite        -        -        0\n" in table(classes)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in result.values())
    json.dumps([result, classes], allow_nan=False)


def perfect(dataset, size=28):
    """The objects that are no crowds, as boxes full of mask."""
    count = len(IMAGES)
    found = {
        "index": np.arange(count, dtype=np.int32),
        "box": np.zeros((count, 8, 4), np.float32),
        "score": np.full((count, 8), 0.9, np.float32),
        "label": np.zeros((count, 8), np.int32),
        "mask": np.ones((count, 8, size, size), np.float32),
        "valid": np.zeros((count, 8), bool),
    }
    for index, image_id in enumerate(IMAGES):
        objects = [
            a for a in dataset["annotations"]
            if a["image_id"] == image_id and not a["iscrowd"] and a["category_id"] in IDS
        ]  # fmt: skip
        for slot, entry in enumerate(objects):
            x, y, w, h = entry["bbox"]
            found["box"][index, slot] = x, y, x + w, y + h
            found["label"][index, slot] = IDS.index(entry["category_id"])
            found["valid"][index, slot] = True
    return found


def rectangles():
    """As `made_up`, with nothing but rectangles."""
    dataset = made_up()
    for entry in dataset["annotations"]:
        x, y, w, h = entry["bbox"]
        mask = np.zeros(IMAGES[entry["image_id"]], bool)
        mask[y : y + h, x : x + w] = True
        entry["segmentation"], entry["area"] = {"size": list(mask.shape), "counts": run_lengths(mask)}, int(mask.sum())
    return dataset


def test_perfect_predictions():
    dataset = rectangles()
    evaluator = evaluator_of(dataset)
    evaluator.update(perfect(dataset), np.ones(5, bool))
    result = evaluator.result()
    assert result.pop("images") == 5
    assert set(result) == {f"{kind}_{name}" for kind in ("bbox", "segm") for name in STATS}
    assert result == pytest.approx(dict.fromkeys(result, 1.0))
    assert evaluator.sentence() == (
        "box mAP 100.00% (100.00% at overlap 0.5), mask mAP 100.00% (100.00% at overlap 0.5) on 5 images"
    )


def test_what_lies_in_a_crowd_is_no_mistake():
    """Of two wrong detections with the best scores, the one in the crowd counts nowhere."""
    dataset = rectangles()
    crowd = next(a for a in dataset["annotations"] if a["iscrowd"] and a["image_id"] == 139)
    crowd["category_id"] = 7
    values = {}
    for iscrowd in (1, 0):
        crowd["iscrowd"] = 1
        found = perfect(dataset)
        crowd["iscrowd"] = iscrowd
        x, y, w, h = crowd["bbox"]
        found["box"][0, 7] = x, y, x + w / 3, y + h / 3
        found["score"][0, 7], found["label"][0, 7], found["valid"][0, 7] = 1.0, 0, True
        evaluator = evaluator_of(dataset)
        evaluator.update(found, np.ones(5, bool))
        values[iscrowd] = evaluator.result()
    assert values[1]["bbox_mAP"] == values[1]["segm_mAP"] == pytest.approx(1.0)
    assert values[0]["bbox_mAP"] < 0.95
    assert values[0]["segm_mAP"] < 0.95


def test_annotation_number_zero_is_matched():
    """pycocotools takes number 0 for no match, and a second object of a number hides the first."""
    dataset = rectangles()
    for entry in dataset["annotations"]:
        entry["id"] = 0
    evaluator = evaluator_of(dataset)
    evaluator.update(perfect(dataset), np.ones(5, bool))
    assert evaluator.result()["bbox_mAP"] == pytest.approx(1.0)


def test_no_detections():
    dataset = made_up()
    evaluator = evaluator_of(dataset)
    empty = evaluator.result()
    assert empty == {f"{kind}_{name}": 0.0 for kind in ("bbox", "segm") for name in STATS[:3]} | {"images": 0}
    assert {row["objects"] for row in evaluator.per_class()} == {0}
    found = guesses(dataset)
    evaluator.update(found, np.zeros(5, bool))
    assert evaluator.result() == empty
    found["valid"][:] = False
    evaluator.update(found, np.ones(5, bool))
    result = evaluator.result()
    assert result.pop("images") == 5
    assert result == dict.fromkeys(result, 0.0)
    assert "bbox_mAP_s" in result
    # Images without objects define nothing but count.
    alone = evaluator_of(dataset)
    alone.update(guesses(dataset), np.arange(5) == 4)
    assert alone.result() == {**empty, "images": 1}


def test_results_follow_what_is_added():
    dataset = rectangles()
    evaluator = evaluator_of(dataset)
    found = perfect(dataset)
    evaluator.update(found, np.arange(5) == 0)
    assert evaluator.result()["bbox_mAP"] == pytest.approx(1.0)
    found["valid"][:] = False
    evaluator.update(found, np.arange(5) == 1)
    assert evaluator.result()["bbox_mAP"] < 0.9
    assert evaluator.result()["images"] == 2


def test_images_count_once():
    dataset = made_up()
    evaluator = evaluator_of(dataset)
    found = guesses(dataset)
    evaluator.update(found, np.ones(5, bool))
    with pytest.raises(ValueError, match="image 8 was evaluated twice"):
        evaluator.update(found, np.arange(5) == 2)
    for index in (-1, 5):
        with pytest.raises(ValueError, match="of a split of 5"):
            evaluator_of(dataset).update({**found, "index": np.full(5, index)}, np.ones(5, bool))
    with pytest.raises(ValueError, match="an image id occurs twice"):
        DetectionEvaluator(coco(dataset), [4, 4], IDS, NAMES)


def test_saved_detections_are_read_back(tmp_path):
    dataset = made_up(2)
    found = guesses(dataset, 2)
    evaluator = evaluator_of(dataset)
    evaluator.update(found, np.ones(5, bool))
    evaluator.save(tmp_path / "detections.json")
    saved = json.loads((tmp_path / "detections.json").read_text())
    assert len(saved) == found["valid"].sum()
    assert saved[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    truth = coco(dataset)
    result = evaluator.result()
    for kind in ("bbox", "segm"):
        if kind == "segm":
            for entry in saved:
                del entry["bbox"]
        evaluation = COCOeval(truth, truth.loadRes(saved), kind)
        evaluation.params.catIds = list(IDS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip(STATS, evaluation.stats, strict=False):
            assert result.get(f"{kind}_{name}", -1) == pytest.approx(value, abs=1e-12)
    evaluator_of(dataset).save(tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text()) == []
    with pytest.raises(InputError, match="cannot write"):
        evaluator.save(tmp_path / "missing" / "detections.json")


def test_the_given_annotations_stay_as_they_are(tmp_path):
    dataset = made_up()
    given = coco(dataset)
    evaluator = DetectionEvaluator(given, list(IMAGES), IDS, NAMES)
    evaluator.update(guesses(dataset), np.ones(5, bool))
    evaluator.result()
    assert given.dataset == dataset
    (tmp_path / "instances.json").write_text(json.dumps(dataset))
    other = DetectionEvaluator(tmp_path / "instances.json", list(IMAGES), IDS, NAMES)
    other.update(guesses(dataset), np.ones(5, bool))
    assert other.result() == evaluator.result()


def test_bad_annotations(tmp_path, monkeypatch):
    dataset = made_up()
    file = tmp_path / "instances.json"
    with pytest.raises(InputError, match="Cannot read the annotations"):
        DetectionEvaluator(file, [4], IDS, NAMES)
    for text in ("{", "[]", '{"annotations": [{}]}', '{"annotations": 1}'):
        file.write_text(text)
        with pytest.raises(InputError, match="no file of COCO's instances"):
            DetectionEvaluator(file, [4], IDS, NAMES)
    with pytest.raises(InputError, match="have no image 5"):
        DetectionEvaluator(coco(dataset), [4, 5], IDS, NAMES)
    with pytest.raises(InputError, match="have no category 1:"):
        DetectionEvaluator(coco(dataset), [4], (7, 1), NAMES[:2])
    first = next(entry for entry in dataset["annotations"] if entry["category_id"] in IDS)
    for key, bad in (("segmentation", []), ("area", None), ("bbox", [])):
        wrong = coco(dataset)
        wrong.anns[first["id"]][key] = bad
        with pytest.raises(InputError, match=f"An object of image {first['image_id']} has no '{key}'"):
            DetectionEvaluator(wrong, list(IMAGES), IDS, NAMES)

    original = builtins.__import__

    def without(name, *arguments):
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install 'msvmamba_jax\\[data\\]'"):
        DetectionEvaluator(file, [4], IDS, NAMES)


def test_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(0)
    masks = [np.zeros((4, 6), bool), np.ones((4, 6), bool), np.ones((1, 1), bool), np.eye(5, dtype=bool)]
    for density in (0.05, 0.5, 0.95):
        masks += [rng.random((int(h), int(w))) < density for h, w in rng.integers(1, 12, (40, 2))]
    masks += [disc(60, 80, box) for box in ((10, 10, 30, 40), (-20, -20, 100, 90), (70, 50, 90, 70), (20, -9, 40, 99))]
    for mask in masks:
        runs = run_lengths(mask)
        assert sum(runs) == mask.size
        assert min(runs[1:], default=1) > 0
        found = mask_utils.frPyObjects({"size": list(mask.shape), "counts": runs}, *mask.shape)
        assert found == mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert all(isinstance(run, int) for run in runs)
