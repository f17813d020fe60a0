"""ADE20K's scene parsing benchmark for TensorFlow Datasets, from the folder or zip file that its authors give out.

TensorFlow Datasets' own `scene_parse150` holds other label maps, those of the instance benchmark. This one holds the
files of ``ADEChallengeData2016`` as they are: ``image`` (JPEG), ``labels`` (PNG; 0 is no class, 1..150 are the classes)
and ``name``. Needs `tensorflow_datasets`, not TensorFlow; `tfds.load_prepared_segmentation` reads the result.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.segmentation import EVALUATION, TRAIN, labels_file
from msvmamba_jax.errors import InputError

FOLDER = "ADEChallengeData2016"


class Ade20kSegmentation(tfds.core.GeneratorBasedBuilder):
    """The builder; its `manual_dir` holds the folder or the zip file."""

    VERSION = tfds.core.Version("1.0.0")
    # Where checksums of downloads would be looked for, by way of a package that TensorFlow Datasets does not require.
    code_path = None
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {FOLDER}.zip, or the folder in it, into manual_dir."

    @classmethod
    def get_metadata(cls) -> Any:
        """Stated here; by default it would be looked for in files beside this one."""
        return tfds.core.dataset_metadata.DatasetMetadata(
            description="Scene parsing: 150 classes of ADE20K, a label for every pixel.",
            citation="Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017.",
            tags=[],
        )

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "labels": tfds.features.LabeledImage(labels=["other", *ade20k_class_names()], encoding_format="png"),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            homepage="http://sceneparsing.csail.mit.edu",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        root = _root(Path(dl_manager.manual_dir))
        return {"train": self._generate_examples(root, TRAIN), "validation": self._generate_examples(root, EVALUATION)}

    def _generate_examples(self, root: Any, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        images, annotations = root / "images" / split, root / "annotations" / split
        files = sorted(path.name for path in images.iterdir() if path.name.endswith(".jpg")) if images.is_dir() else []
        if not files:
            raise InputError(f"There is no image in {images}: download {FOLDER}.zip again.")
        for file in files:
            labels = annotations / labels_file(file)
            if not labels.is_file():
                raise InputError(f"The image {images / file} has no label map {labels}: download {FOLDER}.zip again.")
            content = {"image": (images / file).read_bytes(), "labels": labels.read_bytes()}
            yield file, {**{key: io.BytesIO(value) for key, value in content.items()}, "name": file}


def prepare(source: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> Path:
    """Prepares the data set as ArrayRecord files.

    Args:
        source: ``ADEChallengeData2016.zip``, or the folder in it, or the folder that holds either.
        data_dir: where to prepare it.

    Returns:
        The folder of the prepared data set.

    Raises:
        InputError: the source is not there, or an image has no label map.
    """
    path = Path(source).expanduser()
    manual = path.parent if path.name in (FOLDER, f"{FOLDER}.zip") else path
    _root(manual)
    builder = Ade20kSegmentation(data_dir=os.path.expanduser(data_dir), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return Path(builder.data_dir)


def _root(manual_dir: Path) -> Any:
    """The folder with ``images`` and ``annotations``, a `Path` or one inside a zip file."""
    folder, archive = manual_dir / FOLDER, manual_dir / f"{FOLDER}.zip"
    if folder.is_dir():
        return folder
    if archive.is_file():
        try:
            return zipfile.Path(archive, f"{FOLDER}/")
        except zipfile.BadZipFile as error:
            raise InputError(f"The zip file {archive} is damaged: download it again.") from error
    raise InputError(f"There is neither {folder} nor {archive}: download it from http://sceneparsing.csail.mit.edu.")
