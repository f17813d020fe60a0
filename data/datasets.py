"""From the `data` part of a configuration to a `Dataset`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from msvmamba_jax.data import coco, digits, folder, segmentation, tfds
from msvmamba_jax.data.augment import Augmentation
from msvmamba_jax.data.coco import CocoRecords
from msvmamba_jax.data.detection_augment import (
    MULTI_SCALES,
    CropOption,
    DetectionAugmentation,
    aspect_groups,
    slots,
)
from msvmamba_jax.data.detection_preprocessing import (
    SCALE,
    DetectionPreprocessing,
    checked_bucket,
    detection_example,
    detection_shapes,
)
from msvmamba_jax.data.encoded import DecodedImages, EncodedImages
from msvmamba_jax.data.pipeline import Dataset, Record
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.data.resizing import resize_image, resize_labels
from msvmamba_jax.data.segmentation import SegmentationRecords
from msvmamba_jax.data.segmentation_augment import PhotometricDistortion, SegmentationAugmentation
from msvmamba_jax.data.segmentation_preprocessing import TTA_RATIOS, SegmentationPreprocessing, prepare_tta
from msvmamba_jax.errors import InputError


def load_dataset(config: Mapping[str, Any]) -> Dataset:
    """Loads the data set that a configuration names.

    Args:
        config: a mapping or `ml_collections.ConfigDict`: ``source`` names the data set, the other keys are its options.
            ``workers``, which is for `train_batches`, may stand there too. Known sources and their options:

            - "digits": none.
            - "folder": ``root``, the folder with ``train`` and ``val``; see `folder`.
            - "tfds": ``name``, and where they differ from the defaults ``data_dir``, ``train_split`` ("train") and
              ``evaluation_split`` ("validation"); see `tfds.load_prepared`.

            Those two also take ``size`` (224) and ``resize`` (256) of `Preprocessing`; ``interpolation``
            ("bicubic"), for both parts; and ``randaugment`` ("rand-m9-mstd0.5-inc1"; empty: none), ``scale``, ``ratio``
            and ``flip`` of `Augmentation`.

            - "segmentation_folder": ``root``, the folder with ``images`` and ``annotations``; see `segmentation`. Also
              ``class_names`` and ``reduce_zero_label`` of `load_segmentation_folder`; ``scale`` of
              `SegmentationPreprocessing`; ``crop``, ``factor``, ``max_class_part`` and ``flip`` of
              `SegmentationAugmentation`, and ``distort`` (true), whether it changes colours; ``tta`` (false), whether
              evaluation takes an image at all of `TTA_RATIOS`; and ``bucket`` (0), see `segmentation_example`.
            - "segmentation_tfds": ADE20K as `scripts/prepare_ade20k.py` prepares it: ``data_dir``, and where they
              differ from the defaults ``name``, ``train_split`` and ``evaluation_split`` of
              `tfds.load_prepared_segmentation`; and the same options from ``scale`` on.

            - "coco": ``root``, the folder with images and annotations, and where they differ from COCO 2017's the other
              arguments of `coco.load_coco`; ``scale`` of `DetectionPreprocessing`; ``multi_scale`` (false), whether to
              train on images of `MULTI_SCALES`, some after a `CropOption`; ``flip`` (0.5); and ``bucket`` (0), see
              `detection_example`.
            - "coco_tfds": COCO as `scripts/prepare_coco.py` prepares it: ``data_dir``, and where they differ from the
              defaults ``name``, ``train_split`` and ``evaluation_split`` of `tfds.load_prepared_coco`; and the same
              options from ``scale`` on.

    Raises:
        InputError: the source or an option is unknown, or the data cannot be read.
    """
    options = dict(config.items())
    options.pop("workers", None)
    source = options.pop("source", None)
    if source not in _LOADERS:
        raise InputError(f"Unknown data source {source!r}; known are {', '.join(map(repr, _LOADERS))}.")
    return _LOADERS[source](options)


def _digits(options: Mapping[str, Any]) -> Dataset:
    _reject_unknown("digits", options, ())
    train, evaluation = digits.load_digits()
    return Dataset(
        train=train,
        evaluation=evaluation,
        class_names=digits.CLASS_NAMES,
        preprocessing=digits.PREPROCESSING,
        augment=digits.augment,
        prepare=functools.partial(cropped, digits.PREPROCESSING),
    )


def _folder(options: Mapping[str, Any]) -> Dataset:
    _reject_unknown("folder", options, ("root", *_IMAGE_OPTIONS))
    preprocessing, augment = _image_transforms(options)
    return _image_dataset(*folder.load_folder(options.get("root")), preprocessing, augment)


def _tfds(options: Mapping[str, Any]) -> Dataset:
    _reject_unknown("tfds", options, ("name", "data_dir", "train_split", "evaluation_split", *_IMAGE_OPTIONS))
    if not options.get("name"):
        raise InputError("The data source 'tfds' needs the name of a data set: --config.data.name=imagenet2012.")
    preprocessing, augment = _image_transforms(options)
    parts = tfds.load_prepared(
        options["name"],
        data_dir=options.get("data_dir") or None,
        train_split=options.get("train_split", "train"),
        evaluation_split=options.get("evaluation_split", "validation"),
    )
    return _image_dataset(*parts, preprocessing, augment)


_IMAGE_OPTIONS = ("size", "resize", "interpolation", "randaugment", "scale", "ratio", "flip")


def _image_transforms(options: Mapping[str, Any]) -> tuple[Preprocessing, Augmentation]:
    given = {name: options[name] for name in _IMAGE_OPTIONS if name in options}
    preprocessing = Preprocessing(
        **{name: given[name] for name in ("size", "resize", "interpolation") if name in given}
    )
    given.pop("resize", None)
    if "randaugment" in given:
        given["randaugment"] = given["randaugment"] or None  # On a command line None can only be written as "".
    return preprocessing, Augmentation(**given)


def _image_dataset(
    train: EncodedImages,
    evaluation: EncodedImages,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    augment: Augmentation,
) -> Dataset:
    return Dataset(
        train=DecodedImages(train, training=True),
        evaluation=DecodedImages(evaluation, training=False),
        class_names=class_names,
        preprocessing=preprocessing,
        augment=augment,
        prepare=functools.partial(cropped, preprocessing),
    )


# Where and how data lie. A configuration has these for more than one source, and a source passes over those of others.
_OF_SOURCES = (
    "root", "name", "data_dir", "train_images", "train_annotations", "evaluation_images", "evaluation_annotations",
    "reduce_zero_label",
)  # fmt: skip


def _reject_unknown(source: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    passed_over = _OF_SOURCES if known else ()
    if unknown := [name for name in options if name not in known and name not in passed_over]:
        listed = f"; it has {', '.join(known)}" if known else ""
        raise InputError(f"The data source {source!r} has no option {', '.join(map(repr, unknown))}{listed}.")


def _coco(options: Mapping[str, Any]) -> Dataset:
    files = ("train_images", "train_annotations", "evaluation_images", "evaluation_annotations")
    _reject_unknown("coco", options, ("root", *files, *_DETECTION_OPTIONS))
    parts = coco.load_coco(options.get("root"), **{name: options[name] for name in files if options.get(name)})
    return _detection_dataset(*parts, options)


def _coco_tfds(options: Mapping[str, Any]) -> Dataset:
    names = ("name", "train_split", "evaluation_split")
    _reject_unknown("coco_tfds", options, ("data_dir", *names, *_DETECTION_OPTIONS))
    given = {name: options[name] for name in names if options.get(name)}
    parts = tfds.load_prepared_coco(data_dir=options.get("data_dir") or None, **given)
    return _detection_dataset(*parts, options)


_DETECTION_OPTIONS = ("scale", "multi_scale", "flip", "bucket")


def _detection_dataset(
    train: CocoRecords, evaluation: CocoRecords, class_names: tuple[str, ...], options: Mapping[str, Any]
) -> Dataset:
    preprocessing = DetectionPreprocessing(**{"scale": options["scale"]} if "scale" in options else {})
    flip = {"flip": options["flip"]} if "flip" in options else {}
    if options.get("multi_scale", False):
        if preprocessing.scale != SCALE:
            raise InputError(f"config.data.multi_scale has sizes of its own and needs config.data.scale={SCALE}.")
        augment = DetectionAugmentation(scales=MULTI_SCALES, crop=CropOption(), **flip)
    else:
        augment = DetectionAugmentation(scales=(preprocessing.scale,), **flip)
    bucket = checked_bucket(options.get("bucket", 0), preprocessing.divisor)
    return Dataset(
        train=train,
        evaluation=evaluation,
        class_names=class_names,
        preprocessing=preprocessing,
        augment=augment,
        prepare=functools.partial(detection_example, preprocessing, bucket),
        evaluation_shapes=functools.partial(detection_shapes, preprocessing, bucket, evaluation.sizes),
        train_groups=aspect_groups(train.sizes),
        train_slots=np.array([slots(count) for count in train.counts.tolist()]),
    )


_SEGMENTATION_OPTIONS = ("scale", "crop", "factor", "max_class_part", "flip", "distort", "tta", "bucket")


def _segmentation_folder(options: Mapping[str, Any]) -> Dataset:
    known = ("root", "class_names", "reduce_zero_label", *_SEGMENTATION_OPTIONS)
    _reject_unknown("segmentation_folder", options, known)
    parts = segmentation.load_segmentation_folder(
        options.get("root"),
        class_names=options.get("class_names") or None,
        reduce_zero_label=_yes_no_or_auto("reduce_zero_label", options.get("reduce_zero_label", "auto")),
    )
    return _segmentation_dataset(*parts, options)


def _yes_no_or_auto(name: str, value: Any) -> bool | None:
    values = {"auto": None, "true": True, "false": False}
    if str(value).lower() not in values:
        raise InputError(f"config.data.{name} must be true, false or auto; got {value!r}.")
    return values[str(value).lower()]


def _segmentation_tfds(options: Mapping[str, Any]) -> Dataset:
    names = ("name", "train_split", "evaluation_split")
    _reject_unknown("segmentation_tfds", options, ("data_dir", *names, *_SEGMENTATION_OPTIONS))
    given = {name: options[name] for name in names if options.get(name)}
    parts = tfds.load_prepared_segmentation(data_dir=options.get("data_dir") or None, **given)
    return _segmentation_dataset(*parts, options)


def _segmentation_dataset(
    train: SegmentationRecords,
    evaluation: SegmentationRecords,
    class_names: tuple[str, ...],
    options: Mapping[str, Any],
) -> Dataset:
    given = {name: options[name] for name in ("crop", "scale", "factor", "max_class_part", "flip") if name in options}
    augment = SegmentationAugmentation(
        **given, distortion=PhotometricDistortion() if options.get("distort", True) else None
    )
    preprocessing = SegmentationPreprocessing(**{"scale": options["scale"]} if "scale" in options else {})
    tta, bucket = options.get("tta", False), options.get("bucket", 0)
    if bucket < 0 or (bucket and tta):
        raise InputError(f"config.data.bucket must be a positive number of pixels, or 0, and 0 with tta; got {bucket}.")
    return Dataset(
        train=train,
        evaluation=evaluation,
        class_names=class_names,
        preprocessing=preprocessing,
        augment=augment,
        prepare=functools.partial(segmentation_example, preprocessing, tta, bucket),
        evaluation_shapes=functools.partial(_segmentation_shapes, evaluation, preprocessing, bucket),
    )


def segmentation_example(preprocessing: SegmentationPreprocessing, tta: bool, bucket: int, record: Record) -> Record:
    """The fields of an evaluation example.

    Args:
        preprocessing: of the image.
        tta: resize the image by all of `TTA_RATIOS`.
        bucket: 0 leaves the labels at the image's own size, which is exact. Otherwise image and labels are resized to
            the multiple of `bucket` pixels nearest to the size that `preprocessing` says, so that there are few shapes.
        record: with ``"image"`` and ``"labels"``.

    Returns:
        ``"image"`` uint8 (h, w, 3), or with `tta` ``"image_0"``, ``"image_1"``, ... for each ratio, and ``"labels"``
        uint8 (height, width).
    """
    image, labels = record["image"], record["labels"]
    if tta:
        return {**{f"image_{i}": x for i, x in enumerate(prepare_tta(image, TTA_RATIOS))}, "labels": labels}
    if not bucket:
        return {"image": preprocessing.prepare(image), "labels": labels}
    size = _bucket_of(preprocessing, bucket, *labels.shape)
    return {"image": resize_image(image, *size), "labels": resize_labels(labels, *size)}


def _segmentation_shapes(
    records: SegmentationRecords, preprocessing: SegmentationPreprocessing, bucket: int
) -> Sequence[Hashable]:
    sizes = [records.image_size(index) for index in range(len(records))]
    return [_bucket_of(preprocessing, bucket, *size) for size in sizes] if bucket else sizes


def _bucket_of(preprocessing: SegmentationPreprocessing, bucket: int, height: int, width: int) -> tuple[int, int]:
    height, width = preprocessing.prepared_size(height, width)
    return max(bucket, round(height / bucket) * bucket), max(bucket, round(width / bucket) * bucket)


def cropped(preprocessing: Preprocessing, record: Record) -> Record:
    """The record with its image as the preprocessing crops it."""
    return {**record, "image": preprocessing.crop(record["image"])}


# The data sets by the name that a configuration's `source` gives them; each takes its options and rejects unknown ones.
_LOADERS: dict[str, Callable[[Mapping[str, Any]], Dataset]] = {
    "digits": _digits,
    "folder": _folder,
    "segmentation_folder": _segmentation_folder,
    "segmentation_tfds": _segmentation_tfds,
    "tfds": _tfds,
    "coco": _coco,
    "coco_tfds": _coco_tfds,
}
