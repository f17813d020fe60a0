"""Data sets in COCO's form: labels, boxes and masks of the right image, little memory, every error in one sentence."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import CATEGORIES, SIZES, annotation, content, make, pixels, run_lengths, write
from PIL import Image
from pycocotools import mask as tools
from pycocotools.coco import COCO

from msvmamba_jax.data import coco_annotations, encoded
from msvmamba_jax.data.coco import CocoRecords, load_coco
from msvmamba_jax.errors import InputError

LABELS = {1: 0, 7: 1, 90: 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "data set")


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_reported", set())


def with_annotations(*annotations: dict[str, Any]) -> dict[str, Any]:
    return {**content(), "annotations": list(annotations)}


def damage(path: Path) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def fails(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def reference(path: Path) -> COCO:
    data = COCO()
    data.dataset = json.loads(path.read_text())
    data.createIndex()
    return data


def assert_equals_the_file(records: CocoRecords, path: Path) -> None:
    """Every record against COCO's own tools."""
    data = reference(path)
    for index in range(len(records)):
        identifier = int(records.image_ids[index])
        record = records[index]
        expected = data.imgToAnns[identifier]
        np.testing.assert_array_equal(record["image"], pixels(identifier))
        corners = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in expected)]
        np.testing.assert_array_equal(record["boxes"], np.array(corners, np.float32).reshape(-1, 4))
        assert record["labels"].tolist() == [LABELS[one["category_id"]] for one in expected]
        assert record["crowd"].tolist() == [bool(one["iscrowd"]) for one in expected]
        assert len(record["masks"]) == len(expected)
        for mask, one in zip(record["masks"], expected, strict=True):
            np.testing.assert_array_equal(mask.pixels(), data.annToMask(one))
        assert records.counts[index] == (~record["crowd"]).sum()
        assert records.sizes[index].tolist() == list(SIZES[identifier])
        assert (record["index"], record["corrupt"]) == (index, 0)
        assert Path(record["name"]).name == f"{identifier:012}.png"


# Records


def test_records(root: Path) -> None:
    train, evaluation, names = load_coco(root)
    assert names == train.class_names == evaluation.class_names == ("person", "dog", "toothbrush")
    assert train.category_ids == evaluation.category_ids == (1, 7, 90)
    assert train.image_ids.tolist() == [3, 5, 8, 21]  # 34 has no object
    assert evaluation.image_ids.tolist() == [3, 5, 8, 21, 34]
    assert train.counts.tolist() == [3, 5, 2, 2]
    for records, split in ((train, "train2017"), (evaluation, "val2017")):
        assert records.annotations_file == str(root / "annotations" / f"instances_{split}.json")
        assert (records.sizes.dtype, records.counts.dtype) == (np.int32, np.int32)
        assert_equals_the_file(records, Path(records.annotations_file))
        assert str(root / split) in records[0]["name"]
    record = train[0]
    assert {key: record[key].dtype for key in ("image", "boxes", "labels", "crowd")} == {
        "image": np.uint8, "boxes": np.float32, "labels": np.int32, "crowd": bool
    }  # fmt: skip
    assert record.keys() == {"image", "boxes", "labels", "crowd", "masks", "corrupt", "index", "name"}
    assert record["crowd"].sum() == 1
    assert not len(evaluation[4]["boxes"])
    assert evaluation[4]["boxes"].shape == (0, 4)
    for records in (train, evaluation):
        for index in (len(records), -1):
            with pytest.raises(IndexError):
                records[index]


def test_the_layout_of_the_file_does_not_matter(root: Path) -> None:
    data = content()
    path = write(root, "train", json.dumps(dict(reversed(data.items())), indent=3).replace("\n", "\r\n\t"))
    assert_equals_the_file(load_coco(root)[0], path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(data, separators=(",", ":")).encode())
    train = load_coco(root)[0]
    path.write_bytes(path.read_bytes()[3:])
    write(root, "train", data)
    assert_equals_the_file(load_coco(root)[0], path)
    assert train.counts.tolist() == [3, 5, 2, 2]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_in_any_script(root: Path, ascii_only: bool) -> None:
    data = content()
    data["info"] = {"description": "日本"}
    data["categories"] = [
        {"id": 1, "name": "Hündchen"},
        {"id": 7, "name": "犬"},
        {"id": 90, "name": "\u00e9\U0001f600"},
    ]
    data["images"][0]["file_name"] = "straße/小.png"
    for split in ("train", "val"):
        folder = root / f"{split}2017"
        (folder / "straße").mkdir()
        (folder / "000000000005.png").rename(folder / "straße" / "小.png")
        write(root, split, json.dumps(data, ensure_ascii=ascii_only))
    train, _, names = load_coco(root)
    assert names == ("Hündchen", "犬", "\u00e9\U0001f600")
    record = train[1]
    np.testing.assert_array_equal(record["image"], pixels(5))
    assert record["name"] == str(root / "train2017" / "straße" / "小.png")
    assert len(record["masks"]) == 5


def test_other_places_and_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train2017").rename(root / "pictures")
    (root / "annotations" / "instances_train2017.json").rename(root / "all.json")
    monkeypatch.setenv("HOME", str(root.parent))
    train, _, _ = load_coco("~/data set", train_images="pictures", train_annotations="all.json")
    assert train.annotations_file == str(root / "all.json")
    np.testing.assert_array_equal(train[1]["image"], pixels(5))


def test_objects_that_are_not_trained_on(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By mmdetection's rules, which look at the box, the area and the polygons."""
    left_out = [
        annotation(1, 5, bbox=[5, 5, 0, 10]),
        annotation(2, 5, bbox=[5, 5, 10, 0.99]),
        annotation(3, 5, bbox=[5, 5, -3, 10]),
        annotation(4, 5, bbox=[60, 5, 10, 10]),  # beside the image
        annotation(5, 5, bbox=[5, -10, 10, 10]),
        annotation(6, 5, area=0),
        annotation(7, 5, segmentation=[[1, 1, 9, 9], [1, 2]]),
        annotation(8, 5, segmentation=[]),
        annotation(9, 5, ignore=1),
    ]
    kept = [
        annotation(11, 5, bbox=[5, 5, 1, 1]),
        annotation(12, 5, bbox=[59.5, -9.5, 20, 10]),
        annotation(13, 5, area=...),
        annotation(14, 5, iscrowd=...),
        annotation(15, 5, segmentation=[[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]]),
    ]
    other = annotation(20, 21)
    write(root, "train", with_annotations(*left_out, *kept, other))
    train, _, _ = load_coco(root)
    assert train.counts.tolist() == [5, 1]
    record = train[0]
    np.testing.assert_array_equal(record["boxes"][:2], [[5, 5, 6, 6], [59.5, -9.5, 79.5, 0.5]])  # not cut off yet
    expected = tools.decode(tools.merge(tools.frPyObjects([[1, 1, 9, 1, 9, 9]], *SIZES[5])))
    np.testing.assert_array_equal(record["masks"][4].pixels(), expected)
    name = train.annotations_file
    assert warnings(caplog) == [
        f"Not trained on, since {why}: {count} of the annotations in {name} (the first has the id {first})."
        for why, count, first in (
            ("smaller than a pixel, beyond the image or without an area", 6, 1),
            ("without a polygon of three points or more", 2, 7),
        )
    ]


def test_images_that_are_not_trained_on(root: Path) -> None:
    data = with_annotations(
        annotation(1, 3, iscrowd=1, segmentation=run_lengths(3)),  # nothing but a crowd
        annotation(2, 21, area=0),
        annotation(3, 5),
        annotation(4, 8),
    )
    for image, side in zip(data["images"], (31, 64, 50, 32, 70), strict=True):
        image["height"] = side
    write(root, "train", data)
    write(root, "val", data)
    train, evaluation, _ = load_coco(root)
    assert train.image_ids.tolist() == [8]  # 5 is 31 pixels high
    assert evaluation.image_ids.tolist() == [3, 5, 8, 21, 34]
    assert evaluation.counts.tolist() == [0, 1, 1, 0, 0]


def test_the_ground_truth_is_that_of_the_file(root: Path) -> None:
    path = root / "annotations" / "instances_val2017.json"
    data = reference(path)
    _, evaluation, _ = load_coco(root)
    found = COCO()
    found.dataset = evaluation.ground_truth()
    found.createIndex()
    assert sorted(found.getImgIds()) == sorted(SIZES)
    assert found.loadCats(found.getCatIds()) == sorted(CATEGORIES, key=lambda category: category["id"])
    assert sorted(found.anns) == list(range(1, 14))
    for identifier, size in SIZES.items():
        assert (found.imgs[identifier]["height"], found.imgs[identifier]["width"]) == size
        expected = data.imgToAnns[identifier]
        assert len(found.imgToAnns[identifier]) == len(expected)
        for one, other in zip(found.imgToAnns[identifier], expected, strict=True):
            assert {**one, "id": other["id"]} == other


def test_the_ground_truth_is_what_the_tools_can_read(root: Path) -> None:
    given = [
        annotation(0, 5, area=..., iscrowd=...),
        annotation(1, 5, bbox=[5, 5, 0, 0], area=0),
        annotation(2, 5, segmentation=[[1, 1, 9, 9], [1, 1, 9, 1, 9, 9]]),
        annotation(4, 3, iscrowd=True, segmentation=run_lengths(3)),
    ]
    write(root, "val", with_annotations(*given))
    found = COCO()
    found.dataset = load_coco(root)[1].ground_truth()
    found.createIndex()
    (crowd,) = found.imgToAnns[3]
    first, second, third = found.imgToAnns[5]
    assert [one["id"] for one in (crowd, first, second, third)] == [1, 2, 3, 4]
    assert (first["iscrowd"], crowd["iscrowd"]) == (0, 1)
    assert first["area"] == found.annToMask(first).sum() > 0
    assert second["area"] == 0
    assert third["segmentation"] == [[1, 1, 9, 1, 9, 9]]


# Memory


def test_memory_and_pickle(root: Path) -> None:
    """An annotation takes 16 bytes, however long its polygons are."""
    points = np.round(np.random.default_rng(0).uniform(0, 40, 400), 2).tolist()
    annotations = [annotation(number, 5, segmentation=[points]) for number in range(3000)]
    path = write(root, "train", with_annotations(*annotations))
    train = load_coco(root)[0]
    size = len(pickle.dumps(train))
    assert path.stat().st_size > 2000 * 3000
    assert size < 20 * 3000
    write(root, "train", with_annotations(*annotations[:1500]))
    assert (size - len(pickle.dumps(load_coco(root)[0]))) / 1500 <= 16
    again = pickle.loads(pickle.dumps(load_coco(root)[1]))
    assert_equals_the_file(again, Path(again.annotations_file))


def test_a_file_that_changes_meanwhile(root: Path) -> None:
    train = load_coco(root)[0]
    path = Path(train.annotations_file)
    status = path.stat()
    path.write_text(path.read_text().replace("toothbrush", "hair drier"))
    assert len(path.read_bytes()) == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert f"{path} has changed since it was read" in fails(lambda: train[0])
    path.unlink()
    assert f"Cannot read {path}: No such file" in fails(lambda: train[0])


# Damaged images


@pytest.mark.parametrize(("number", "identifier", "stand_in"), [(1, 5, 2), (2, 8, 3), (3, 21, 1)])
def test_a_damaged_training_image(
    root: Path, number: int, identifier: int, stand_in: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one takes its place, but not number 0, which stands."""
    path = damage(root / "train2017" / f"{identifier:012}.png")
    train = load_coco(root)[0]
    expected = train[stand_in]
    for _ in range(2):
        record = train[number]
        assert (record["corrupt"], record["index"], record["name"]) == (1, stand_in, expected["name"])
        for key in ("image", "boxes", "labels"):
            np.testing.assert_array_equal(record[key], expected[key])
        assert expected["corrupt"] == 0
    (message,) = warnings(caplog)
    assert str(path) in message


def test_what_stands_in_fits_the_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same canvas and no more slots; the order goes round."""
    data = content()
    data["annotations"] += [annotation(1000 + number, 8) for number in range(7)]  # 9 objects take 16 slots
    write(root, "train", data)
    for identifier in (5, 21):
        damage(root / "train2017" / f"{identifier:012}.png")
    train = load_coco(root)[0]
    assert train.counts.tolist() == [3, 5, 9, 2]
    assert "2 images in a row are damaged" in fails(lambda: train[1])
    Image.fromarray(pixels(5)).save(root / "train2017" / "000000000005.png")
    record = train[3]
    assert (record["index"], record["corrupt"]) == (1, 1)
    damage(root / "train2017" / "000000000003.png")  # the only one that stands
    assert "1 images in a row are damaged" in fails(lambda: train[0])


def test_a_damaged_evaluation_image(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = damage(root / "val2017" / "000000000005.png")
    evaluation = load_coco(root)[1]
    record = evaluation[1]
    assert (record["corrupt"], record["index"], record["name"]) == (1, 1, str(path))
    assert record["image"].shape == (40, 60, 3)
    assert not record["image"].any()
    assert len(record["boxes"]) == len(record["masks"]) == 5
    (message,) = warnings(caplog)
    assert str(path) in message


# Errors: the images


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_of_another_size(root: Path, split: str) -> None:
    path = root / f"{split}2017" / "000000000005.png"
    Image.new("RGB", (40, 60)).save(path)
    records = load_coco(root)[split == "val"]
    message = fails(lambda: records[1])
    assert str(path) in message
    assert "40 x 60 pixels" in message
    assert "says 60 x 40 of its id 5" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_image_files(root: Path, split: str) -> None:
    path = root / f"{split}2017" / "000000000005.png"
    path.unlink()
    message = fails(lambda: load_coco(root))
    assert message.startswith(f"The image {path} is listed in {root / 'annotations'}")
    (path.parent / "000000000008.png").unlink()
    assert "000000000005.png (and 1 more) is listed" in fails(lambda: load_coco(root))
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert f"Cannot list the folder {path.parent}: No such file" in fails(lambda: load_coco(root))


def test_images_that_are_not_needed_may_be_missing(root: Path) -> None:
    (root / "train2017" / "000000000034.png").unlink()
    assert len(load_coco(root)[0]) == 4


def test_an_image_that_vanishes(root: Path) -> None:
    train = load_coco(root)[0]
    (root / "train2017" / "000000000005.png").unlink()
    assert "000000000005.png: No such file" in fails(lambda: train[1])


# Errors: the JSON files


def test_every_cut_is_noticed(root: Path) -> None:
    text = json.dumps(content())
    for end in sorted({*range(0, len(text), 37), *range(len(text) - 40, len(text))}):
        path = write(root, "val", text[:end])
        assert fails(lambda: load_coco(root)).startswith(f"The file {path} is cut off or no JSON in COCO's form (byte ")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{]", '{"images": {}}', '{"images": [1, ]}', '{"images" []}', '{3: 4}', '{"images": []} x', "\x00",
     '{"info": ' + "[" * 200_000, '{"images": [{"file_name": "a\x01"}]}'],
)  # fmt: skip
def test_what_is_no_json(root: Path, text: str) -> None:
    path = write(root, "val", text)
    message = fails(lambda: load_coco(root))
    assert str(path) in message
    assert "no JSON in COCO's form" in message or "which is no object" in message


def test_text_that_is_no_utf_8(root: Path) -> None:
    path = write(root, "val", "")
    path.write_bytes(json.dumps(content()).encode().replace(b"toothbrush", b"B\xfcrste"))
    assert "is cut off or no JSON" in fails(lambda: load_coco(root))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_lists_that_are_missing_or_there_twice(root: Path, key: str) -> None:
    data = content()
    del data[key]
    write(root, "val", data)
    assert f"has no list '{key}'" in fails(lambda: load_coco(root))
    write(root, "val", f'{{"{key}": [], {json.dumps(content())[1:]}')
    assert f"has two lists '{key}'" in fails(lambda: load_coco(root))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split(root: Path, split: str) -> None:
    path = write(root, split, {**content(), "images": [], "annotations": []})
    message = fails(lambda: load_coco(root))
    assert message.startswith("There is no image")
    assert str(path) in message
    if split == "train":
        write(root, split, with_annotations())
        assert "no image with an object" in fails(lambda: load_coco(root))


def change(key: str, place: int, **values: Any) -> dict[str, Any]:
    data = content()
    entry = data[key][place] = dict(data[key][place], **values)
    for name in [name for name, value in entry.items() if value is ...]:
        del entry[name]
    return data


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (change("images", 1, id=5), "Two images in {} have the id 5"),
        (change("images", 1, id=...), "The image {{'file_name': '000000000003.png', 'height': 64, 'width': 48}} in {}"),
        (change("images", 1, id="3"), "has no whole number for an id"),
        (change("images", 1, file_name=...), "Image 3 in {} has no file_name"),
        (change("images", 1, height=...), "Image 3 in {} has no height and width in whole pixels, but None and 48"),
        (change("images", 1, width=0), "Image 3 in {} has no height and width in whole pixels, but 64 and 0"),
        (change("images", 1, width=2**40), "Image 3 in {} has no height"),
        (change("categories", 0, id=1), "Two categories in {} have the id 1"),
        (change("categories", 0, name="person"), "Two categories in {} are called 'person'"),
        (change("categories", 0, name=" "), "Category 7 in {} has no name"),
        ({**content(), "categories": []}, "The file {} has no category"),
        ({**content(), "images": [None]}, "The file {} lists None as image"),
        (change("annotations", 1, id=100), "Two annotations in {} have the id 100"),
        (change("annotations", 1, id=2**70), "has no whole number for an id"),
        (change("annotations", 1, image_id=4), "Annotation 107 in {} has the image_id 4, which is not among its im"),
        (change("annotations", 1, image_id=None), "Annotation 107 in {} has no whole number for its image_id"),
        (change("annotations", 1, category_id=2), "Annotation 107 in {} has the category_id 2, which is not among its"),
        (change("annotations", 1, category_id=True), "Annotation 107 in {} has no whole number for its category_id"),
        (change("annotations", 1, bbox=[1, 2, 3]), "Annotation 107 in {} has no bbox of four numbers, but [1, 2, 3]"),
        (change("annotations", 1, bbox=[1, 2, 3, "4"]), "Annotation 107 in {} has no bbox of four numbers"),
        (change("annotations", 1, bbox=[1, 2, 3, float("nan")]), "Annotation 107 in {} has no bbox of four numbers"),
        (change("annotations", 1, bbox=...), "Annotation 107 in {} has no bbox of four numbers, but None"),
        (change("annotations", 1, area=float("inf")), "Annotation 107 in {} has an area that is no number"),
        (change("annotations", 1, area=10**400), "Annotation 107 in {} has an area that is no number"),
        (change("annotations", 1, iscrowd=2), "Annotation 107 in {} has an iscrowd that is neither 0 nor 1, but 2"),
        (change("annotations", 1, segmentation=...), "Annotation 107 in {} has no segmentation"),
        (change("annotations", 1, segmentation=None), "Annotation 107 in {} has no segmentation"),
        (change("annotations", 1, segmentation={"counts": "x"}), "Annotation 107 in {} has run lengths without 'size'"),
        (change("annotations", 1, segmentation=run_lengths(3)),
         "Annotation 107 in {} has a mask of 48 x 64 pixels, but its image has 50 x 50"),
    ],
)  # fmt: skip
def test_what_does_not_fit(root: Path, split: str, data: dict[str, Any], expected: str) -> None:
    path = write(root, split, data)
    assert expected.format(path) in fails(lambda: load_coco(root))


def test_masks_that_cannot_be_drawn(root: Path) -> None:
    bad = {"size": list(SIZES[21]), "counts": [2499]}
    for segmentation, expected in (
        (bad, "has run lengths of 2499 pixels in all, but its image has 2500"),
        ([[1, 2, 3, 4, 5, "x"]], "has a polygon whose points are no pixels"),
    ):
        for split in ("train", "val"):
            path = write(root, split, change("annotations", 1, segmentation=segmentation))
        train, evaluation, _ = load_coco(root)
        for call in (lambda train=train: train[3], evaluation.ground_truth):
            assert f"Annotation 107 in {path}"[:20] in (message := fails(call))
            assert expected in message


def test_polygons_that_the_evaluation_cannot_draw(root: Path) -> None:
    for segmentation in ([], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6]):
        path = write(root, "val", change("annotations", 1, segmentation=segmentation))
        assert fails(lambda: load_coco(root)).startswith(f"Annotation 107 in {path} has no polygon of three points")


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        (CATEGORIES[:2], "The category 'toothbrush' with the id 90 is in {train}, but not in {val}"),
        ([*CATEGORIES, {"id": 8, "name": "cat"}], "The category 'cat' with the id 8 is in {val}, but not in {train}"),
        ([{"id": 7, "name": "wolf"}, *CATEGORIES[1:]], "The category 'dog' with the id 7 is in {train}"),
    ],
)
def test_splits_with_different_categories(root: Path, categories: list[Any], expected: str) -> None:
    path = write(root, "val", {**content(), "categories": categories, "annotations": []})
    train = root / "annotations" / "instances_train2017.json"
    assert expected.format(train=train, val=path) in fails(lambda: load_coco(root))


@pytest.mark.parametrize("value", [None, "", 3])
def test_no_root(value: Any) -> None:
    assert "--config.data.root" in fails(lambda: load_coco(value))


def test_nothing_there(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'nowhere'}" in fails(lambda: load_coco(tmp_path / "nowhere"))
    path = tmp_path / "annotations" / "instances_val2017.json"
    assert f"Cannot read {path}: No such file" in fails(lambda: load_coco(tmp_path))


def test_long_values_are_cut_in_messages() -> None:
    table = coco_annotations.Annotations("x.json")
    message = fails(lambda: table.add(annotation(1, 5, bbox=list(range(1000)))))
    assert len(message) < 150
