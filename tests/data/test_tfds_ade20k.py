"""ADE20K is prepared for TensorFlow Datasets from a folder or a zip file, and read back, without TensorFlow."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data import tfds
from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.segmentation import SegmentationRecords, load_segmentation_folder
from msvmamba_jax.errors import InputError

SCRIPT = "prepare_ade20k"
COUNT = {"training": 6, "validation": 3}

pytestmark = pytest.mark.usefixtures("prepare", "nothing_reported")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ADEChallengeData2016` with few and small files; the first of each split is damaged."""
    root = tmp_path_factory.mktemp("source") / "ADEChallengeData2016"
    for split, count in COUNT.items():
        for number in range(count):
            rng = np.random.default_rng([count, number])
            size = (20 + number, 30)
            image, labels = (root / kind / split / f"ADE_{number:08}" for kind in ("images", "annotations"))
            for path in (image, labels):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(image.with_suffix(".jpg"))
            Image.fromarray(rng.integers(0, 151, size, np.uint8)).save(labels.with_suffix(".png"))
        damaged = root / "images" / split / "ADE_00000000.jpg"
        damaged.write_bytes(damaged.read_bytes()[:-200])
    (root / "objectInfo150.txt").write_text("x")
    return root


def load(data_dir: Path, **options: Any) -> tuple[SegmentationRecords, SegmentationRecords, tuple[str, ...]]:
    return tfds.load_prepared_segmentation(data_dir=str(data_dir), **options)


def assert_equals_the_folder(data_dir: Path, folder: Path) -> None:
    *parts, names = load(data_dir)
    *expected, expected_names = load_segmentation_folder(folder)
    assert names == expected_names == ade20k_class_names()
    for part, other in zip(parts, expected, strict=True):
        assert len(part) == len(other)
        by_name = {Path(other[index]["name"]).name: other[index] for index in range(len(other))}
        for index in range(len(part)):
            record = part[index]
            if part.training and record["corrupt"]:
                continue  # another one than in the folder, whose order differs
            for key in ("image", "labels", "corrupt"):
                np.testing.assert_array_equal(record[key], by_name[record["name"]][key])
            assert part.image_size(index) == record["image"].shape[:2]


def test_the_folder_comes_back(prepared: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_equals_the_folder(prepared, folder)
    train, evaluation, _ = load(prepared)
    assert sum(train[index]["corrupt"] for index in range(6)) == 1
    assert sum(evaluation[index]["corrupt"] for index in range(3)) == 1
    assert "ADE_00000000.jpg" in caplog.text
    assert "tensorflow" not in sys.modules


def test_the_zip_file(folder: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    archive = tmp_path / "ADEChallengeData2016.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, Path(folder.name) / path.relative_to(folder))
    prepare(archive, tmp_path / "prepared")
    assert_equals_the_folder(tmp_path / "prepared", folder)


def test_pickle_and_slices(prepared: Path) -> None:
    train, evaluation, _ = load(prepared, train_split="train[:50%]", evaluation_split="train[50%:]")
    assert (len(train), len(evaluation)) == (3, 3)
    assert (train.training, evaluation.training) == (True, False)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(train))[1]["image"], train[1]["image"])


def test_features_name_the_labels(prepared: Path) -> None:
    import tensorflow_datasets

    features = tensorflow_datasets.builder_from_directory(prepared / "ade20k_segmentation" / "1.0.0").info.features
    assert features["labels"].names == ["other", *ade20k_class_names()]


def test_what_is_not_there(stopped: Callable[[Path], str], folder: Path, tmp_path: Path) -> None:
    assert f"There is neither {tmp_path / 'ADEChallengeData2016'} nor" in stopped(tmp_path)
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"x")
    assert "is damaged" in stopped(tmp_path / "ADEChallengeData2016.zip")
    copy = tmp_path / "copy" / "ADEChallengeData2016"
    shutil.copytree(folder, copy)
    (copy / "annotations" / "validation" / "ADE_00000001.png").unlink()
    assert f"{copy / 'images' / 'validation' / 'ADE_00000001.jpg'} has no label map" in stopped(copy)
    shutil.rmtree(copy / "images" / "training")
    assert f"There is no image in {copy / 'images' / 'training'}" in stopped(copy)


def test_what_cannot_be_read(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"not prepared in {tmp_path}.*: run 'python scripts/prepare_ade20k.py"):
        load(tmp_path)
    with pytest.raises(InputError, match="no split 'val'; it has 'train', 'validation'"):
        load(prepared, evaluation_split="val")


def test_tensorflow_datasets_is_not_installed(
    folder: Path, prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "msvmamba_jax.data.tfds_ade20k", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'msvmamba_jax\[data,tfds\]'"):
        prepare(folder, tmp_path / "prepared")
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data,tfds\]'"):
        load(tmp_path)
