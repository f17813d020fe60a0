"""Classify images.

python -m msvmamba_jax.predict ckpt/tiny photo.jpg holiday/ --output out/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from msvmamba_jax import command


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m msvmamba_jax.predict",
        description="Classify images: JPEG, PNG and other formats, of any size and colour mode. Prints the most "
        "probable classes of each; with --output also writes predictions.json and a picture, predictions.png.",
    )
    parser.add_argument("checkpoint", help="a checkpoint folder, or the workdir of a training run")
    parser.add_argument("images", nargs="+", help="image files, or folders to search")
    parser.add_argument("--output", metavar="DIR", help="folder for predictions.json and predictions.png")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show for each image (default: 5)")
    parser.add_argument("--weights", choices=["ema", "raw"], help="averaged or raw weights (default: averaged, if any)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    arguments = parser.parse_args()

    import tqdm

    from msvmamba_jax.data.images import find_images, read_image
    from msvmamba_jax.errors import InputError
    from msvmamba_jax.inference import inference_function
    from msvmamba_jax.pictures import prediction_sheet

    for name in ("top", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(arguments, name)}")
    if arguments.output and Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise InputError(f"--output {arguments.output} is a file: give a folder")
    paths = find_images(arguments.images)
    infer = inference_function(arguments.checkpoint, resize=False, weights=arguments.weights, dtype=arguments.dtype)
    top = min(arguments.top, len(infer.class_names))

    predictions: list[dict[str, Any]] = []
    thumbnails: list[np.ndarray] = []
    unreadable = 0
    progress = tqdm.tqdm(total=len(paths), unit="image", disable=not sys.stderr.isatty(), leave=False)
    for start in range(0, len(paths), arguments.batch_size):
        read, crops = [], []
        for path in paths[start : start + arguments.batch_size]:
            try:
                crop = infer.preprocessing.crop(read_image(path))
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                unreadable += 1
            else:
                read.append(path)
                crops.append(crop)
            progress.update(1)
        if not crops:
            continue
        # A last, smaller batch is filled up rather than compiled for.
        missing = min(arguments.batch_size, len(paths)) - len(crops)
        batch = np.concatenate([np.stack(crops), np.zeros((missing, *crops[0].shape), np.uint8)])
        probabilities = np.asarray(infer(batch)["probabilities"])[: len(crops)]
        for path, row in zip(read, probabilities, strict=True):
            labels = np.argsort(-row, kind="stable")[:top]
            classes = [{"label": int(i), "name": infer.class_names[i], "probability": float(row[i])} for i in labels]
            predictions.append({"file": str(path), "classes": classes})
            line = ", ".join(f"{c['name']} {c['probability']:.1%}" for c in classes)
            tqdm.tqdm.write(f"{path}: {line}")
        thumbnails.extend(crops[: _MAX_THUMBNAILS - len(thumbnails)])
    progress.close()

    if arguments.output and predictions:
        output = Path(arguments.output)
        sheet = prediction_sheet(thumbnails, predictions[: len(thumbnails)])
        try:
            output.mkdir(parents=True, exist_ok=True)
            sheet.save(output / "predictions.png")
        except OSError as error:
            raise InputError(f"cannot write {output / 'predictions.png'}: {error.strerror or error}") from error
        command.write_json(output / "predictions.json", predictions)
        print(f"wrote {output / 'predictions.json'} and {output / 'predictions.png'}")
    return 1 if unreadable else 0


_MAX_THUMBNAILS = 60  # on the picture; predictions.json has them all


if __name__ == "__main__":
    sys.exit(command.run(_main))
