"""A table of all models.

python -m msvmamba_jax.summary --size 512x2048
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from msvmamba_jax import command


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m msvmamba_jax.summary",
        description="List all models: parameters, multiply-adds, the shapes of the four stages, and the ImageNet-1k "
        "top-1 accuracy that the original's authors report (theirs, not measured here).",
    )
    parser.add_argument("--size", default="224", help="image size: pixels, or HEIGHTxWIDTH (default: 224)")
    parser.add_argument("--json", metavar="FILE", help="also write the table to this file")
    arguments = parser.parse_args()

    from msvmamba_jax.errors import InputError
    from msvmamba_jax.models.flops import classifier_flops, stage_sizes
    from msvmamba_jax.models.parameters import SHAPE_KEYS, Tree, abstract_model, count, get_parameters
    from msvmamba_jax.models.variants import VARIANTS, create_model

    try:
        sides = [int(side) for side in arguments.size.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise InputError(f"--size must be like 224 or 512x2048; got {arguments.size!r}") from None
    if min(height, width) < 4:
        raise InputError(f"--size must be at least 4 pixels; got {arguments.size!r}")

    def parameters_of(name: str) -> Tree:
        return get_parameters(abstract_model(lambda: create_model(name, rngs=SHAPE_KEYS)))

    rows: list[dict[str, Any]] = []
    for name, variant in VARIANTS.items():
        config = variant.backbone
        maps = [[h, w, c] for (h, w), c in zip(stage_sizes(height, width), config.widths, strict=True)]
        rows.append(
            {
                "model": name,
                "parameters": count(parameters_of(name)),
                "multiply_adds": classifier_flops(config, 1000, height, width).total,
                "features": maps,
                "reported_top1": variant.reported_top1,
            }
        )
    print(f"{'model':<16}{'parameters':>12}{'multiply-adds':>18}{'top-1':>8}  features at {height} x {width}")
    for row in rows:
        features = "  ".join("x".join(map(str, shape)) for shape in row["features"])
        top1 = f"{row['reported_top1']}*" if row["reported_top1"] else "-"
        print(f"{row['model']:<16}{row['parameters']:>12,}{row['multiply_adds']:>18,}{top1:>8}  {features}")
    print("* ImageNet-1k accuracy in per cent at 224 x 224 as reported by the authors of MSVMamba, not measured here")
    if arguments.json:
        command.write_json(arguments.json, {"height": height, "width": width, "models": rows})


if __name__ == "__main__":
    sys.exit(command.run(_main))
