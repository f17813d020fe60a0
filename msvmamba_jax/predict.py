"""Classify or segment images, or detect objects in them.

python -m msvmamba_jax.predict ckpt/tiny photo.jpg holiday/ --output out/
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from msvmamba_jax import command
from msvmamba_jax.errors import InputError, writing

_MAX_THUMBNAILS = 60  # on the picture; predictions.json has them all


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m msvmamba_jax.predict",
        description="Classify or segment images, or detect objects in them: JPEG, PNG and other formats, of any size "
        "and colour mode. Prints the most probable classes of each, those that take up most of it, or its objects. "
        "With --output, also writes predictions.json and pictures: for classification predictions.png, for "
        "segmentation an overlay and a label map for each image, for detection each image with boxes and masks.",
    )
    parser.add_argument("checkpoint", help="a checkpoint folder, or the workdir of a training run")
    parser.add_argument("images", nargs="+", help="image files, or folders to search")
    parser.add_argument("--output", metavar="DIR", help="folder for predictions.json and the pictures")
    parser.add_argument(
        "--top",
        type=int,
        default=5,
        help="how many classes, or in detection objects, to print for each image (default: 5)",
    )
    parser.add_argument("--weights", choices=["ema", "raw"], help="averaged or raw weights (default: averaged, if any)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="images at a time (default: 16); other tasks take one at a time"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="least score of an object in detection (default: %(default)s)"
    )
    arguments = parser.parse_args()

    from msvmamba_jax.checkpoint import read_description
    from msvmamba_jax.data.images import find_images
    from msvmamba_jax.inference import inference_function

    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(arguments, name)}")
    output = Path(arguments.output) if arguments.output else None
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: give a folder")
    paths = find_images(arguments.images)
    if output is not None and output.resolve() in {path.resolve().parent for path in paths}:
        raise InputError(f"--output {output} holds images that are to be read: give another folder")
    images = Images(paths)
    task = read_description(arguments.checkpoint).task
    infer = inference_function(
        arguments.checkpoint,
        resize=task != "classification",  # whose images are cropped here, to one shape
        weights=arguments.weights,
        dtype=arguments.dtype,
    )
    made = output is not None and not output.exists()
    if output is not None:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    by_task = {"classification": _classify, "segmentation": _segment, "detection": _detect}
    predictions: list[dict[str, Any]] = []
    try:
        by_task[task](infer, images, arguments, output, predictions)
    finally:  # what was done before an interruption is not lost
        if output is not None and predictions:
            command.write_json(output / "predictions.json", predictions)
        elif output is not None and made:
            with contextlib.suppress(OSError):  # not empty
                output.rmdir()
    if output is not None and predictions:
        print(f"wrote {output / 'predictions.json'} and {_PICTURES[task].format(output)}")
    return 1 if images.unreadable else 0


_PICTURES = {
    "classification": "{}/predictions.png",
    "segmentation": "for each image {}/*_overlay.png and *_labels.png",
    "detection": "for each image {}/*_objects.png",
}


class Images:
    """Reads files one after the other, with a progress bar; tells of those that it cannot read and goes on.

    Attributes:
        unreadable: how many could not be read so far.
    """

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self.unreadable = 0

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[tuple[Path, np.ndarray]]:
        import tqdm

        from msvmamba_jax.data.images import read_image

        for path in tqdm.tqdm(self._paths, unit="image", disable=not sys.stderr.isatty(), leave=False):
            try:
                image = read_image(path)
            except InputError as error:
                tqdm.tqdm.write(f"error: {error}", file=sys.stderr)
                self.unreadable += 1
            else:
                yield path, image


def _classify(
    infer: Any, images: Images, arguments: argparse.Namespace, output: Path | None, predictions: list[dict[str, Any]]
) -> None:
    """Prints a line for each image and adds to `predictions`; `predictions.png` shows the first ones."""
    from msvmamba_jax.pictures import prediction_sheet

    top = min(arguments.top, len(infer.class_names))
    batch_size = min(arguments.batch_size, len(images))
    thumbnails: list[np.ndarray] = []
    read: list[tuple[Path, np.ndarray]] = []

    def predict() -> None:
        # A last, smaller batch is filled up rather than compiled for.
        crops = np.stack([crop for _, crop in read])
        batch = np.concatenate([crops, np.zeros((batch_size - len(read), *crops.shape[1:]), np.uint8)])
        for (path, _), row in zip(read, np.asarray(infer(batch)["probabilities"]), strict=False):
            if not np.isfinite(row).all():
                raise InputError(f"the model's probabilities for {path} are not finite: try --dtype float32")
            labels = np.argsort(-row, kind="stable")[:top]
            classes = [{"label": int(i), "name": infer.class_names[i], "probability": float(row[i])} for i in labels]
            predictions.append({"file": str(path), "classes": classes})
            _say(path, ", ".join(f"{c['name']} {c['probability']:.1%}" for c in classes))
        thumbnails.extend(crops[: _MAX_THUMBNAILS - len(thumbnails)])
        read.clear()

    for path, image in images:
        read.append((path, infer.preprocessing.crop(image)))
        if len(read) == batch_size:
            predict()
    if read:
        predict()
    if output is not None and predictions:
        _save(prediction_sheet(thumbnails, predictions[: len(thumbnails)]), output / "predictions.png")


def _segment(
    infer: Any, images: Images, arguments: argparse.Namespace, output: Path | None, predictions: list[dict[str, Any]]
) -> None:
    """Prints a line for each image, adds to `predictions`, and saves its overlay and its label map."""
    from PIL import Image

    from msvmamba_jax.pictures_segmentation import class_palette, segmentation_overlay

    names = infer.class_names
    palette = class_palette(names)
    taken: set[str] = set()
    for path, image in images:
        labels = np.asarray(infer(image[None])["labels"])[0]
        counts = np.bincount(labels.ravel(), minlength=len(names))
        largest = [int(i) for i in np.argsort(-counts, kind="stable")[: arguments.top] if counts[i]]
        classes = [{"label": i, "name": names[i], "part": counts[i] / labels.size} for i in largest]
        prediction: dict[str, Any] = {"file": str(path), "classes": classes}
        _say(path, ", ".join(f"{c['name']} {c['part']:.1%}" for c in classes))
        if output is not None:
            stem = _free_name(path.stem, taken)
            label_map = Image.fromarray(labels.astype(np.uint8), "P")
            label_map.putpalette(palette.tobytes())
            for kind, picture in (
                ("overlay", segmentation_overlay(image, labels, names, palette)),
                ("labels", label_map),
            ):
                prediction[kind] = f"{stem}_{kind}.png"
                _save(picture, output / prediction[kind])
        predictions.append(prediction)


def _detect(
    infer: Any, images: Images, arguments: argparse.Namespace, output: Path | None, predictions: list[dict[str, Any]]
) -> None:
    """Prints a line for each image, adds boxes and run-length masks to `predictions`, and saves it with its objects."""
    from msvmamba_jax.data.run_lengths import run_lengths
    from msvmamba_jax.models.detection.masks import paste_masks
    from msvmamba_jax.pictures_detection import detection_picture

    names = infer.class_names
    taken: set[str] = set()
    for path, image in images:
        found = {name: np.asarray(array)[0] for name, array in infer(image[None]).items()}
        kept = found["valid"] & (found["scores"] >= arguments.threshold)
        boxes, labels, scores = (found[name][kept] for name in ("boxes", "labels", "scores"))
        masks = paste_masks(found["masks"][kept], boxes, *image.shape[:2])
        objects = [
            {
                "label": int(label),
                "name": names[label],
                "score": float(score),
                "box": [float(x) for x in box],
                "mask": {"size": list(image.shape[:2]), "counts": run_lengths(mask)},
            }
            for label, score, box, mask in zip(labels, scores, boxes, masks, strict=True)
        ]
        prediction: dict[str, Any] = {"file": str(path), "objects": objects}
        shown = [f"{entry['name']} {entry['score']:.1%}" for entry in objects[: arguments.top]]
        more = f", {len(objects) - len(shown)} more" if len(objects) > len(shown) else ""
        _say(path, f"{', '.join(shown)}{more}" if shown else "nothing found")
        if output is not None:
            prediction["picture"] = f"{_free_name(path.stem, taken)}_objects.png"
            picture = detection_picture(image, boxes, masks, labels, scores, names, threshold=arguments.threshold)
            _save(picture, output / prediction["picture"])
        predictions.append(prediction)


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it where another file had it."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def _say(path: Path, line: str) -> None:
    import tqdm

    tqdm.tqdm.write(f"{path}: {line}")


def _save(picture: Any, path: Path) -> None:
    with writing(path):
        picture.save(path)


if __name__ == "__main__":
    sys.exit(command.run(_main))
