"""Conversion of mmsegmentation's checkpoints, with all that mmengine puts beside the weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_writer
from torch_writer import Global, Instance

from msvmamba_jax.checkpoint import load_checkpoint, load_model
from msvmamba_jax.convert.checkpoint import _recognise, convert, convert_file
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.data.ade20k import ade20k_class_names
from msvmamba_jax.data.segmentation_preprocessing import SegmentationPreprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, count, flatten, get_parameters, get_weights
from msvmamba_jax.models.segmenter import Segmenter
from msvmamba_jax.models.variants import VARIANTS, create_segmenter

MODEL = {
    "name": "msvmamba_nano",
    "num_classes": 10,
    "channels": 12,
    "auxiliary_channels": 6,
    "width": 16,
    "depths": (1, 1, 1, 1),
    "states": 1,
}


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return abstract_model(lambda: create_segmenter(**MODEL, rngs=SHAPE_KEYS))


@pytest.fixture(scope="module")
def original(parity, segmenter) -> dict[str, np.ndarray]:
    """A small state dict; the tests copy before they change anything."""
    weights = dict(flatten(get_weights(segmenter)))
    zeros = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in weights.items()}
    shapes = {name: x.shape for name, x in to_original(zeros, "multi_scale", "segmentation").items()}
    counters = [name.replace("running_var", "num_batches_tracked") for name in shapes if name.endswith("running_var")]
    assert len(counters) == 13
    return parity.weights.state_dict(shapes | dict.fromkeys(counters, ()))


@pytest.fixture
def state(original) -> dict[str, np.ndarray]:
    return dict(original)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "iter_160000.pth"


def numpy_bytes(content: bytes) -> Instance:
    """As protocol 2 writes bytes."""
    return Instance(Global("_codecs", "encode"), (content.decode("latin1"), "latin1"))


def numpy_dtype(kind: str) -> Instance:
    return Instance(Global("numpy", "dtype"), (kind, False, True), state=(3, "<", None, None, None, -1, -1, 0))


def mmengine_checkpoint(state: dict[str, np.ndarray]) -> dict:
    """What mmengine's runner saves: weights among objects of many classes, none of which we have."""
    scalar = Instance(
        Global("numpy.core.multiarray", "scalar"), (numpy_dtype("f8"), numpy_bytes(np.float64(45.6).tobytes()))
    )
    empty = Instance(
        Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), numpy_bytes(b"b"))
    )
    empty.state = (1, (2,), numpy_dtype("f8"), False, numpy_bytes(np.float64([1, 2]).tobytes()))
    history = Instance(
        Global("mmengine.logging.history_buffer", "HistoryBuffer"),
        new=True,
        state={
            "_max_length": 1000000,
            "_log_history": empty,
            "_statistics_methods": {"mean": Global("mmengine.logging.history_buffer", "mean")},
        },
    )
    weights = OrderedDict(state)
    weights._metadata = OrderedDict({"": {"version": 1}, "backbone": {"version": 1}})
    adam = {"step": np.float32(3), "exp_avg": np.ones((4, 5), np.float32), "exp_avg_sq": np.ones(5, np.float32)}
    return {
        "meta": {
            "epoch": 0,
            "iter": 160000,
            "cfg": "model = dict(type='EncoderDecoder')\n",
            "time": Instance(
                Global("datetime", "datetime"), (numpy_bytes(b"\x07\xe8\x05\x17\x00\x00\x00\x00\x00\x00"),)
            ),
            "dataset_meta": {"classes": ("wall", "building"), "palette": [[120, 120, 120], [180, 120, 120]]},
            "seed": Instance(Global("builtins", "set"), ([1, 2],)),
            "mIoU": scalar,
        },
        "state_dict": weights,
        "message_hub": {
            "log_scalars": {"train/loss": history, 3: history},
            "runtime_info": OrderedDict({"cfg": Instance(Global("mmengine.config.config", "Config"), new=True)}),
            "resumed_keys": {},
        },
        "optimizer": {"state": {0: adam, 1: adam}, "param_groups": [{"lr": 6e-5, "params": [0, 1]}]},
        "param_schedulers": [{"start_factor": 1e-6, "_global_step": 1500, "last_step": scalar}],
    }


def check(found: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> None:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        convert_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def with_old_names(state):
    renamed = (
        (".op.", ".self_attention."),
        ("patch_embed.0", "patch_embed.proj"),
        ("patch_embed.2", "patch_embed.norm"),
    )
    olds = dict(state)
    for new, old in renamed:
        olds = {name.replace(new, old): tensor for name, tensor in olds.items()}
    assert len(olds.keys() - state.keys()) > 40
    return olds


@pytest.mark.parametrize(
    "form", [mmengine_checkpoint, OrderedDict, lambda state: mmengine_checkpoint(with_old_names(state))]
)
def test_every_weight_is_taken_to_the_bit(path, state, segmenter, form):
    torch_writer.write(path, form(state))
    conversion = convert_file(path)
    assert conversion.description.task == "segmentation"
    assert conversion.description.model == MODEL
    assert conversion.weights == conversion.description.source["weights"] == "raw"
    assert conversion.size == count(get_parameters(segmenter))
    assert conversion.description.preprocessing == SegmentationPreprocessing()
    check(to_original(dict(flatten(conversion.parameters)), "multi_scale", "segmentation"), state)


def test_the_folder_loads_as_the_same_model(tmp_path, path, state):
    torch_writer.write(path, mmengine_checkpoint(state))
    conversion = convert(path, tmp_path / "ckpt")
    description, weights = load_checkpoint(tmp_path / "ckpt")
    assert description == conversion.description
    check(to_original(dict(flatten(weights)), "multi_scale", "segmentation"), state)
    model = load_model(tmp_path / "ckpt")
    assert isinstance(model, Segmenter)
    shape = jax.eval_shape(model, np.zeros((1, 40, 48, 3), np.float32))
    assert shape.shape == (1, 10, 12, 10)
    found = dict(flatten(get_weights(model)))
    np.testing.assert_array_equal(
        found["decode_head.fusion.bn.var"], state["decode_head.fpn_bottleneck.bn.running_var"]
    )


@pytest.mark.parametrize("variant", ["nano", "micro", "tiny"])
def test_recognises_the_recorded_manifests(parity, variant):
    manifest = parity.json(f"segmentation/{variant}.json")["manifest"]
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in manifest.items()}
    name = f"msvmamba_{variant}"
    model = {"name": name, "num_classes": 150, "channels": 512, "auxiliary_channels": 256}
    assert _recognise(state) == ("segmentation", model, VARIANTS[name].backbone.mixer)


def test_the_whole_nano(path, parity):
    state = parity.state_dict("segmentation/nano.json")
    torch_writer.write(path, mmengine_checkpoint(state))
    conversion = convert_file(path)
    assert conversion.description.class_names == ade20k_class_names()
    assert conversion.size == parity.json("segmentation/nano.json")["params"]
    check(to_original(dict(flatten(conversion.parameters)), "multi_scale", "segmentation"), state)


def test_other_classes_are_numbered(path, state):
    torch_writer.write(path, state)
    assert convert_file(path).description.class_names == tuple(f"class {i}" for i in range(10))


def test_every_misfit_is_named(path, state):
    del state["decode_head.bottleneck.bn.running_mean"]
    state["auxiliary_head.convs.1.conv.weight"] = state["auxiliary_head.convs.0.conv.weight"]
    state["decode_head.fpn_convs.2.bn.weight"] = np.ones(3, np.float32)
    state["backbone.outnorm1.bias"] = np.full(32, np.nan, np.float32)
    state["backbone.classifier.num_batches_tracked"] = np.int64(1)
    torch_writer.write(path, mmengine_checkpoint(state))
    message = error_of(path)
    assert "decode_head.bottleneck.bn.running_mean is missing" in message
    assert "auxiliary_head.convs.1.conv.weight is unknown" in message
    assert "decode_head.fpn_convs.2.bn.weight has shape (3,) instead of (12,)" in message
    assert "not finite in backbone.outnorm1.bias" in message
    assert "backbone.classifier.num_batches_tracked is unknown" in message


@pytest.mark.parametrize("name", ["decode_head.conv_seg.weight", "auxiliary_head.conv_seg.weight"])
def test_a_head_without_a_classifier(path, state, name):
    del state[name]
    torch_writer.write(path, mmengine_checkpoint(state))
    assert f"it has no classifier ({name})" in error_of(path)


def test_another_backbone(path, state):
    others = {name.replace("backbone.", "encoder."): tensor for name, tensor in state.items()}
    torch_writer.write(path, mmengine_checkpoint(others))
    assert "it is no MSVMamba or VMamba model (no backbone.patch_embed.0.weight" in error_of(path)
