"""Prepare ADE20K's scene parsing benchmark as ArrayRecord files, for TensorFlow Datasets.

The result holds the files as they are, in few large ones that are fast to read over a network. Not needed where the
folder ADEChallengeData2016 lies on a disk: training reads that as it is. Needs pip install 'msvmamba_jax[data,tfds]'.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from msvmamba_jax.errors import InputError


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/prepare_ade20k.py ADEChallengeData2016.zip datasets/tfds",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="ADEChallengeData2016.zip, or the folder in it")
    parser.add_argument("data_dir", type=Path, help="where to prepare it")
    arguments = parser.parse_args()
    try:
        from msvmamba_jax.data.tfds_ade20k import prepare
    except ImportError:
        sys.exit("error: this needs TensorFlow Datasets: pip install 'msvmamba_jax[data,tfds]'.")
    try:
        print(prepare(arguments.source, arguments.data_dir))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
