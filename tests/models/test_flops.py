"""Multiply-adds agree with the original's own counter (tests/parity/counts.json)."""

from __future__ import annotations

import pytest

from msvmamba_jax.models.flops import (
    Flops,
    backbone_flops,
    classifier_flops,
    detector_flops,
    linear,
    out_norms_flops,
    segmenter_flops,
    stage_sizes,
)
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, count, get_parameters
from msvmamba_jax.models.variants import VARIANTS, backbone_config, create_detector, create_segmenter

OUR_NAME = {
    "PythonOp.SelectiveScan": "scan",
    "upsample_bilinear2d": "upsample",
    "upsample_nearest2d": "upsample_nearest",
}
TASK_SIZES = {"segmentation": (512, 2048), "detection": (1280, 800)}
variants = pytest.mark.parametrize("variant", ["nano", "micro", "tiny"])


@pytest.fixture(scope="module")
def counts(parity):
    return parity.json("counts.json")


@variants
def test_classifier(counts, variant):
    reference = counts["classification"][variant]
    flops = classifier_flops(VARIANTS[f"msvmamba_{variant}"].backbone, 1000, 224, 224)
    assert flops.by_operator == {OUR_NAME.get(name, name): n for name, n in reference["by_operator"].items()}
    assert flops.total == reference["flops"]
    assert flops.einsum_exact == reference["einsum_exact"]
    assert flops.total_with_exact_einsum == reference["flops_with_exact_einsum"]


@variants
def test_segmenter(counts, variant):
    reference = counts["segmentation"][variant]
    flops = segmenter_flops(VARIANTS[f"msvmamba_{variant}"].backbone, 150, *TASK_SIZES["segmentation"])
    assert flops.by_operator == {OUR_NAME.get(name, name): n for name, n in reference["by_operator"].items()}
    assert flops.total == reference["flops"]
    assert flops.total_with_exact_einsum == reference["flops_with_exact_einsum"]
    model = abstract_model(lambda: create_segmenter(f"msvmamba_{variant}", rngs=SHAPE_KEYS))
    assert count(get_parameters(model)) == reference["params"]


@variants
def test_detector(counts, variant):
    reference = counts["detection"][variant]
    config = VARIANTS[f"msvmamba_{variant}"].backbone
    flops = detector_flops(config, 80, *TASK_SIZES["detection"])
    assert flops.by_operator == {OUR_NAME.get(name, name): n for name, n in reference["by_operator"].items()}
    assert flops.total == reference["flops"]
    assert flops.total_with_exact_einsum == reference["flops_with_exact_einsum"]
    if "flops_with_100_proposals" in reference:
        fewer = detector_flops(config, 80, *TASK_SIZES["detection"], proposals=100)
        assert fewer.total == reference["flops_with_100_proposals"]
    model = abstract_model(lambda: create_detector(f"msvmamba_{variant}", rngs=SHAPE_KEYS))
    assert count(get_parameters(model)) == reference["params"]


def test_segmenter_by_hand():
    """4 x 36 pixels: maps of 1 x 9, 1 x 5, 1 x 3 and 1 x 2 positions; widths 8 to 64; 4 channels, 3 classes."""
    config = backbone_config("vssm_tiny", width=8, depths=(1, 1, 1, 1), states=2)
    head = segmenter_flops(config, 3, 4, 36, channels=4).by_operator
    backbone = backbone_flops(config, 4, 36).by_operator
    cells, positions, widths = 1 + 4 + 9 + 36, (9, 5, 3, 2), (8, 16, 32, 64)
    assert {name: n - backbone.get(name, 0) for name, n in head.items() if n != backbone.get(name)} == {
        "layer_norm": 5 * sum(p * c for p, c in zip(positions, widths, strict=True)),
        "adaptive_avg_pool2d": 4 * 2 * 64,
        "conv": cells * 64 * 4
        + 2 * 9 * (64 + 16) * 4
        + sum(p * (c * 4 + 9 * 4 * 4) for p, c in zip(positions[:3], widths[:3], strict=True))
        + 9 * 9 * 16 * 4
        + 9 * 4 * 3,
        "batch_norm": 2 * 4 * (cells + 2 + 2 * (9 + 5 + 3) + 9),
        "upsample": 4 * 4 * (4 * 2 + 9 + 5 + 3 + 3 * 9),
    }


@variants
@pytest.mark.parametrize("task", TASK_SIZES)
def test_backbone_at_the_sizes_of_other_tasks(counts, task, variant):
    reference = counts[task][variant]
    flops = backbone_flops(VARIANTS[f"msvmamba_{variant}"].backbone, *TASK_SIZES[task])
    modules = reference["by_module"]
    assert flops.total == modules["backbone.patch_embed"] + modules["backbone.layers"]
    norms = out_norms_flops(VARIANTS[f"msvmamba_{variant}"].backbone, *TASK_SIZES[task])
    assert norms.total == sum(modules[f"backbone.outnorm{stage}"] for stage in range(4))
    assert (flops + norms).total == modules["backbone"]
    assert flops.by_operator["einsum"] == reference["by_operator"]["einsum"]
    assert flops.by_operator["scan"] == reference["by_operator"]["PythonOp.SelectiveScan"]
    assert flops.einsum_exact == reference["einsum_exact"]


def test_cross_scan_by_hand():
    """One block in each stage on 32 x 32 pixels: maps of 64, 16, 4 and 1 positions; widths 8 to 64; 2 states."""
    config = backbone_config("vssm_tiny", width=8, depths=(1, 1, 1, 1), states=2)
    flops = classifier_flops(config, 10, 32, 32)
    positions, widths = (64, 16, 4, 1), (8, 16, 32, 64)
    inner, ranks = (16, 32, 64, 128), (1, 1, 2, 4)
    stages = list(zip(positions, widths, inner, ranks, strict=True))
    assert flops.by_operator == {
        "conv": 3 * 16 * 8 * 64 + sum(9 * d * p for p, _, d, _ in stages),
        "linear": sum(6 * c * c * p for p, c, _, _ in stages)
        + sum(p * 4 * c * 2 * c for p, c in zip(positions[1:], widths[:3], strict=True))
        + 64 * 10,
        "layer_norm": 5
        * (
            64 * 8
            + sum(p * (c + d) for p, c, d, _ in stages)
            + sum(p * 4 * c for p, c in zip(positions[1:], widths[:3], strict=True))
            + 64
        ),
        "scan": 4 * sum(19 * p * d for p, _, d, _ in stages),
        "einsum": flops.einsum_exact,  # small numbers are not rounded
        "adaptive_avg_pool2d": 64,
    }
    assert flops.einsum_exact == 4 * sum(p * d * (2 * r + 4) for p, _, d, r in stages)


def test_odd_sizes_round_up():
    assert stage_sizes(135, 67) == [(33, 16), (17, 8), (9, 4), (5, 2)]
    assert stage_sizes(800, 1333) == [(200, 333), (100, 167), (50, 84), (25, 42)]


def test_flops_add_up():
    total = linear(2, 3, 4) + Flops({"linear": 1, "einsum": 10}, einsum_exact=11)
    assert total == Flops({"linear": 25, "einsum": 10}, einsum_exact=11)
    assert (total.total, total.total_with_exact_einsum) == (35, 36)
    assert Flops() + total == total
