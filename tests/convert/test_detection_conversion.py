"""Conversion of mmdetection's checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch_writer

from msvmamba_jax.checkpoint import load_checkpoint, load_model
from msvmamba_jax.convert.checkpoint import convert, convert_file
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.data.detection_preprocessing import DetectionPreprocessing
from msvmamba_jax.data.labels import coco_class_names
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detector import Detector
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, flatten, get_weights
from msvmamba_jax.models.variants import create_detector

MODEL = {
    "name": "msvmamba_nano",
    "num_classes": 7,
    "channels": 12,
    "hidden": 10,
    "width": 16,
    "depths": (1, 1, 1, 1),
    "states": 1,
}


@pytest.fixture(scope="module")
def original(parity):
    """A small state dict under mmdetection's names."""
    weights = flatten(get_weights(abstract_model(lambda: create_detector(**MODEL, rngs=SHAPE_KEYS))))
    zeros = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in weights}
    return parity.weights.state_dict({n: x.shape for n, x in to_original(zeros, "multi_scale", "detection").items()})


def test_conversion(tmp_path, original):
    torch_writer.write(tmp_path / "epoch_12.pth", {"meta": {"epoch": 12}, "state_dict": original})
    conversion = convert(tmp_path / "epoch_12.pth", tmp_path / "out")
    description, weights = load_checkpoint(tmp_path / "out")
    assert description == conversion.description
    assert (description.task, dict(description.model)) == ("detection", MODEL)
    assert description.preprocessing == DetectionPreprocessing()
    assert description.class_names[:2] == ("class 0", "class 1")
    back = to_original(dict(flatten(weights)), "multi_scale", "detection")
    assert back.keys() == original.keys()
    assert all(back[name].tobytes() == original[name].tobytes() for name in back)
    assert isinstance(load_model(tmp_path / "out"), Detector)


def test_the_whole_nano(tmp_path, parity):
    state = parity.state_dict("detection/nano.json")
    torch_writer.write(tmp_path / "nano.pth", {"state_dict": state})
    description = convert_file(tmp_path / "nano.pth").description
    assert dict(description.model) == {"name": "msvmamba_nano", "num_classes": 80, "channels": 256, "hidden": 1024}
    assert description.class_names == coco_class_names()
    assert (description.class_names[0], description.class_names[-1]) == ("person", "toothbrush")
    assert len(set(description.class_names)) == 80


def test_a_missing_tensor_is_named(tmp_path, original):
    state = {name: tensor for name, tensor in original.items() if name != "neck.fpn_convs.2.conv.bias"}
    torch_writer.write(tmp_path / "cut.pth", {"state_dict": state})
    with pytest.raises(InputError, match=r"neck\.fpn_convs\.2\.conv\.bias is missing"):
        convert_file(tmp_path / "cut.pth")
