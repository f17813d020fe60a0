"""The class names of ImageNet-1k and COCO.

``imagenet_classes.txt`` holds one name a line, in the order of the class indices (the sorted WordNet identifiers). It
was taken from torchvision 0.29.1, ``torchvision/models/_meta.py`` (BSD 3-Clause licence, Copyright (c) Soumith Chintala
2016); its order was checked against the synsets and lemmas that timm 1.0.31 ships. In WordNet two classes are called
"crane" and two "maillot"; here they are "crane bird" (134) and "crane" (517), "maillot" (638) and "maillot tank suit"
(639). "Cardigan" (264) is the dog, "cardigan" (474) the garment.

``coco_classes.txt`` holds the 80 names of COCO 2017's categories in the order of their ids (1 to 90, with gaps).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Sequence

# Of the 1000 WordNet identifiers in the order of the class indices, joined by line breaks.
_IMAGENET_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


@functools.cache
def imagenet_class_names() -> tuple[str, ...]:
    """The 1000 English names of the ImageNet-1k classes; the position is the class index, and no name occurs twice."""
    # The path starts at the package that is installed under this name, however this module was reached.
    text = importlib.resources.files("msvmamba_jax.data").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@functools.cache
def coco_class_names() -> tuple[str, ...]:
    """The 80 names of COCO's categories; the position is the label."""
    text = importlib.resources.files("msvmamba_jax.data").joinpath("coco_classes.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def placeholder_class_names(count: int) -> tuple[str, ...]:
    """What `count` classes are called where their names are not known: "class 0", "class 1", ..."""
    return tuple(f"class {index}" for index in range(count))


def readable_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """English names in place of ImageNet-1k's WordNet identifiers; every other list of names stays as it is.

    Only the whole list is replaced, recognised by its checksum: the identifiers of a subset stay, since their English
    names, which the whole set keeps apart by hand, are not stored by identifier.

    Args:
        names: the name of every label, such as the sorted names of the class folders.
    """
    if hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest() == _IMAGENET_SHA256:
        return imagenet_class_names()
    return tuple(names)
