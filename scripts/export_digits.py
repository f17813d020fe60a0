"""Write held-out digits as PNG files, to try `predict` on.

python scripts/export_digits.py FOLDER [COUNT]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from msvmamba_jax.data.digits import CLASS_NAMES, load_digits


def main() -> None:
    """The command."""
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 20
    folder.mkdir(parents=True, exist_ok=True)
    _, evaluation = load_digits()
    by_class: list[list[int]] = [[] for _ in CLASS_NAMES]
    for index in range(len(evaluation)):
        by_class[evaluation[index]["label"]].append(index)
    one_of_each = [index for same_rank in zip(*by_class, strict=True) for index in same_rank]
    for number, index in enumerate(one_of_each[:count]):
        record = evaluation[index]
        Image.fromarray(record["image"]).save(folder / f"{number:02d}_is_{record['label']}.png")


if __name__ == "__main__":
    main()
