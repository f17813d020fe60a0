"""Prepare COCO's instances as ArrayRecord files, for TensorFlow Datasets; or an own data set in COCO's form.

The result holds the image files as they are and their annotations, in few large files that are fast to read over a
network. Not needed where the images lie on a disk: training reads those as they are. Needs
pip install 'msvmamba_jax[data,tfds]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msvmamba_jax.data.coco import FILES
from msvmamba_jax.errors import InputError


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/prepare_coco.py datasets/coco datasets/tfds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the folder with the images and annotations")
    parser.add_argument("data_dir", type=Path, help="where to prepare it")
    for name, default in FILES.items():
        parser.add_argument(f"--{name}", default=default, help=f"in the source (default: {default})", metavar="PATH")
    arguments = vars(parser.parse_args())
    try:
        from msvmamba_jax.data.tfds_coco import prepare
    except ImportError:
        sys.exit("error: this needs TensorFlow Datasets: pip install 'msvmamba_jax[data,tfds]'.")
    try:
        print(prepare(**arguments))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
