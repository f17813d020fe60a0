"""Convert a released PyTorch checkpoint.

    python -m msvmamba_jax.convert vssm_tiny.pth ckpt/tiny

PyTorch is not needed, and nothing that the file contains is executed.
"""

from __future__ import annotations

import argparse
import sys

from msvmamba_jax import command


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m msvmamba_jax.convert",
        description="Convert a released PyTorch checkpoint (.pth or .safetensors) to this package's format. PyTorch is "
        "not needed, and nothing that the file contains is executed.",
    )
    parser.add_argument("file", help="the released file")
    parser.add_argument("output", help="folder to make")
    parser.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="take the averaged or the raw weights; by default the averaged ones where the file has any",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint folder")
    arguments = parser.parse_args()

    from msvmamba_jax.convert.checkpoint import convert

    conversion = convert(arguments.file, arguments.output, weights=arguments.weights, overwrite=arguments.overwrite)
    description = conversion.description
    kind = "averaged" if conversion.weights == "ema" else "raw"
    options = ", ".join(f"{k} {v}" for k, v in description.model.items() if k != "name")
    print(
        f"{arguments.output}: {description.model['name']} ({options}), {kind} weights, "
        f"{conversion.size:,} parameters, from {description.source['file']}"
    )


if __name__ == "__main__":
    sys.exit(command.run(_main))
