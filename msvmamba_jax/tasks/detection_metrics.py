"""COCO's average precisions of boxes and masks, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from msvmamba_jax.data.run_lengths import run_lengths
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.masks import paste_masks

_KINDS = {"bbox": "box", "segm": "mask"}
_AT_A_TIME = 16  # masks of an image's size held in memory
_SIZES = ("s", "m", "l")  # COCO's areas below 32 ** 2, below 96 ** 2, and above; in pixels


class _Found(NamedTuple):
    """The detections in one image; n of them."""

    boxes: np.ndarray  # (n, 4), x1, y1, x2, y2
    scores: np.ndarray  # (n,)
    labels: np.ndarray  # (n,)
    masks: list[dict[str, Any]]  # compressed run-length encodings; a thousandth of the pixels


class DetectionEvaluator:
    """Collects the detections of a split, on the host, and evaluates them as COCO does, crowds included.

    Boxes and masks are ranked by the same scores, as in mmdetection. Per image and class the 100 best detections
    count, which are all there are where an image has no more than 100.

    Attributes:
        class_names: the name of every label.
    """

    def __init__(
        self,
        annotations: str | Path | Any,
        image_ids: Sequence[int] | np.ndarray,
        category_ids: Sequence[int],
        class_names: Sequence[str],
    ) -> None:
        """Starts with no detections.

        Args:
            annotations: a file of COCO's instances, or the `pycocotools.coco.COCO` of one, which stays as it is.
            image_ids: for each image of the split, by its index, the id that the annotations have for it.
            category_ids: for each label, the id that the annotations have for it; others are not evaluated.
            class_names: the name of every label.

        Raises:
            InputError: pycocotools is not installed, or the annotations cannot be read, lack an image or a category,
                or have objects without box, area or outline.
            ValueError: an id occurs twice.
        """
        self.class_names = tuple(class_names)
        self._coco = _coco(annotations)
        self._image_ids = [int(image_id) for image_id in image_ids]
        self._category_ids = [int(category_id) for category_id in category_ids]
        for name, ids, known in (
            ("image", self._image_ids, self._coco.imgs),
            ("category", self._category_ids, self._coco.cats),
        ):
            if len(set(ids)) < len(ids):
                raise ValueError(f"an {name} id occurs twice")
            if missing := [number for number in ids if number not in known]:
                raise InputError(
                    f"The annotations have no {name} {missing[0]}: evaluate with the file of this very split."
                )
        if len(self._category_ids) != len(self.class_names):
            raise ValueError(f"{len(self._category_ids)} categories, but {len(self.class_names)} names")
        for annotation in self._annotations(self._image_ids):
            for key in ("bbox", "area", "segmentation"):
                if annotation.get(key) in (None, []):
                    raise InputError(
                        f"An object of image {annotation['image_id']} has no {key!r} in the annotations: add it, or "
                        "remove the object."
                    )
        self._found: dict[int, _Found] = {}
        self._precisions: dict[str, np.ndarray] = {}

    def update(self, predictions: Mapping[str, np.ndarray], mask: np.ndarray) -> None:
        """Adds one batch.

        Args:
            predictions: of b images with up to n detections each: ``"index"`` int (b,), of each image in the split;
                ``"box"`` float32 (b, n, 4), x1, y1, x2, y2 in pixels of the image as it is stored; ``"score"`` float32
                (b, n); ``"label"`` int (b, n); ``"mask"`` float32 (b, n, size, size), probabilities over the box;
                ``"valid"`` bool (b, n), False where there is no detection.
            mask: bool (b,), False where a row is padding.

        Raises:
            ValueError: an image came before.
        """
        for row in np.flatnonzero(np.asarray(mask, bool)):
            index = int(predictions["index"][row])
            if not 0 <= index < len(self._image_ids):
                raise ValueError(f"image {index} of a split of {len(self._image_ids)}")
            image_id = self._image_ids[index]
            if image_id in self._found:
                raise ValueError(f"image {image_id} was evaluated twice")
            valid = np.asarray(predictions["valid"][row], bool)
            boxes, scores, labels, masks = (
                np.asarray(predictions[name][row])[valid] for name in ("box", "score", "label", "mask")
            )
            self._found[image_id] = _Found(boxes, scores, labels, self._encoded(masks, boxes, image_id))
        self._precisions = {}

    def result(self) -> dict[str, float]:
        """COCO's metrics in 0..1, and the number of images.

        `bbox_mAP` is the mean average precision of boxes over overlaps from 0.5 to 0.95, `bbox_mAP_50` and
        `bbox_mAP_75` at one overlap, `bbox_mAP_s`, `bbox_mAP_m` and `bbox_mAP_l` over small, medium and large objects:
        left out where there are none. Likewise `segm_mAP` and so on of masks. The images are those that were added.
        """
        result: dict[str, float] = {}
        for kind in _KINDS:
            precision = self._precision(kind)
            result[f"{kind}_mAP"] = _mean(precision[..., 0]) or 0.0
            result[f"{kind}_mAP_50"] = _mean(precision[0, ..., 0]) or 0.0
            result[f"{kind}_mAP_75"] = _mean(precision[5, ..., 0]) or 0.0
            for area, size in enumerate(_SIZES, start=1):
                mean = _mean(precision[..., area])
                if mean is not None:
                    result[f"{kind}_mAP_{size}"] = mean
        return {**result, "images": len(self._found)}

    def per_class(self) -> list[dict[str, Any]]:
        """For every class its `name`, `bbox_AP`, `segm_AP` (None where it has no objects), and `objects`: how many."""
        objects = dict.fromkeys(self._category_ids, 0)
        for annotation in self._annotations(self._found):
            objects[annotation["category_id"]] += not annotation["iscrowd"]
        return [
            {
                "name": name,
                "bbox_AP": _mean(self._precision("bbox")[:, :, label, 0]),
                "segm_AP": _mean(self._precision("segm")[:, :, label, 0]),
                "objects": objects[category_id],
            }
            for label, (name, category_id) in enumerate(zip(self.class_names, self._category_ids, strict=True))
        ]

    def sentence(self) -> str:
        """See `Evaluator`."""
        result = self.result()
        parts = [
            f"{name} mAP {result[f'{kind}_mAP']:.2%} ({result[f'{kind}_mAP_50']:.2%} at overlap 0.5)"
            for kind, name in _KINDS.items()
        ]
        return f"{', '.join(parts)} on {result['images']:,} images"

    def save(self, path: str | Path) -> None:
        """Writes the detections in COCO's format of results: a list that `COCO.loadRes` and COCO's server read.

        Whoever evaluates masks from this file drops `bbox` first: with it `loadRes` takes the boxes' areas for those
        of the masks, which changes the metrics by object size, and no other.

        Raises:
            InputError: the file cannot be written.
        """
        results = [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "score": score,
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
            }
            for image_id, category_id, box, score, mask in self._detections()
        ]
        try:
            Path(path).write_text(json.dumps(results))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def _encoded(self, masks: np.ndarray, boxes: np.ndarray, image_id: int) -> list[dict[str, Any]]:
        """The masks of an image as compressed run lengths."""
        from pycocotools.mask import frPyObjects

        size = [int(self._coco.imgs[image_id][side]) for side in ("height", "width")]
        runs = [
            {"size": size, "counts": run_lengths(pasted)}
            for start in range(0, len(masks), _AT_A_TIME)
            for pasted in paste_masks(masks[start : start + _AT_A_TIME], boxes[start : start + _AT_A_TIME], *size)
        ]
        return frPyObjects(runs, *size) if runs else []

    def _detections(self) -> Iterator[tuple[int, int, list[float], float, dict[str, Any]]]:
        """Image id, category id, box (x, y, width, height), score and mask of every detection."""
        for image_id, found in self._found.items():
            for (x1, y1, x2, y2), score, label, mask in zip(
                found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.masks, strict=True
            ):
                yield image_id, self._category_ids[label], [x1, y1, x2 - x1, y2 - y1], score, mask

    def _annotations(self, image_ids: Iterable[int]) -> list[dict[str, Any]]:
        """Copies of these images' annotations of the wanted classes: pycocotools writes into what it evaluates."""
        wanted = set(self._category_ids)
        annotations = [
            {"iscrowd": 0, **annotation}
            for image_id in image_ids
            for annotation in self._coco.imgToAnns[image_id]
            if annotation["category_id"] in wanted
        ]
        # Numbered anew: pycocotools takes a match with number 0 for none, and loses all but one of the same number.
        return [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)]

    def _precision(self, kind: str) -> np.ndarray:
        """Precisions (overlaps, recalls, labels, areas) at 100 detections; -1 where there are no objects."""
        if kind not in self._precisions:
            self._precisions[kind] = self._evaluated(kind)
        return self._precisions[kind]

    def _evaluated(self, kind: str) -> np.ndarray:
        from pycocotools.cocoeval import COCOeval
        from pycocotools.mask import area

        images = [self._coco.imgs[image_id] for image_id in self._found]
        categories = [self._coco.cats[category_id] for category_id in self._category_ids]
        detections = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "score": score,
                "segmentation": mask,
                # What decides whether an unmatched detection counts among the small, the medium or the large ones.
                "area": box[2] * box[3] if kind == "bbox" else int(area(mask)),
                "iscrowd": 0,
            }
            for number, (image_id, category_id, box, score, mask) in enumerate(self._detections(), start=1)
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = (
                _indexed({"images": images, "categories": categories, "annotations": annotations})
                for annotations in (self._annotations(self._found), detections)
            )
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][..., -1]
        # pycocotools sorts the categories.
        return precision[:, :, np.argsort(np.argsort(self._category_ids))]


def _coco(annotations: str | Path | Any) -> Any:
    """The COCO of a file, or the one that is given."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise InputError("COCO's metrics need pycocotools: pip install 'msvmamba_jax[data]'.") from error
    if isinstance(annotations, COCO):
        return annotations
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(annotations))
    except OSError as error:
        raise InputError(f"Cannot read the annotations {annotations}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(
            f"{annotations} is no file of COCO's instances: name one such as annotations/instances_val2017.json."
        ) from error


def _indexed(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _mean(precision: np.ndarray) -> float | None:
    """Of those that are defined; None where none is."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None
