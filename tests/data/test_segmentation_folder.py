"""Folders of images and label maps: labels as ADE20K numbers them, every error in one sentence, damaged files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data import encoded
from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.segmentation import SegmentationRecords, load_segmentation_folder
from msvmamba_jax.errors import InputError

COUNT = {"training": 5, "validation": 3}
NAMES = ("sky", "sea", "sand")


def pixels(split: str, number: int) -> np.ndarray:
    return np.random.default_rng([len(split), number]).integers(0, 256, (20 + number, 30, 3), np.uint8)


def values(split: str, number: int, top: int) -> np.ndarray:
    """Stored labels, every one of 0..top among them, and 255."""
    labels = np.random.default_rng([len(split), number]).integers(0, top + 1, (20 + number, 30), np.uint8)
    labels[0] = np.arange(30) % (top + 1)
    labels[1] = 255
    return labels


def make(root: Path, top: int = 3) -> Path:
    for split, count in COUNT.items():
        for number in range(count):
            image, labels = (root / kind / split / f"ADE_{number:08}" for kind in ("images", "annotations"))
            for path in (image, labels):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(split, number)).save(image.with_suffix(".png"))  # lossless, to compare
            Image.fromarray(values(split, number, top)).save(labels.with_suffix(".png"))
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make(tmp_path / "data set")


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_reported", set())


def load(root: Any, **options: Any) -> tuple[SegmentationRecords, SegmentationRecords, tuple[str, ...]]:
    return load_segmentation_folder(root, **{"class_names": NAMES, "reduce_zero_label": True, **options})


def fails(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def damage(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


# Records


def test_records(root: Path) -> None:
    train, evaluation, names = load(root)
    assert names == NAMES
    assert (len(train), len(evaluation)) == (5, 3)
    for split, part in (("training", train), ("validation", evaluation)):
        for number in range(len(part)):
            record = part[number]
            assert record.keys() == {"image", "labels", "corrupt", "name"}
            np.testing.assert_array_equal(record["image"], pixels(split, number))
            assert record["name"] == str(root / "images" / split / f"ADE_{number:08}.png")
            assert record["corrupt"] == 0
            assert record["labels"].dtype == np.uint8
            assert part.image_size(number) == (20 + number, 30)
    with pytest.raises(IndexError):
        train[5]


def test_labels_with_and_without_a_zero_for_no_class(root: Path) -> None:
    stored = values("training", 2, 3)
    reduced = load(root)[0][2]["labels"]
    np.testing.assert_array_equal(reduced, np.select([stored == 0, stored == 255], [255, 255], stored.astype(int) - 1))
    assert set(np.unique(reduced)) == {0, 1, 2, 255}
    whole = load(root, class_names=("other", *NAMES), reduce_zero_label=False)[0][2]["labels"]
    np.testing.assert_array_equal(whole, stored)


def test_ade20k_needs_no_options(tmp_path: Path) -> None:
    train, _, names = load_segmentation_folder(make(tmp_path, top=150))
    assert names == ade20k_class_names()
    assert {train[0]["labels"].min(), train[0]["labels"].max()} == {0, 255}
    stored = values("training", 4, 150)
    assert (train[4]["labels"][stored == 150] == 149).all()
    # For other classes 0 is the first one, unless it is said.
    other = load_segmentation_folder(tmp_path, class_names=[f"class {i}" for i in range(151)])[0]
    np.testing.assert_array_equal(other[4]["labels"], stored)


def test_class_names_from_a_file(root: Path) -> None:
    (root / "classes.txt").write_bytes("sky\r\nsea\r\n côte \r\n\r\n".encode())
    train, _, names = load_segmentation_folder(root, reduce_zero_label=True)
    assert names == ("sky", "sea", "côte")
    assert train.num_classes == 3
    assert load(root)[2] == NAMES  # what is given counts


def test_label_maps_with_a_colour_table_or_two_bytes(root: Path) -> None:
    stored = values("validation", 1, 3)
    path = root / "annotations" / "validation" / "ADE_00000001.png"
    expected = load(root)[1][1]["labels"]
    table = Image.fromarray(stored).convert("L")
    table.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    table.save(path)
    with Image.open(path) as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(load(root)[1][1]["labels"], expected)
    Image.fromarray(stored.astype(np.uint16)).save(path)
    np.testing.assert_array_equal(load(root)[1][1]["labels"], expected)
    Image.fromarray(stored.astype(np.uint16) * 256).save(path)
    assert "holds the value" in fails(lambda: load(root)[1][1])


def test_folders_below_the_splits_and_other_files(root: Path) -> None:
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        folder = root / kind / "validation" / "indoor"
        folder.mkdir()
        Image.new(mode, (5, 4)).save(folder / "kitchen.1.png")
        (root / kind / "validation" / "notes.txt").write_text("x")
        (root / kind / "validation" / "._ADE_00000000.jpg").write_text("x")
    Image.new("L", (5, 4)).save(root / "annotations" / "validation" / "without_image.png")
    _, evaluation, _ = load(root)
    assert len(evaluation) == 4
    assert evaluation[3]["name"].endswith(os.path.join("indoor", "kitchen.1.png"))


def test_sizes_come_from_the_head_alone(root: Path) -> None:
    path = root / "images" / "validation" / "ADE_00000002.png"
    path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(pixels("validation", 2)).transpose(Image.Transpose.ROTATE_90).save(
        path.with_suffix(".jpg"), exif=exif
    )
    evaluation = load(root)[1]
    assert evaluation.image_size(2) == (22, 30) == evaluation[2]["image"].shape[:2]
    content = path.with_suffix(".jpg").read_bytes()
    path.with_suffix(".jpg").write_bytes(content[:700])
    assert evaluation.image_size(2) == (22, 30)


def test_home_and_pickle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    train = pickle.loads(pickle.dumps(load("~/data set")[0]))
    np.testing.assert_array_equal(train[1]["image"], pixels("training", 1))


# Damaged files


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_the_next_record_takes_the_place_of_a_damaged_one(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [load(root)[0][number] for number in range(5)]
    paths = [damage(root / kind / "training" / f"ADE_0000000{number}.png") for number in (1, 4)]
    train = load(root)[0]
    for number, stand_in in ((1, 2), (4, 0), (2, 2), (1, 2)):
        record = train[number]
        for key in ("image", "labels"):
            np.testing.assert_array_equal(record[key], expected[stand_in][key])
        assert record["name"] == expected[stand_in]["name"]
        assert record["corrupt"] == (number != stand_in)
    for path, message in zip(paths, warnings(caplog), strict=True):
        assert str(path) in message


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_damaged_record_for_evaluation_is_marked_and_keeps_its_size(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = damage(root / kind / "validation" / "ADE_00000001.png")
    evaluation = load(root)[1]
    for _ in range(2):
        record = evaluation[1]
        assert record["corrupt"] == 1
        assert record["image"].shape == (21, 30, 3)
        assert not record["image"].any()
        assert record["labels"].shape == (21, 30)
        assert (record["labels"] == 255).all()
        assert record["name"].endswith("ADE_00000001.png")
    (message,) = warnings(caplog)
    assert str(path) in message


def test_a_damaged_head_has_no_size(root: Path) -> None:
    (root / "images" / "validation" / "ADE_00000001.png").write_bytes(b"")
    evaluation = load(root)[1]
    assert evaluation.image_size(1) == (32, 32) == evaluation[1]["labels"].shape


def test_nothing_but_damaged_images(root: Path) -> None:
    for path in root.glob("images/training/*"):
        path.write_bytes(b"x")
    assert "5 images in a row are damaged" in fails(lambda: load(root)[0][2])


# Errors


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("top", "reduce", "allowed"), [(4, True, "0 to 3"), (3, False, "0 to 2"), (254, True, "0 to 3")]
)
def test_a_label_beyond_the_classes(tmp_path: Path, part: int, top: int, reduce: bool, allowed: bool) -> None:
    records = load(make(tmp_path, top=top), reduce_zero_label=reduce)[part]
    message = fails(lambda: records[2])
    assert os.path.join("annotations", ("training", "validation")[part], "ADE_00000002.png") in message
    assert f"{allowed} and 255" in message
    assert ("reduce_zero_label" in message) == (not reduce)


def test_sizes_that_differ(root: Path) -> None:
    path = root / "annotations" / "training" / "ADE_00000003.png"
    Image.new("L", (30, 20)).save(path)
    train = load(root)[0]
    message = fails(lambda: train[3])
    assert str(path) in message
    assert "30 x 20 pixels" in message
    assert "30 x 23:" in message


def test_a_label_map_with_colours(root: Path) -> None:
    path = root / "annotations" / "training" / "ADE_00000003.png"
    Image.new("RGB", (30, 23)).save(path)
    train = load(root)[0]
    assert f"{path} has colours (RGB)" in fails(lambda: train[3])


def test_an_image_without_labels(root: Path) -> None:
    path = root / "annotations" / "training" / "ADE_00000003.png"
    path.unlink()
    message = fails(lambda: load(root))
    assert str(root / "images" / "training" / "ADE_00000003.png") in message
    assert f"add {path}" in message
    (path.parent / "ADE_00000001.png").unlink()
    assert "ADE_00000001.png (and 1 more) has no label map" in fails(lambda: load(root))


def test_a_file_that_cannot_be_opened(root: Path) -> None:
    train = load(root)[0]
    for kind in ("annotations", "images"):
        path = root / kind / "training" / "ADE_00000003.png"
        path.unlink()
        assert f"{path}: No such file" in fails(lambda: train[3])
    assert "ADE_00000003.png" in fails(lambda: train.image_size(3))


@pytest.mark.parametrize("split", COUNT)
def test_an_empty_split(root: Path, split: str) -> None:
    for path in (root / "images" / split).iterdir():
        path.unlink()
    assert f"The folder {root / 'images' / split} holds no image" in fails(lambda: load(root))
    shutil.rmtree(root / "annotations" / split)
    assert f"There is no folder {root / 'annotations' / split}" in fails(lambda: load(root))


@pytest.mark.parametrize("value", [None, "", 3])
def test_no_root(value: Any) -> None:
    assert "--config.data.root" in fails(lambda: load(value))


def test_no_such_folder(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'nowhere'}" in fails(lambda: load(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("names", "reduce", "message"),
    [
        ([], True, "there are 0"),
        (["a", "", "c"], True, "Class 1 has no name in class_names"),
        (["a", "b", "a"], True, "Two classes are called 'a'"),
        ([f"class {i}" for i in range(255)], True, "1 to 254 classes"),
        ([f"class {i}" for i in range(256)], False, "1 to 255 classes"),
    ],
)
def test_impossible_class_names(root: Path, names: list[str], reduce: bool, message: str) -> None:
    assert message in fails(lambda: load(root, class_names=names, reduce_zero_label=reduce))


def test_an_unreadable_file_of_class_names(root: Path) -> None:
    (root / "classes.txt").write_bytes(b"caf\xe9\n")
    assert str(root / "classes.txt") in fails(lambda: load_segmentation_folder(root))
    (root / "classes.txt").write_text("sky\n\nsea\n")
    assert f"Class 1 has no name in {root / 'classes.txt'}" in fails(lambda: load_segmentation_folder(root))
