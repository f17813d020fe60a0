"""Prepared ArrayRecord data sets of TensorFlow Datasets are read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from msvmamba_jax.data import datasets, pipeline, tfds
from msvmamba_jax.data.pipeline import Batch, Dataset
from msvmamba_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("nothing_reported")


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (20 + number, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `tiny_shapes` (6 and 3 images, two classes) and `tiny_text`, which has no image."""
    module = pytest.importorskip("tensorflow_datasets")

    class Prepared(module.core.GeneratorBasedBuilder):
        VERSION = module.core.Version("1.0.0")
        features: ClassVar[dict[str, Any]]

        @classmethod
        def get_metadata(cls) -> Any:  # otherwise looked for in a package folder
            return module.core.dataset_metadata.DatasetMetadata(description="tiny", citation="", tags=[])

        def _info(self) -> Any:
            return module.core.DatasetInfo(builder=self, features=module.features.FeaturesDict(self.features))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

        def _generate_examples(self, count: int) -> Any:
            for number in range(count):
                file = io.BytesIO()
                Image.fromarray(pixels(number)).save(file, "PNG")
                content = io.BytesIO(file.getvalue()[: 90 if number == 5 else None])
                example = {"image": content, "label": number % 2, "text": f"{number}"}
                yield number, {name: example[name] for name in self.features}

    # Unregistered, so that they are found by their files alone.
    with module.core.registered.skip_registration():

        class TinyShapes(Prepared):
            features: ClassVar = {
                "image": module.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": module.features.ClassLabel(names=["square", "circle"]),
            }

        class TinyText(Prepared):
            features: ClassVar = {"text": module.features.Text()}

    folder = tmp_path_factory.mktemp("prepared")
    for builder in (TinyShapes, TinyText):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def load(folder: Path, **options: Any) -> Dataset:
    config = {"source": "tfds", "name": "tiny_shapes", "data_dir": str(folder), "size": 16, "resize": 18, **options}
    return datasets.load_dataset(config)


def take(source: Dataset, count: int, **options: Any) -> list[Batch]:
    with contextlib.closing(pipeline.train_batches(source, batch_size=3, seed=0, **options)) as batches:
        return list(itertools.islice(batches, count))


def test_records(prepared: Path) -> None:
    source = load(prepared)
    assert source.class_names == ("square", "circle")
    assert (len(source.train), len(source.evaluation)) == (6, 3)
    heights = []
    for index in range(6):
        record = source.train[index]
        number = record["image"].height - 20  # the files' order is one of hashes
        heights.append(number)
        np.testing.assert_array_equal(record["image"], pixels(number))
        assert record["label"] == number % 2
    # The truncated one is replaced by another.
    assert set(heights) == {0, 1, 2, 3, 4}
    assert sum(source.train[index]["corrupt"] for index in range(6)) == 1
    assert len(list(pipeline.evaluation_batches(source, pipeline.plan_evaluation(source, batch_size=2)))) == 2
    assert "tensorflow" not in sys.modules


def test_messages_name_the_record(prepared: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = load(prepared, evaluation_split="train[50%:]")
    assert len(source.evaluation) == 3
    assert [source.train[index]["corrupt"] for index in range(6)].count(1) == 1
    assert "tiny_shapes train[" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(prepared: Path, workers: int) -> None:
    source = load(prepared)
    for one, other in zip(
        take(source, 5, start_step=1), take(source, 6, start_step=0, workers=workers)[1:], strict=True
    ):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_pickle(prepared: Path) -> None:
    source = load(prepared).train
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[0]["image"], source[0]["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "tiny_shapez"}, "tiny_shapez"),
        ({"name": "mnist"}, "tfds build mnist --file_format=array_record --data_dir="),
        ({"name": "tiny_text"}, "'image' and 'label'"),
        ({"train_split": "train[:x]"}, "no split 'train[:x]'"),
        ({"train_split": "training"}, "no split 'training'; it has 'train', 'validation'"),
        ({"name": ""}, "--config.data.name"),
        ({"rooot": "x"}, "'rooot'"),
    ],
)
def test_what_cannot_be_read(prepared: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        load(prepared, **options)
    assert message in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_files_without_random_access(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    info = tmp_path / "tiny_shapes" / "1.0.0" / "dataset_info.json"
    assert '"array_record"' in info.read_text()
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match="not stored as ArrayRecord files: run 'tfds build tiny_shapes --file_format"):
        load(tmp_path)


def test_tensorflow_datasets_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"pip install 'msvmamba_jax\[data,tfds\]'"):
        tfds.load_prepared("imagenet2012", data_dir=None, train_split="train", evaluation_split="validation")
