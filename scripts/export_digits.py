"""Write held-out digits as PNG files, to try `predict` on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from msvmamba_jax import command
from msvmamba_jax.data.digits import CLASS_NAMES, load_digits
from msvmamba_jax.errors import writing


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write them; made if it is not there")
    parser.add_argument("count", type=int, nargs="?", default=20, help="how many (default: 20, two of each digit)")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("count must be at least 1")
    _, evaluation = load_digits()
    by_class: list[list[int]] = [[] for _ in CLASS_NAMES]
    for index in range(len(evaluation)):
        by_class[evaluation[index]["label"]].append(index)
    one_of_each = [index for same_rank in zip(*by_class, strict=True) for index in same_rank]
    with writing(arguments.folder):
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(one_of_each[: arguments.count]):
            record = evaluation[index]
            Image.fromarray(record["image"]).save(arguments.folder / f"{number:02d}_is_{record['label']}.png")


if __name__ == "__main__":
    sys.exit(command.run(main))
