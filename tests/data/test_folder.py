"""Image folders: classes as torchvision numbers them, quirky files, every error in one sentence, damaged images."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data import datasets, encoded, pipeline
from msvmamba_jax.data.augment import Augmentation
from msvmamba_jax.data.encoded import DecodedImages
from msvmamba_jax.data.folder import ImageFolder, load_folder
from msvmamba_jax.data.pipeline import Batch, Dataset
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError

CLASSES = ("Zebra", "apple", "égg")  # sorted by code point: capitals first, accents last
PER_CLASS = {"train": 5, "val": 2}


def save(path: Path, seed: int, mode: str = "RGB", **options: Any) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed % 5, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((48, 36)).convert(mode).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data set"
    for split, count in PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            for number in range(count):
                save(root / split / name / f"{number}.jpg", 100 * label + number)
    return root


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_reported", set())


def dataset(root: Path, **options: Any) -> Dataset:
    return datasets.load_dataset({"source": "folder", "root": str(root), "size": 16, "resize": 18, **options})


def take(source: Dataset, count: int, **options: Any) -> list[Batch]:
    options = {"batch_size": 4, "seed": 3, "start_step": 0, **options}
    with contextlib.closing(pipeline.train_batches(source, **options)) as batches:
        return list(itertools.islice(batches, count))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def truncate(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def warnings(caplog: pytest.LogCaptureFixture, root: Path) -> list[str]:
    """Those about this test's files: threads that another test closed may still end a batch."""
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and str(root) in r.getMessage()]


def fails(root: Any) -> str:
    with pytest.raises(InputError) as error:
        load_folder(root)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def paths(part: ImageFolder) -> list[str]:
    return [part.path(index) for index in range(len(part))]


# Listing


def test_classes_and_files_are_sorted(root: Path) -> None:
    train, evaluation, names = load_folder(root)
    assert names == CLASSES
    assert paths(train) == [str(root / "train" / name / f"{n}.jpg") for name in CLASSES for n in range(5)]
    assert train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert evaluation.labels.tolist() == [0, 0, 1, 1, 2, 2]
    content, label, path = evaluation.encoded(3)
    assert content == Path(path).read_bytes()
    assert (label, path) == (1, str(root / "val" / "apple" / "1.jpg"))


def test_what_is_an_image(root: Path) -> None:
    folder = root / "val" / "apple"
    for name in ("notes.txt", ".DS_Store", "._0.jpg", "Thumbs.db", "LICENSE"):
        (folder / name).write_bytes(b"x")
    save(folder / "A.JPEG", 1)
    save(folder / "below" / "0.png", 2)
    (root / "val" / ".ipynb_checkpoints").mkdir()
    (root / "val" / "readme.txt").write_text("x")
    (folder / "loop").symlink_to(folder)
    _, evaluation, names = load_folder(root)
    assert names == CLASSES
    found = [os.path.relpath(path, folder) for path in paths(evaluation) if path.startswith(str(folder))]
    assert found == ["0.jpg", "1.jpg", "A.JPEG", "below/0.png"]


def test_names_that_are_not_utf8(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        save(root / "val" / "apple" / name, 1)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert str(root / "val" / "apple" / name) in paths(load_folder(root)[1])


def test_linked_folders(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "train" / "apple", tmp_path / "elsewhere")
    (root / "train" / "apple").symlink_to(tmp_path / "elsewhere")
    assert load_folder(root)[0].labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_home_and_pickle(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    train, _, _ = load_folder("~/data set")
    assert paths(pickle.loads(pickle.dumps(train))) == paths(train)
    assert paths(train)[0] == str(root / "train" / "Zebra" / "0.jpg")


def test_many_files_are_listed_fast_and_packed(root: Path) -> None:
    folder = root / "train" / "apple"
    for number in range(5000):
        (folder / f"n01440764_{number}.JPEG").touch()
    train, _, _ = load_folder(root)
    assert len(train) == 5015
    assert len(pickle.dumps(train)) < 5015 * 50


# Errors


@pytest.mark.parametrize("value", [None, "", 3])
def test_no_root(value: Any) -> None:
    assert "--config.data.root" in fails(value)


def test_no_such_folder(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'nowhere'}" in fails(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "other")
    assert f"{root} has no folder {split}" in fails(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_split(root: Path, split: str) -> None:
    shutil.rmtree(root / split)
    (root / split).mkdir()
    assert f"{root / split} is empty" in fails(root)


def test_images_outside_of_classes(root: Path) -> None:
    shutil.rmtree(root / "val")
    save(root / "val" / "ILSVRC2012_val_00000001.JPEG", 1)
    message = fails(root)
    assert str(root / "val") in message
    assert "not sorted into classes" in message


def test_classes_differ(root: Path) -> None:
    (root / "val" / "apple").rename(root / "val" / "pear")
    assert f"only {root / 'train'} has apple; only {root / 'val'} has pear;" in fails(root)
    for number in range(7):
        save(root / "train" / f"more{number}" / "0.jpg", 1)
    message = fails(root)
    assert f"only {root / 'train'} has apple, more0, more1, more2, more3 and 3 more" in message
    assert f"only {root / 'val'} has pear;" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_class_without_image(root: Path, split: str) -> None:
    for path in (root / split / "apple").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert f"{root / split / 'apple'} holds no image" in fails(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roots": 1}, "'roots'"),
        ({"size": 20}, "at least size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"randaugment": "m9"}, "RandAugment"),
        ({"scale": (1, 2)}, "scale"),
        ({"flip": 2}, "flip"),
    ],
)
def test_impossible_options(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataset(root, **options)


def test_a_file_that_cannot_be_opened_ends_the_run(root: Path) -> None:
    source = dataset(root)
    (root / "train" / "apple" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"apple/2\.jpg"):
        take(source, 4)


# Batches


def test_options_reach_the_transforms(root: Path) -> None:
    source = dataset(root, interpolation="bilinear", randaugment="", scale=(0.5, 1.0), ratio=(1.0, 1.0), flip=0.0)
    assert source.preprocessing == Preprocessing(size=16, resize=18, interpolation="bilinear")
    expected = Augmentation(16, "bilinear", None, (0.5, 1.0), (1.0, 1.0), 0.0)
    assert source.augment == expected
    plain = datasets.load_dataset({"source": "folder", "root": root, "workers": 3})
    assert plain.augment == Augmentation()
    assert plain.preprocessing == Preprocessing()
    assert plain.augment.randaugment == "rand-m9-mstd0.5-inc1"


def test_batches(root: Path) -> None:
    source = dataset(root)
    (batch,) = take(source, 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, 16, 16, 3), np.uint8),
        "label": ((4,), np.int32),
        "corrupt": ((4,), np.int32),
    }
    assert not batch["corrupt"].any()
    evaluated = list(pipeline.evaluation_batches(source, pipeline.plan_evaluation(source, batch_size=4)))
    assert [batch["mask"].sum() for batch in evaluated] == [4, 2]
    assert evaluated[0].keys() == {"image", "label", "mask"}
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in evaluated])[:6], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(evaluated[0]["image"][3], source.preprocessing.crop(source.evaluation[3]["image"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root: Path, workers: int) -> None:
    truncate(root / "train" / "apple" / "1.jpg")
    source = dataset(root)
    # Three steps an epoch: the batches cross into the third.
    assert_same(take(source, 7, start_step=1), take(source, 7, start_step=1, workers=workers))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resume_within_an_epoch(root: Path, step: int) -> None:
    truncate(root / "train" / "apple" / "1.jpg")
    source = dataset(root)
    assert_same(take(source, 8)[step:], take(source, 8 - step, start_step=step))


def test_augmentation_differs_between_epochs(root: Path) -> None:
    images = [image.tobytes() for batch in take(dataset(root), 6, batch_size=15) for image in batch["image"]]
    assert len(set(images)) == 90


def test_quirks_of_imagenet_are_decoded(root: Path) -> None:
    folder = root / "train" / "apple"
    for path in folder.iterdir():
        path.unlink()
    save(folder / "cmyk.JPEG", 1, "CMYK", format="JPEG")
    save(folder / "grey.JPEG", 2, "L", format="JPEG")
    save(folder / "png.JPEG", 3, format="PNG")
    save(folder / "rgba_png.JPEG", 4, "RGBA", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    save(folder / "turned.JPEG", 5, format="JPEG", exif=exif)
    save(folder / "damaged_exif.JPEG", 6, format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    source = dataset(root)
    shapes = [np.asarray(source.train[index]["image"]).shape for index in range(5, 11)]
    assert shapes == [(36, 48, 3)] * 5 + [(48, 36, 3)]
    assert not any(source.train[index]["corrupt"] for index in range(5, 11))


# Damaged images


def test_the_next_record_takes_the_place_of_a_damaged_one(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean = dataset(root)
    expected = [clean.train[index] for index in range(15)]
    damaged = [truncate(root / "train" / "Zebra" / "4.jpg"), root / "train" / "apple" / "0.jpg"]
    damaged[1].write_bytes(b"")
    damaged.append(truncate(root / "train" / "égg" / "4.jpg"))  # the last: the first stands in
    source = dataset(root)
    for index, stand_in in ((4, 6), (5, 6), (14, 0), (6, 6), (4, 6)):
        record = source.train[index]
        np.testing.assert_array_equal(record["image"], expected[stand_in]["image"])
        assert record["label"] == expected[stand_in]["label"]
        assert record["corrupt"] == (index != stand_in)
    # Each once, though two records came to the second one.
    messages = warnings(caplog, root)
    for path, message in zip(damaged, messages, strict=True):
        assert str(path) in message
    (batch,) = take(source, 1, batch_size=15)
    assert batch["corrupt"].sum() == 3
    with pytest.raises(IndexError):
        source.train[15]


def test_a_damaged_image_for_evaluation_is_masked(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = truncate(root / "val" / "apple" / "0.jpg")
    source = dataset(root)
    record = source.evaluation[2]
    assert (record["image"].shape, record["label"], record["corrupt"]) == ((1, 1, 3), 1, 1)
    batches = list(pipeline.evaluation_batches(source, pipeline.plan_evaluation(source, batch_size=4)))
    assert np.concatenate([batch["mask"] for batch in batches]).tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    assert not batches[0]["image"][2].any()
    (message,) = warnings(caplog, root)
    assert str(path) in message


def test_nothing_but_damaged_images(root: Path) -> None:
    for path in root.glob("train/*/*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="15 images in a row"):
        dataset(root).train[7]


def test_too_many_damaged_images_in_a_row() -> None:
    class Damaged:
        asked = 0

        def __len__(self) -> int:
            return 1_000_000

        def encoded(self, index: int) -> tuple[bytes, int, str]:
            self.asked += 1
            return b"x", 0, f"image {index}"

    images = Damaged()
    with pytest.raises(InputError, match="100 images in a row"):
        DecodedImages(images, training=True)[999_990]
    assert images.asked == 100


@pytest.mark.parametrize("workers", [0, 1])
def test_the_warning_of_a_command_reaches_the_terminal(root: Path, workers: int) -> None:
    path = truncate(root / "train" / "apple" / "1.jpg")
    script = root / "script.py"
    script.write_text(
        "import contextlib, itertools, sys\n"
        "from absl import app\n"
        "from msvmamba_jax import command\n"
        "from msvmamba_jax.data import datasets, pipeline\n"
        "def main():\n"
        f"    source = datasets.load_dataset({{'source': 'folder', 'root': {str(root)!r}, 'size': 16, 'resize': 16}})\n"
        f"    batches = pipeline.train_batches(source, batch_size=15, seed=0, start_step=0, workers={workers})\n"
        "    with contextlib.closing(batches):\n"
        "        print(sum(int(batch['corrupt'].sum()) for batch in itertools.islice(batches, 3)))\n"
        "if __name__ == '__main__':\n"
        "    app.run(lambda _: sys.exit(command.run(main)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3"]
    assert done.stderr.count(str(path)) == 1
