"""Conversion as a whole: the right model with the right weights, or one sentence that names all that does not fit."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch_writer
from flax import nnx
from torch_writer import Global, Instance, Parameter

from msvmamba_jax.checkpoint import load_checkpoint, load_model
from msvmamba_jax.convert.checkpoint import _recognise, convert, convert_file
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.data.labels import imagenet_class_names
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import abstract_model, bind, flatten, get_parameters
from msvmamba_jax.models.variants import VARIANTS, create_model

MULTI_SCALE = {"name": "msvmamba_nano", "num_classes": 10, "width": 16, "depths": (1, 1, 1, 1), "states": 1}
CROSS_SCAN = {"name": "vssm_tiny", "num_classes": 10, "width": 16, "depths": (1, 1, 1, 1), "states": 4}
SMALL = {"multi_scale": MULTI_SCALE, "cross_scan": CROSS_SCAN}

OLD_NAMES = [
    ("patch_embed.0.", "patch_embed.proj."),
    ("patch_embed.2.", "patch_embed.norm."),
    ("classifier.norm.", "norm."),
    ("classifier.head.", "head."),
    (".op.", ".self_attention."),
]


@functools.cache
def abstract(mixer: str) -> nnx.Module:
    return abstract_model(lambda: create_model(**SMALL[mixer], rngs=nnx.Rngs(0)))


def shapes_of(model: nnx.Module, mixer: str) -> dict[str, tuple[int, ...]]:
    """The manifest of the original's state dict for `model`."""
    parameters = dict(flatten(get_parameters(model)))
    zeros = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in parameters.items()}
    return {name: tensor.shape for name, tensor in to_original(zeros, mixer).items()}


@pytest.fixture(scope="module")
def states(parity) -> dict[str, dict[str, np.ndarray]]:
    """Small state dicts by mixer; tests copy before they change anything."""
    return {mixer: parity.weights.state_dict(shapes_of(abstract(mixer), mixer)) for mixer in SMALL}


@pytest.fixture
def state(states) -> dict[str, np.ndarray]:
    return dict(states["multi_scale"])


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.pth"


def original(parameters, mixer: str = "multi_scale") -> dict[str, np.ndarray]:
    return to_original(dict(flatten(parameters)), mixer)


def assert_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


def error_of(path: Path, **options) -> str:
    """What `convert` says of a bad file: one sentence that names it; and nothing is written."""
    output = path.parent / "out"
    before = sorted(path.parent.iterdir())
    with pytest.raises(InputError) as caught:
        convert(path, output, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert sorted(path.parent.iterdir()) == before
    return message


# Which weights


def shifted(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor + np.float32(1) for name, tensor in state.items()}


def training_checkpoint(state: dict[str, np.ndarray]) -> dict:
    """What the original's training writes: both weights, the optimizer's state and a configuration object."""
    config = Instance(Global("yacs.config", "CfgNode"), new=True, items={"MODEL": {"TYPE": "vssm"}}, state={"x": True})
    return {
        "model": OrderedDict(state),
        "model_ema": OrderedDict(shifted(state)),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": np.ones(5, np.float32)}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"best": None},
        "max_accuracy": 77.3,
        "epoch": 299,
        "config": config,
    }


@pytest.mark.parametrize(("asked", "taken"), [(None, "ema"), ("ema", "ema"), ("raw", "raw")])
def test_training_checkpoint_holds_two_weights(path, state, asked, taken):
    torch_writer.write(path, training_checkpoint(state))
    conversion = convert_file(path, asked)
    assert conversion.weights == conversion.description.source["weights"] == taken
    assert_bits(original(conversion.parameters), shifted(state) if taken == "ema" else state)


def test_a_file_without_averaged_weights(path, state):
    torch_writer.write(path, {"model": OrderedDict(state), "epoch": 3})
    assert "has only raw weights: pass --weights raw" in error_of(path, weights="ema")
    assert convert_file(path).weights == "raw"


def test_a_file_without_raw_weights(path, state):
    torch_writer.write(path, {"model_ema": OrderedDict(state)})
    assert "has only averaged weights: pass --weights ema" in error_of(path, weights="raw")
    assert convert_file(path).weights == "ema"


# Forms of a state dict


def with_old_names(state):
    renamed = {}
    for name, tensor in state.items():
        for new, old in OLD_NAMES:
            name = name.replace(new, old) if name.startswith(new) or new == ".op." else name
        renamed[name.replace(".norm.", ".ln_1.") if ".blocks." in name and ".op." not in name else name] = tensor
    return renamed


FORMS = {
    "bare": OrderedDict,
    "parameters": lambda state: OrderedDict((name, Parameter(tensor)) for name, tensor in state.items()),
    "distributed": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "old names": lambda state: {"model": with_old_names(state)},
    "another order": lambda state: dict(reversed(state.items())),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixer", SMALL)
def test_round_trip_is_exact(path, states, mixer, form):
    state = states[mixer]
    torch_writer.write(path, FORMS[form](state))
    conversion = convert_file(path)
    assert conversion.description.model == SMALL[mixer]
    assert conversion.weights == "raw"
    assert_bits(original(conversion.parameters, mixer), state)


def test_the_old_names_are_old(state):
    """Or else the test above would show nothing."""
    old = with_old_names(state)
    for name in (
        "patch_embed.proj.weight",
        "patch_embed.norm.bias",
        "layers.3.blocks.0.ln_1.weight",
        "layers.0.blocks.0.self_attention.out_norm.weight",
        "layers.0.downsample.norm.weight",
        "norm.weight",
        "head.bias",
    ):
        assert name in old
    assert len(old) == len(state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path, state, prefix):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save({prefix + name: tensor for name, tensor in state.items()}))
    assert_bits(original(convert_file(path).parameters), state)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_become_float32(path, state, dtype):
    torch_writer.write(path, {name: tensor.astype(dtype) for name, tensor in state.items()})
    expected = {name: tensor.astype(dtype).astype(np.float32) for name, tensor in state.items()}
    assert_bits(original(convert_file(path).parameters), expected)


# Which model


@pytest.mark.parametrize("recorded", ["nano", "micro", "tiny", "vssm_tiny"])
def test_recognises_the_recorded_manifests(parity, recorded):
    name = recorded if recorded.startswith("vssm") else f"msvmamba_{recorded}"
    manifest = parity.json(f"classification/{recorded}.json")["manifest"]
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in manifest.items()}
    assert _recognise(state) == ("classification", {"name": name, "num_classes": 1000}, VARIANTS[name].backbone.mixer)


@pytest.mark.parametrize("name", ["msvmamba_nano", "msvmamba_micro", "msvmamba_tiny", "vssm_small", "vssm_base"])
def test_recognises_every_variant_with_any_number_of_classes(name):
    """From only those tensors that tell the variants apart."""
    config = VARIANTS[name].backbone
    shapes = {"patch_embed.0.weight": (config.width, 3, 4, 4), "classifier.head.weight": (21, config.widths[-1])}
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        for block in range(depth):
            routes = 2 if config.mixer == "multi_scale" else 4
            shapes[f"layers.{stage}.blocks.{block}.op.A_logs"] = (routes * 2 * width, config.states)
            if config.mixer == "multi_scale":
                shapes[f"layers.{stage}.blocks.{block}.op.conv2d_b1.weight"] = (2 * width, 1, 7, 7)
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    assert _recognise(state) == ("classification", {"name": name, "num_classes": 21}, config.mixer)


def test_every_variant_is_tested_above():
    assert set(VARIANTS) == {"msvmamba_nano", "msvmamba_micro", "msvmamba_tiny", "vssm_tiny", "vssm_small", "vssm_base"}


def test_the_whole_nano(path, parity):
    state = parity.state_dict("classification/nano.json")
    torch_writer.write(path, {"model": state})
    conversion = convert_file(path)
    description = conversion.description
    assert description.model == {"name": "msvmamba_nano", "num_classes": 1000}
    assert description.class_names == imagenet_class_names()
    assert_bits(original(conversion.parameters), state)


def renamed_as(name):
    return lambda state: {name if key == "patch_embed.0.weight" else key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda state: {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, "no MSVMamba or VMamba model"),
        (renamed_as("stem.weight"), "no MSVMamba or VMamba model"),
        (lambda state: {k: v for k, v in state.items() if not k.endswith("A_logs")}, "no MSVMamba or VMamba model"),
        (lambda state: {k: v for k, v in state.items() if not k.startswith("classifier")}, "has no classifier"),
        (lambda state: {k: v for k, v in state.items() if not k.startswith("layers.2")}, "depths must be 4 numbers"),
        (lambda state: state | {"layers.4.blocks.0.norm.weight": np.ones(3, np.float32)}, "more than 4 stages"),
        (
            lambda state: state | {"layers.0.blocks.9999.norm.weight": np.ones(3, np.float32)},
            "names 10003 blocks, but holds 4",
        ),
        (lambda state: state | {f"layers.0.blocks.{'9' * 5000}.norm": np.ones(3, np.float32)}, "is unknown"),
        (lambda state: state | {"patch_embed.0.weight": np.ones((17, 3, 4, 4), np.float32)}, "width must be"),
    ],
)
def test_files_of_other_models(path, state, change, part):
    torch_writer.write(path, change(state))
    assert part in error_of(path)


# Tensors that do not fit


def test_every_misfit_is_named(path, state):
    missing, renamed, reshaped, infinite = (
        "layers.1.blocks.0.op.se.fc.0.weight",
        "layers.2.downsample.norm.bias",
        "layers.0.blocks.0.op.in_proj.weight",
        "classifier.norm.bias",
    )
    del state[missing]
    state["layers.2.downsample.renamed.bias"] = state.pop(renamed)
    state[reshaped] = state[reshaped][:-1]
    state[infinite] = state[infinite].copy()
    state[infinite][0] = np.nan
    torch_writer.write(path, state)
    message = error_of(path)
    assert f"{missing} is missing" in message
    assert f"{renamed} is missing" in message
    assert "layers.2.downsample.renamed.bias is unknown" in message
    assert f"{reshaped} has shape (63, 16) instead of (64, 16)" in message
    assert f"not finite in {infinite}" in message


@pytest.mark.parametrize("mixer", SMALL)
def test_each_missing_tensor_is_noticed(path, states, mixer, monkeypatch):
    # the same model over and over; building it is what takes time
    monkeypatch.setattr("msvmamba_jax.convert.checkpoint.abstract_model", lambda build: abstract(mixer))
    for name in states[mixer]:
        torch_writer.write(path, {key: tensor for key, tensor in states[mixer].items() if key != name})
        with pytest.raises(InputError) as caught:
            convert_file(path)
        message = str(caught.value)
        if name.endswith(".A_logs"):  # the blocks are counted by them
            assert "it names 4 blocks, but holds 3" in message
        elif name in ("classifier.head.weight", "patch_embed.0.weight"):
            assert name in message
        else:
            assert f"the tensors do not fit the model: {name} is missing" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(path, state, value):
    name = "layers.3.blocks.0.op.Ds"
    state[name] = state[name].copy()
    state[name][-1] = value
    torch_writer.write(path, state)
    assert f"not finite in {name}" in error_of(path)


def test_a_value_that_float32_cannot_hold(path, state):
    name = "layers.3.blocks.0.op.Ds"
    state[name] = state[name].astype(np.float64) * 1e300
    torch_writer.write(path, state)
    assert f"not finite in {name}" in error_of(path)


def test_a_model_that_has_diverged(path, state):
    torch_writer.write(path, {name: np.full_like(tensor, np.nan) for name, tensor in state.items()})
    message = error_of(path)
    assert "not finite in patch_embed.0.weight" in message
    assert f"and {len(state) - 10} more" in message


@pytest.mark.parametrize("name", ["classifier.head.weight", "layers.1.blocks.0.norm.bias"])
def test_a_tensor_of_another_rank(path, state, name):
    state[name] = state[name][..., None]
    torch_writer.write(path, state)
    assert name in error_of(path)


def test_two_tensors_that_mean_the_same(path, state):
    state |= {"head.bias": state["classifier.head.bias"], "norm.weight": state["classifier.norm.weight"]}
    torch_writer.write(path, state)
    message = error_of(path)
    assert "classifier.head.bias and head.bias" in message
    assert "classifier.norm.weight and norm.weight" in message


# What is written


@pytest.fixture(scope="module")
def converted(states, tmp_path_factory):
    """The file, the folder and the conversion."""
    folder = tmp_path_factory.mktemp("converted")
    torch_writer.write(folder / "net.pth", {"model": OrderedDict(states["multi_scale"])})
    return folder / "net.pth", folder / "out", convert(folder / "net.pth", folder / "out")


def test_the_description_says_what_it_is(converted):
    path, output, conversion = converted
    description, _ = load_checkpoint(output)
    assert description == conversion.description
    stored = json.loads((output / "model" / "metadata").read_text())
    assert stored == {
        "format": 1,
        "task": "classification",
        "model": {**MULTI_SCALE, "depths": [1, 1, 1, 1]},
        "class_names": [f"class {index}" for index in range(10)],
        "preprocessing": Preprocessing().to_json(),
        "source": {"file": "net.pth", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "weights": "raw"},
    }


def test_what_is_written_is_what_was_read(converted, states):
    _, parameters = load_checkpoint(converted[1])
    assert_bits(original(parameters), states["multi_scale"])


def test_logits_are_those_of_the_parameters(converted):
    _, output, conversion = converted
    images = np.random.default_rng(0).normal(size=(2, 32, 40, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def call(graph, leaves, images):
        return nnx.merge(graph, leaves)(images)

    model = load_model(output)
    direct = bind(abstract("multi_scale"), jax.tree.map(jax.numpy.asarray, conversion.parameters))
    logits = call(*nnx.split(model), images)
    assert logits.shape == (2, 10)
    assert np.ptp(logits) > 0
    np.testing.assert_array_equal(logits, call(nnx.split(model)[0], nnx.split(direct)[1], images))


# Where it is written


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def files(tmp_path, state):
    """Two files whose weights differ."""
    torch_writer.write(tmp_path / "one.pth", state)
    torch_writer.write(tmp_path / "two.pth", shifted(state))
    return tmp_path / "one.pth", tmp_path / "two.pth"


def test_a_checkpoint_is_replaced_only_when_asked(tmp_path, files, state):
    output = tmp_path / "deep" / "er" / "out"
    convert(files[0], output)
    before = content(output)
    with pytest.raises(InputError, match="exists already: choose another output, or pass --overwrite"):
        convert(files[1], output)
    assert content(output) == before
    convert(files[1], output, overwrite=True)
    assert_bits(original(load_checkpoint(output)[1]), shifted(state))
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "state and model of something else"])
def test_anything_else_is_never_replaced(tmp_path, files, kind, overwrite):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        for folder in ("state", "model") if kind.startswith("state") else ["thesis"]:
            (output / folder).mkdir(parents=True)
            (output / folder / "text").write_text("mine")
    before = output.read_bytes() if kind == "file" else content(output)
    with pytest.raises(InputError, match="exists"):
        convert(files[0], output, overwrite=overwrite)
    assert (output.read_bytes() if kind == "file" else content(output)) == before


def test_an_empty_folder_is_used(tmp_path, files, state):
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "bad.pth").write_text("no")
    with pytest.raises(InputError):
        convert(tmp_path / "bad.pth", output)
    assert output.is_dir()
    convert(files[0], output)
    assert_bits(original(load_checkpoint(output)[1]), state)


def test_a_folder_inside_a_file(tmp_path, files):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write .*taken/out"):
        convert(files[0], tmp_path / "taken" / "out")


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["write", "move"])
def test_a_failure_leaves_the_old_checkpoint(tmp_path, files, monkeypatch, moment):
    output = tmp_path / "out"
    convert(files[0], output)
    before = content(output)
    if moment == "write":
        monkeypatch.setattr(ocp.Checkpointer, "save", disk_full)
    else:
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: disk_full() if self.name == "new" and to == output else rename(self, to)
        )
    with pytest.raises(InputError, match=r"cannot write .*out: No space left on device"):
        convert(files[1], output, overwrite=True)
    assert content(output) == before
    assert sorted(tmp_path.iterdir()) == sorted([output, *files])


def test_a_failure_leaves_nothing_half_written(tmp_path, files, monkeypatch):
    monkeypatch.setattr(ocp.Checkpointer, "save", disk_full)
    with pytest.raises(InputError, match="No space left on device"):
        convert(files[0], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted(files)
