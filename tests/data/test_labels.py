"""The ImageNet class names are complete, distinct and in the standard order."""

from __future__ import annotations

from pathlib import Path

from msvmamba_jax.data.labels import imagenet_class_names, readable_class_names


def test_a_thousand_distinct_names() -> None:
    names = imagenet_class_names()
    assert len(names) == 1000
    assert all(name and name == name.strip() for name in names)
    assert len(set(names)) == 1000


def test_well_known_positions() -> None:
    known = {
        0: "tench",
        1: "goldfish",
        134: "crane bird",
        207: "golden retriever",
        281: "tabby",
        517: "crane",
        638: "maillot",
        639: "maillot tank suit",
        817: "sports car",
        954: "banana",
        999: "toilet tissue",
    }
    names = imagenet_class_names()
    assert {index: names[index] for index in known} == known


def test_wordnet_identifiers_become_names() -> None:
    # The sorted identifiers of ImageNet-1k, as timm 1.0.31 lists them.
    identifiers = (Path(__file__).parent / "imagenet_wordnet_ids.txt").read_text().split()
    assert readable_class_names(identifiers) == imagenet_class_names()
    for others in (identifiers[:100], identifiers[::-1], [*identifiers[:-1], "n99999999"], ["a", "b"], []):
        assert readable_class_names(others) == tuple(others)
