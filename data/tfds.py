"""Data sets that TensorFlow Datasets has prepared as ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from msvmamba_jax.data.coco import CocoRecords, coco_records
from msvmamba_jax.data.coco_index import CocoIndex
from msvmamba_jax.data.labels import readable_class_names
from msvmamba_jax.data.segmentation import SegmentationRecords, labels_file
from msvmamba_jax.errors import InputError

SEGMENTATION = "ade20k_segmentation"  # what `tfds_ade20k` prepares
DETECTION = "coco_instances"  # what `tfds_coco` prepares


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedImages:
    """One split; an `encoded.EncodedImages`.

    Attributes:
        records: the split, with images that are still encoded.
        name: how messages call it.
    """

    records: Any
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, index: int) -> tuple[bytes, int, str]:
        """See `encoded.EncodedImages`."""
        record = self.records[index]
        return record["image"], int(record["label"]), f"{self.name}[{index}]"


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSegmentation:
    """One split; a `segmentation.EncodedSegmentation`.

    Attributes:
        records: the split, with images and label maps that are still encoded.
    """

    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, index: int) -> tuple[bytes, bytes, str, str]:
        """See `segmentation.EncodedSegmentation`."""
        record = self.records[index]
        name = record["name"].decode()
        return record["image"], record["labels"], name, labels_file(name)

    def image(self, index: int) -> IO[bytes]:
        """See `segmentation.EncodedSegmentation`."""
        return io.BytesIO(self.records[index]["image"])


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedCoco:
    """One split; a `coco.AnnotatedImages`.

    Attributes:
        records: the split, with images that are still encoded.
        image_ids: of the records, int64 (n,).
    """

    records: Any
    image_ids: np.ndarray

    def encoded(self, index: int) -> tuple[bytes, list[dict[str, Any]], str]:
        """See `coco.AnnotatedImages`."""
        record = self.records[index]
        if record["image_id"] != self.image_ids[index]:
            raise InputError(
                f"Record {index} holds image {record['image_id']}, not {self.image_ids[index]} as the metadata say: "
                "prepare the data set again."
            )
        return record["image"], json.loads(record["annotations"]), record["file_name"].decode()

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """See `coco.AnnotatedImages`."""
        return self.encoded(index)[1]


def load_prepared(
    name: str, *, data_dir: str | None, train_split: str, evaluation_split: str
) -> tuple[PreparedImages, PreparedImages, tuple[str, ...]]:
    """Opens a prepared data set with the features ``image`` and ``label``.

    Args:
        name: as TensorFlow Datasets calls it, such as "imagenet2012" or "imagenette/320px-v2".
        data_dir: where it was prepared; None: where TensorFlow Datasets looks by itself.
        train_split: name of the training split; slices such as "train[:90%]" work too.
        evaluation_split: name of the evaluation split.

    Returns:
        The training split, the evaluation split, and the name of every label (English for ImageNet-1k).

    Raises:
        InputError: TensorFlow Datasets is not installed, the data set is unknown or not prepared as ArrayRecord files,
            has no such split, or is no classification data set.
    """
    tfds = _import_tfds()
    place = f" --data_dir={data_dir}" if data_dir else ""
    prepare = f"run 'tfds build {name} --file_format=array_record{place}' once (this needs tensorflow)"
    builder, features = _open(name, data_dir, prepare)
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise InputError(f"The data set {name} has no features 'image' and 'label': choose one for classification.")
    train, evaluation = (
        PreparedImages(_split(builder, name, wanted, ("image",), prepare), f"{name} {wanted}")
        for wanted in (train_split, evaluation_split)
    )
    return train, evaluation, readable_class_names(features["label"].names)


def load_prepared_segmentation(
    *,
    data_dir: str | None,
    name: str = SEGMENTATION,
    train_split: str = "train",
    evaluation_split: str = "validation",
) -> tuple[SegmentationRecords, SegmentationRecords, tuple[str, ...]]:
    """Opens ADE20K, or another data set of its features, as `tfds_ade20k` prepares it.

    Args:
        data_dir: where it was prepared; None: where TensorFlow Datasets looks by itself.
        name: of the data set.
        train_split: name of the training split; slices such as "train[:90%]" work too.
        evaluation_split: name of the evaluation split.

    Returns:
        The training split, the evaluation split, and the name of every label.

    Raises:
        InputError: TensorFlow Datasets is not installed, the data set is not prepared, is another one, or has no such
            split.
    """
    tfds = _import_tfds()
    importlib.import_module("msvmamba_jax.data.tfds_ade20k")  # so that the name is known
    prepare = f"run 'python scripts/prepare_ade20k.py ADEChallengeData2016.zip {data_dir or 'DATA_DIR'}' once"
    builder, features = _open(name, data_dir, prepare)
    labels = features.get("labels")
    if not (isinstance(features.get("image"), tfds.features.Image) and isinstance(labels, tfds.features.LabeledImage)):
        raise InputError(
            f"The data set {name} has no features 'image' and 'labels' (an image of labels): {prepare}, and read that."
        )
    names = tuple(labels.names[1:])  # the first one is what belongs to no class
    train, evaluation = (
        SegmentationRecords(
            PreparedSegmentation(_split(builder, name, wanted, ("image", "labels"), prepare)),
            len(names),
            reduce_zero_label=True,
            training=training,
        )
        for wanted, training in ((train_split, True), (evaluation_split, False))
    )
    return train, evaluation, names


def load_prepared_coco(
    *,
    data_dir: str | None,
    name: str = DETECTION,
    train_split: str = "train",
    evaluation_split: str = "validation",
) -> tuple[CocoRecords, CocoRecords, tuple[str, ...]]:
    """Opens COCO, or another data set of its form, as `tfds_coco` prepares it.

    Args:
        data_dir: where it was prepared; None: where TensorFlow Datasets looks by itself.
        name: of the data set.
        train_split: name of the training split; no slice.
        evaluation_split: name of the evaluation split.

    Returns:
        The training split, the evaluation split, and the name of every label, as `coco.load_coco` does.

    Raises:
        InputError: TensorFlow Datasets is not installed, the data set is not prepared, is another one, or has no such
            split, or a split is empty.
    """
    _import_tfds()
    importlib.import_module("msvmamba_jax.data.tfds_coco")  # so that the name is known
    prepare = f"run 'python scripts/prepare_coco.py SOURCE {data_dir or 'DATA_DIR'}' once"
    builder, _ = _open(name, data_dir, prepare)
    known = dict(builder.info.metadata or {})
    if "splits" not in known or "categories" not in known:
        raise InputError(f"The data set {name} holds no masks, or is not as this package prepares it: {prepare}.")
    categories = tuple((category["id"], category["name"]) for category in known["categories"])
    parts = []
    for wanted, training in ((train_split, True), (evaluation_split, False)):
        if wanted not in known["splits"]:
            listed = ", ".join(map(repr, sorted(known["splits"])))
            raise InputError(f"The data set {name} has no split {wanted!r} (slices are none); it has {listed}.")
        records = _split(builder, name, wanted, ("image",), prepare)
        columns = known["splits"][wanted]
        index = CocoIndex(
            name=f"{name} {wanted}",
            categories=categories,
            image_ids=np.array(columns["image_ids"], np.int64),
            sizes=np.array(columns["sizes"], np.int32).reshape(-1, 2),
            counts=np.array(columns["counts"], np.int32),
        )
        files = PreparedCoco(records, index.image_ids)
        parts.append(coco_records(index, files, training=training, annotations_file=None))
    train, evaluation = parts
    return train, evaluation, train.class_names


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "Prepared data sets are read with TensorFlow Datasets: pip install 'msvmamba_jax[data,tfds]'."
        ) from error
    return tfds


def _open(name: str, data_dir: str | None, prepare: str) -> tuple[Any, dict[str, Any]]:
    """The builder of a prepared data set and its features by name; `prepare` says how to prepare it."""
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"TensorFlow Datasets knows no data set {name!r}, and none of this name is prepared in "
            f"{data_dir or 'its default folder'}: check data.name and data.data_dir."
        ) from error
    if not builder.is_prepared():
        raise InputError(
            f"The data set {name} is not prepared in {builder.data_dir}: {prepare}, or set data.data_dir to where it "
            "is."
        )
    features = builder.info.features
    return builder, dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}


def _split(builder: Any, name: str, wanted: str, encoded: Sequence[str], prepare: str) -> Any:
    """A split's records, with the features `encoded` not decoded; `prepare` says how to prepare the data set."""
    tfds = _import_tfds()
    if wanted.partition("[")[0] not in builder.info.splits:
        known = ", ".join(map(repr, builder.info.splits))
        raise InputError(f"The data set {name} has no split {wanted!r}; it has {known}.")
    try:
        return builder.as_data_source(split=wanted, decoders=dict.fromkeys(encoded, tfds.decode.SkipDecoding()))
    except (ValueError, AssertionError) as error:  # of a slice such as train[:x]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"The data set {name} has no split {wanted!r}: {reason}") from error
    except NotImplementedError as error:  # TFRecord files have no random access.
        raise InputError(
            f"The data set {name} in {builder.data_dir} is not stored as ArrayRecord files: {prepare}."
        ) from error
