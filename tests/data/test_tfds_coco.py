"""COCO's instances are prepared for TensorFlow Datasets and read back with their masks, without TensorFlow."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import CATEGORIES, annotation, content, make, write

from msvmamba_jax.data import tfds
from msvmamba_jax.data.coco import CocoRecords, load_coco
from msvmamba_jax.errors import InputError

SCRIPT = "prepare_coco"

pytestmark = pytest.mark.usefixtures("prepare", "nothing_reported")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each split is damaged, and the last one of training has no object."""
    root = make(tmp_path_factory.mktemp("source") / "coco")
    for split in ("train", "val"):
        damaged = root / f"{split}2017" / "000000000005.png"
        damaged.write_bytes(damaged.read_bytes()[:-200])
    return root


def load(data_dir: Path, **options: Any) -> tuple[CocoRecords, CocoRecords, tuple[str, ...]]:
    return tfds.load_prepared_coco(data_dir=str(data_dir), **options)


def assert_equals_the_folder(data_dir: Path, folder: Path) -> None:
    *parts, names = load(data_dir)
    *expected, expected_names = load_coco(folder)
    assert names == expected_names
    for part, other in zip(parts, expected, strict=True):
        assert part.category_ids == other.category_ids
        assert part.annotations_file is None
        for name in ("image_ids", "sizes", "counts"):
            np.testing.assert_array_equal(getattr(part, name), getattr(other, name))
            assert getattr(part, name).dtype == getattr(other, name).dtype
        for index in range(len(other)):
            record, whole = part[index], other[index]
            for key in ("image", "boxes", "labels", "crowd", "corrupt", "index"):
                np.testing.assert_array_equal(record[key], whole[key])
            for mask, original in zip(record["masks"], whole["masks"], strict=True):
                np.testing.assert_array_equal(mask.pixels(), original.pixels())
            assert record["name"] == Path(whole["name"]).name
        assert part.ground_truth() == other.ground_truth()


def test_the_folder_comes_back(prepared: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_equals_the_folder(prepared, folder)
    train, evaluation, _ = load(prepared)
    assert (len(train), len(evaluation)) == (4, 5)
    assert sum(train[index]["corrupt"] for index in range(4)) == 1
    assert sum(evaluation[index]["corrupt"] for index in range(5)) == 1
    assert "000000000005.png" in caplog.text
    assert "tensorflow" not in sys.modules


def test_an_own_data_set_in_other_places(prepare: Callable[..., None], tmp_path: Path) -> None:
    root = make(tmp_path / "own")
    write(root, "train", {**content(), "annotations": [annotation(1, 5), annotation(2, 34, ignore=1)]})
    (root / "train2017").rename(root / "pictures")
    (root / "annotations" / "instances_train2017.json").rename(root / "all.json")
    places = ("--train_images", "pictures", "--train_annotations=all.json")
    prepare(root, tmp_path / "prepared", *places)
    train, evaluation, _ = load(tmp_path / "prepared")
    assert train.image_ids.tolist() == [5]
    assert len(evaluation) == 5
    swapped, _, _ = load(tmp_path / "prepared", train_split="validation", evaluation_split="train")
    assert swapped.image_ids.tolist() == [3, 5, 8, 21]


def test_pickle(prepared: Path) -> None:
    train, _, _ = load(prepared)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(train))[0]["image"], train[0]["image"])


def test_many_records_stay_in_order(folder: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    """In several files, as COCO's are; the numbers of the images are no order of theirs."""
    import tensorflow_datasets

    from msvmamba_jax.data.tfds_coco import CocoInstances

    builder = CocoInstances(data_dir=tmp_path, file_format="array_record")
    config = tensorflow_datasets.download.DownloadConfig(manual_dir=folder, num_shards=3)
    builder.download_and_prepare(download_config=config)
    assert len(list(Path(builder.data_dir).glob("*train*"))) == 3
    assert_equals_the_folder(tmp_path, folder)


def test_metadata_that_do_not_fit(folder: Path, prepare: Callable[..., None], tmp_path: Path) -> None:
    prepare(folder, tmp_path)
    path = tmp_path / "coco_instances" / "1.0.0" / "metadata.json"
    known = json.loads(path.read_text())
    known["splits"]["train"]["image_ids"].reverse()
    path.write_text(json.dumps(known))
    with pytest.raises(InputError, match="Record 0 holds image 3, not 34 as the metadata say"):
        load(tmp_path)[0][0]
    path.write_text("{}")
    with pytest.raises(InputError, match="holds no masks, or is not as this package prepares it: run 'python scripts/"):
        load(tmp_path)


def test_what_is_not_there(stopped: Callable[[Path], str], folder: Path, tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'nowhere'}" in stopped(tmp_path / "nowhere")
    assert f"Cannot read {tmp_path / 'annotations' / 'instances_val2017.json'}" in stopped(tmp_path)
    root = make(tmp_path / "copy")
    (root / "train2017" / "000000000034.png").unlink()
    assert "000000000034.png is listed in" in stopped(root)
    write(root, "val", {**content(), "categories": CATEGORIES[:2], "annotations": []})
    assert "The category 'toothbrush' with the id 90 is in" in stopped(root)
    write(root, "val", {**content(), "images": [], "annotations": []})
    assert "There is no image in" in stopped(root)


def test_what_cannot_be_read(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"not prepared in {tmp_path}.*: run 'python scripts/prepare_coco.py"):
        load(tmp_path)
    for split in ("val", "train[:50%]"):
        with pytest.raises(InputError, match=r"no split .* \(slices are none\); it has 'train', 'validation'"):
            load(prepared, train_split=split)


def test_tensorflow_datasets_is_not_installed(
    folder: Path, prepare: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "msvmamba_jax.data.tfds_coco", raising=False)
    with pytest.raises(SystemExit, match=r"pip install 'msvmamba_jax\[data,tfds\]'"):
        prepare(folder, tmp_path / "prepared")
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data,tfds\]'"):
        load(tmp_path)
