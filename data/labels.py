"""The class names of ImageNet-1k.

``imagenet_classes.txt`` holds one name a line, in the order of the class indices (the sorted WordNet identifiers). It
was taken from torchvision 0.29.1, ``torchvision/models/_meta.py`` (BSD 3-Clause licence, Copyright (c) Soumith Chintala
2016); its order was checked against the synsets and lemmas that timm 1.0.31 ships. In WordNet two classes are called
"crane" and two "maillot"; here they are "crane bird" (134) and "crane" (517), "maillot" (638) and "maillot tank suit"
(639). "Cardigan" (264) is the dog, "cardigan" (474) the garment.
"""

from __future__ import annotations

import functools
import importlib.resources


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 English names of the ImageNet-1k classes; the position is the class index, and no name occurs twice."""
    # The path starts at the package that is installed under this name, however this module was reached.
    text = importlib.resources.files("msvmamba_jax.data").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())
