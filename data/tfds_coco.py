"""COCO's instances for TensorFlow Datasets, or an own data set in COCO's form.

TensorFlow Datasets' own `coco` holds no masks. This one holds the image files as they are and their annotations as
JSON text: ``image``, ``annotations``, ``image_id`` and ``file_name``, in the order of the ids. What training must know
before it opens a record (sizes, numbers of objects, categories) stands in the data set's metadata. Needs
`tensorflow_datasets`, not TensorFlow; `tfds.load_prepared_coco` reads the result.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from msvmamba_jax.data.coco import FILES, check_categories, check_files, coco_root
from msvmamba_jax.data.coco_index import CocoFiles, CocoIndex, read_coco
from msvmamba_jax.errors import InputError


class CocoInstances(tfds.core.GeneratorBasedBuilder):
    """The builder; its `manual_dir` holds the images and annotations.

    Attributes:
        files: where they are in it; arguments of `coco.load_coco`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Where checksums of downloads would be looked for, by way of a package that TensorFlow Datasets does not require.
    code_path = None
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put train2017/, val2017/ and annotations/ into manual_dir."

    files = FILES

    @classmethod
    def get_metadata(cls) -> Any:
        """Stated here; by default it would be looked for in files beside this one."""
        return tfds.core.dataset_metadata.DatasetMetadata(
            description="Objects in photographs: a class, a box and a mask for each.",
            citation="Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014.",
            tags=[],
        )

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(),
            "annotations": tfds.features.Text(),
            "image_id": tfds.features.Scalar(np.int64),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            homepage="https://cocodataset.org",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # so that record i is the i-th of the metadata
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        root, files = coco_root(str(dl_manager.manual_dir)), self.files
        parts = {
            split: read_coco(
                os.path.join(root, files[f"{part}_annotations"]),
                os.path.join(root, files[f"{part}_images"]),
                training=split == "train",
            )
            for split, part in (("validation", "evaluation"), ("train", "train"))
        }
        check_categories(parts["train"][0], parts["validation"][0])
        for index, where, names in parts.values():
            if not names:
                raise InputError(f"There is no image in {index.name}: check that it is the right file.")
            check_files(where.folder, names, index.name)
        categories = [{"id": identifier, "name": name} for identifier, name in parts["train"][0].categories]
        self.info.metadata.update(categories=categories, splits={split: _known(parts[split][0]) for split in parts})
        return {split: self._generate_examples(*parts[split]) for split in ("train", "validation")}

    def _generate_examples(
        self, index: CocoIndex, files: CocoFiles, names: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, (identifier, name) in enumerate(zip(index.image_ids.tolist(), names, strict=True)):
            content, annotations, _ = files.encoded(place)
            yield (
                place,
                {
                    "image": io.BytesIO(content),
                    "annotations": json.dumps(annotations),
                    "image_id": identifier,
                    "file_name": name,
                },
            )


def prepare(source: str | os.PathLike[str], data_dir: str | os.PathLike[str], **files: str) -> Path:
    """Prepares a data set as ArrayRecord files.

    Args:
        source: the folder with the images and annotations.
        data_dir: where to prepare it.
        **files: where they are in it, if not where COCO has them: arguments of `coco.load_coco`.

    Returns:
        The folder of the prepared data set.

    Raises:
        InputError: a file is missing, is damaged or does not fit the others.
    """
    builder = CocoInstances(data_dir=os.path.expanduser(data_dir), file_format="array_record")
    builder.files = {**FILES, **files}
    root = coco_root(source)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=root))
    return Path(builder.data_dir)


def _known(index: CocoIndex) -> dict[str, list[Any]]:
    return {name: getattr(index, name).tolist() for name in ("image_ids", "sizes", "counts")}
