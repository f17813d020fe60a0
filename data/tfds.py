"""Classification data sets that TensorFlow Datasets has prepared as ArrayRecord files, read without TensorFlow."""

from __future__ import annotations

import dataclasses
from typing import Any

from msvmamba_jax.data.labels import readable_class_names
from msvmamba_jax.errors import InputError


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
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "The data source 'tfds' reads with TensorFlow Datasets: pip install 'msvmamba_jax[data,tfds]'."
        ) from error
    place = f" --data_dir={data_dir}" if data_dir else ""
    prepare = f"tfds build {name} --file_format=array_record{place}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"TensorFlow Datasets knows no data set {name!r}, and none of this name is prepared in "
            f"{data_dir or 'its default folder'}: check data.name and data.data_dir."
        ) from error
    if not builder.is_prepared():
        raise InputError(
            f"The data set {name} is not prepared in {builder.data_dir}: run '{prepare}' once (this needs tensorflow), "
            "or set data.data_dir to where it is."
        )
    top = builder.info.features
    features = dict(top.items()) if isinstance(top, tfds.features.FeaturesDict) else {}
    if not (
        isinstance(features.get("image"), tfds.features.Image)
        and isinstance(features.get("label"), tfds.features.ClassLabel)
    ):
        raise InputError(f"The data set {name} has no features 'image' and 'label': choose one for classification.")

    def split(wanted: str) -> PreparedImages:
        if wanted.partition("[")[0] not in builder.info.splits:
            known = ", ".join(map(repr, builder.info.splits))
            raise InputError(f"The data set {name} has no split {wanted!r}; it has {known}.")
        try:
            records = builder.as_data_source(split=wanted, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError as error:  # TFRecord files have no random access.
            raise InputError(
                f"The data set {name} in {builder.data_dir} is not stored as ArrayRecord files: run '{prepare}' once "
                "(this needs tensorflow)."
            ) from error
        return PreparedImages(records, f"{name} {wanted}")

    names = readable_class_names(features["label"].names)
    return split(train_split), split(evaluation_split), names
