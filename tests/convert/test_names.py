"""The tables of names: every rule is used, none is used twice, and the way back gives the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from msvmamba_jax.convert.names import current_name, has_counterpart, rules, to_original, to_ours


@pytest.fixture(scope="module")
def original(parity) -> dict[str, np.ndarray]:
    return parity.state_dict("segmentation/nano.json")


def test_segmentation_round_trip_is_exact(original):
    back = to_original(to_ours(original, "multi_scale", "segmentation"), "multi_scale", "segmentation")
    counters = {name for name in original if name.endswith("num_batches_tracked")}
    assert len(counters) == 13
    assert back.keys() == original.keys() - counters
    assert not any(has_counterpart(name, "segmentation") for name in counters)
    for name, tensor in back.items():
        assert (tensor.shape, tensor.dtype) == (original[name].shape, original[name].dtype), name
        assert tensor.tobytes() == original[name].tobytes(), name


def test_every_rule_of_segmentation_is_used(original):
    for pattern, _, _ in rules("multi_scale", "segmentation"):
        assert any(pattern.fullmatch(name) for name in original), pattern.pattern


def test_every_rule_of_detection_is_used(parity):
    detector = parity.state_dict("detection/nano.json")
    for pattern, _, _ in rules("multi_scale", "detection"):
        assert any(pattern.fullmatch(name) for name in detector), pattern.pattern


def test_tasks_do_not_share_heads(original):
    with pytest.raises(KeyError, match=r"0 rules fit the tensor backbone\.patch_embed\.0\.weight"):
        to_ours(original, "multi_scale")
    for name in ("classifier.head.weight", "patch_embed.0.weight", "backbone.classifier.head.weight"):
        with pytest.raises(KeyError, match="0 rules fit"):
            to_ours({name: np.zeros((1, 1))}, "multi_scale", "segmentation")
    assert has_counterpart("decode_head.bottleneck.bn.num_batches_tracked", "classification")


def test_old_names_in_models_of_any_task():
    for prefix in ("", "backbone."):
        assert current_name(f"{prefix}patch_embed.proj.weight") == f"{prefix}patch_embed.0.weight"
        assert current_name(f"{prefix}patch_embed.norm.bias") == f"{prefix}patch_embed.2.bias"
        assert current_name(f"{prefix}layers.1.blocks.0.ln_1.bias") == f"{prefix}layers.1.blocks.0.norm.bias"
        old, new = (f"{prefix}layers.1.blocks.10.{name}.Ds" for name in ("self_attention", "op"))
        assert current_name(old) == new
    assert current_name("head.weight") == "classifier.head.weight"
    assert current_name("backbone.outnorm0.weight") == "backbone.outnorm0.weight"
