"""Fine-tuning: what is loaded from which file, what is refused, and what training then leaves alone."""

import dataclasses
import functools
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import KINDS, Description, find_checkpoint, load_checkpoint, save_checkpoint
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.models.classifier import Classifier
from msvmamba_jax.models.parameters import (
    SHAPE_KEYS,
    abstract_model,
    flatten,
    get_parameters,
    get_weights,
    unflatten,
)
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training import pretrained
from msvmamba_jax.training.loop import train
from msvmamba_jax.training.optimizer import adamw, all_but_vectors, layers
from msvmamba_jax.training.pretrained import find_pretrained, read_pretrained, with_pretrained
from msvmamba_jax.training.step import initial_state

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "convert"))
import torch_writer  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, STEPS = 8, 2
TINY = {"name": "msvmamba_nano", "width": 16, "depths": (1, 1, 1, 1), "drop_path": 0.0}
NAMES = tuple("0123456789")


def configuration(**options):
    """The configuration of the digits for a tiny model, with dotted options."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    config.model = TINY
    config.update_from_flattened_dict(
        {
            "batch_size": BATCH,
            "duration": "1 epoch",
            "log_every": "1 step",
            "evaluate_every": f"{STEPS} steps",
            "save_every": f"{STEPS} steps",
            **options,
        }
    )
    return config


@functools.cache
def digits():
    """The first few of them."""
    full = load_dataset({"source": "digits"})
    few = lambda source, count: [source[i] for i in range(count)]  # noqa: E731
    return dataclasses.replace(full, train=few(full.train, BATCH * STEPS), evaluation=few(full.evaluation, BATCH))


def run(workdir, names=NAMES, **options):
    config = configuration(**options)
    dataset = dataclasses.replace(digits(), class_names=names)
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        assert train(config, make_task(config, dataset), dataset, workdir) is None


@functools.cache
def shapes(classes=10):
    config = configuration()
    names = tuple(f"n{i}" for i in range(classes))
    task = make_task(config, dataclasses.replace(digits(), class_names=names))
    return dict(flatten(get_parameters(abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS)))))


def zeros(classes):
    return unflatten({name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes(classes).items()})


def description(names=NAMES, **model):
    config = configuration()
    config.model = {**TINY, **model}
    return make_task(config, dataclasses.replace(digits(), class_names=names)).description


def weights(workdir, which, step=STEPS):
    return dict(flatten(load_checkpoint(workdir / "checkpoints" / str(step), which)[1]))


def same(a, b, names):
    assert names
    return all(np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes() for name in names)


def backbone(leaves):
    return [name for name in leaves if name.startswith("backbone.")]


@pytest.fixture(scope="module")
def released(parity, tmp_path_factory):
    """A file as PyTorch writes it, of the tiny model with ten classes, and its weights under our names."""
    theirs = to_original(dict(flatten(zeros(10))), "multi_scale")
    state = parity.weights.state_dict({name: tensor.shape for name, tensor in theirs.items()})
    path = tmp_path_factory.mktemp("released") / "net.pth"
    torch_writer.write(path, {"model": state})
    return path


def cheap_call(self, images, keys=None):
    """Logits that depend on every parameter, in the place of a forward pass that takes long to compile."""
    leaves = [leaf for name, leaf in flatten(get_parameters(self)) if not name.startswith(("norm.", "head."))]
    total = sum(jnp.sum(leaf) / np.float32(np.sqrt(leaf.size)) for leaf in leaves)
    width = self.head.in_features
    wave = jnp.sin(images.mean((1, 2, 3))[:, None] + jnp.linspace(0.0, 9.0, width) + total)
    return self.head(self.norm(wave))


@pytest.fixture(scope="module", autouse=True)
def quick_forward():
    """Blocks that compute less: loading and freezing do not depend on what blocks compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "__call__", cheap_call)
        yield


FROZEN = {"freeze_backbone": True, "optimizer.learning_rate": 0.1, "optimizer.warmup_start": 0.1}


@pytest.fixture(scope="module")
def frozen(released, tmp_path_factory):
    """The workdir of a run that trains the head alone, from the released file."""
    workdir = tmp_path_factory.mktemp("frozen")
    run(workdir, pretrained=str(released), **FROZEN)
    return workdir


# Whole runs


def test_frozen_backbone_is_the_file_s_after_training(frozen, released):
    expected = read_pretrained(released, description(), shapes()).leaves
    names = backbone(expected)
    assert len(names) == len(expected) - 4
    for which in ("raw", "ema"):
        after = weights(frozen, which)
        assert same(after, expected, names)
        for name in ("head.kernel", "head.bias", "norm.scale", "norm.bias"):
            assert not same(after, expected, [name]), name


def test_the_workdir_says_what_was_loaded(frozen, released):
    report = json.loads((frozen / "pretrained.json").read_text())
    assert report["checkpoint"] == str(released)
    assert report["source"]["file"] == "net.pth"
    assert report["weights"] == "raw"
    assert sorted(report["loaded"]) == sorted(shapes())
    assert report["new"] == report["unused"] == []


def test_a_resumed_run_ignores_it(frozen, released, capsys):
    before = weights(frozen, "raw")
    report = (frozen / "pretrained.json").read_bytes()
    run(frozen, pretrained="/no/such/checkpoint", duration="2 epochs", **FROZEN)
    out = capsys.readouterr().out
    assert f"going on from step {STEPS}" in out
    assert "loaded" not in out
    assert (frozen / "pretrained.json").read_bytes() == report
    after = weights(frozen, "raw", 2 * STEPS)
    assert same(after, before, backbone(before))
    assert not same(after, before, ["head.kernel"])


def test_a_run_of_other_classes_starts_from_a_workdir(frozen, tmp_path, capsys):
    """The first updates of Adam are as large as the rate, so what has changed shows each layer's."""
    rate = dict.fromkeys(("learning_rate", "warmup_start", "minimum"), 1e-3)
    options = {f"optimizer.{name}": value for name, value in {**rate, "batch_size": BATCH, "layer_decay": 0.5}.items()}
    source = find_checkpoint(frozen)
    run(tmp_path, names=tuple("abcdefghijkl"), pretrained=str(frozen), **options)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "loaded" in line]
    loaded = sum(leaf.size for name, leaf in shapes().items() if not name.startswith("head."))
    assert f"{loaded:,} parameters (backbone, norm) loaded" in line
    assert f"{128 * 12 + 12:,} parameters (head) new, since the classes are others" in line
    report = json.loads((tmp_path / "pretrained.json").read_text())
    assert report["weights"] == "ema"
    assert report["checkpoint"] == str(source)
    assert sorted(report["new"]) == sorted(report["unused"]) == ["head.bias", "head.kernel"]

    before = dict(flatten(load_checkpoint(source, "ema")[1]))
    assert not same(before, dict(flatten(load_checkpoint(source, "raw")[1])), ["norm.bias"])
    after = load_checkpoint(tmp_path, "raw")[1]
    assert after["head"]["kernel"].shape == (128, 12)
    changes = {}
    decays = dict(flatten(all_but_vectors(after)))
    new = dict(flatten(after))
    for name, layer in flatten(layers(after)):
        if not decays[name] and not name.startswith("head."):
            changes.setdefault(layer, []).append(np.max(np.abs(new[name] - before[name])))
    assert sorted(changes) == [0, 1, 2, 3, 4, 5]
    for layer, found in changes.items():
        unit = 1e-3 * 0.5 ** (5 - layer)
        assert 0.9 * unit < max(found) < 2.1 * unit, layer  # of two steps
    trained = sum(leaf.size for leaf in new.values())
    assert 2 * trained <= optimizer_scalars(tmp_path) < 2 * trained + 5


def optimizer_scalars(workdir):
    """How many numbers a checkpoint has of the optimiser: two moments, and counters."""
    folder = find_checkpoint(workdir) / "state"
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder.absolute())
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(getattr(metadata, "tree", metadata)["opt"]))


def test_no_moments_of_a_frozen_backbone(frozen):
    trained = sum(leaf.size for name, leaf in shapes().items() if not name.startswith("backbone."))
    assert 2 * trained <= optimizer_scalars(frozen) < 2 * trained + 5


# The head


@pytest.mark.parametrize(
    ("theirs", "head"),
    [
        (NAMES, True),
        (tuple(f"class {i}" for i in range(10)), True),  # a converter's
        (tuple(reversed(NAMES)), False),
        (NAMES[:9], False),
        (tuple(f"class {i}" for i in range(9)), False),
    ],
)
def test_the_head_is_loaded_where_the_classes_agree(tmp_path, theirs, head):
    save_checkpoint(tmp_path / "checkpoint", description(theirs), zeros(len(theirs)))
    found = read_pretrained(tmp_path / "checkpoint", description(), shapes())
    assert found.weights == "raw"
    assert ("head.kernel" in found.leaves) == ("head.bias" in found.leaves) == (not found.difference) == head
    assert set(found.unused) == (set() if head else {"head.kernel", "head.bias"})
    assert {"norm.scale", *backbone(shapes())} <= set(found.leaves)


# What is refused


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 24}, "it is msvmamba_nano (width 16), not msvmamba_nano (width 24)"),
        ({"depths": (1, 1, 2, 1)}, "(depths (1, 1, 1, 1)), not msvmamba_nano (depths (1, 1, 2, 1))"),
        ({"name": "vssm_tiny"}, "it is msvmamba_nano (mixer multi_scale, states 1), not vssm_tiny (mixer cross_scan"),
    ],
)
def test_another_model(released, model, message):
    with pytest.raises(InputError) as caught:
        read_pretrained(released, description(**model), shapes())
    assert message in str(caught.value)
    assert str(released) in str(caught.value)


def test_another_name_of_the_same_sizes(released):
    assert read_pretrained(released, description(name="msvmamba_micro"), shapes()).leaves


def test_a_checkpoint_that_lacks_a_parameter(tmp_path):
    tree = zeros(10)
    del tree["backbone"]["stages"]["2"]["blocks"]["0"]["norm"]["bias"]
    save_checkpoint(tmp_path / "checkpoint", description(), tree)
    with pytest.raises(
        InputError, match=r"cannot start from .*checkpoint.*stages\.2\.blocks\.0\.norm\.bias is missing"
    ):
        read_pretrained(tmp_path / "checkpoint", description(), shapes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "/no/such/file.pth"}, "no checkpoint at /no/such/file.pth"),
        ({"freeze_backbone": True}, r"config\.freeze_backbone is for a backbone .* --config\.freeze_backbone=false"),
        ({"optimizer.layer_decay": 0.8}, r"config\.optimizer\.layer_decay is for .*=1\.0"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        find_pretrained(configuration(**options), description(), shapes())


def test_processes_that_read_different_files(monkeypatch, released, tmp_path):
    found, sums = read_pretrained(released, description(), shapes()), []
    state = {"params": zeros(10)}

    def differ(value):
        sums.append(value)
        return False

    monkeypatch.setattr(pretrained, "same", differ)
    for leaves in (found.leaves, {name: leaf + (name == "norm.bias") for name, leaf in found.leaves.items()}):
        with pytest.raises(InputError, match="not the same on all processes"):
            with_pretrained(state, dataclasses.replace(found, leaves=leaves), tmp_path)
    assert sums[0] != sums[1]
    assert all(0 <= value < 2**31 for value in sums)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "notes.pth").write_text("no weights")
    with pytest.raises(InputError, match=r"notes\.pth"):
        read_pretrained(tmp_path / "notes.pth", description(), shapes())


def test_the_state_stays_where_it_is(released, tmp_path):
    """Sharded in its own way, leaf by leaf."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda x: jax.sharding.PartitionSpec("data" if x.ndim and x.shape[0] % 4 == 0 else None)  # noqa: E731
    put = lambda x: jax.device_put(jnp.zeros(x.shape), jax.sharding.NamedSharding(mesh, spec(x)))  # noqa: E731
    trees = [
        jax.tree.map(put, get_parameters(abstract_model(lambda: description().build(rngs=SHAPE_KEYS)))) for _ in "ab"
    ]
    state = {"step": jnp.zeros(()), "params": trees[0], "ema": trees[1], "opt": ()}
    config = configuration(pretrained=str(released))
    filled = with_pretrained(state, find_pretrained(config, description(), shapes()), tmp_path)
    expected = read_pretrained(released, description(), shapes()).leaves
    assert jax.tree.structure(filled) == jax.tree.structure(state)
    for tree in ("params", "ema"):
        new = dict(flatten(filled[tree]))
        assert same(new, expected, list(expected))
        assert all(new[name].sharding == old.sharding for name, old in flatten(state[tree]))
        assert any(not leaf.sharding.is_fully_replicated for leaf in new.values())


# The optimiser


def small():
    """Parameters of two stages, one and two blocks."""
    leaf = lambda seed: {"kernel": jax.random.normal(jax.random.key(seed), (2, 3))}  # noqa: E731
    return {
        "backbone": {
            "patch_embedding": {"projection": leaf(0)},
            "stages": {"0": {"blocks": {"0": {"norm": leaf(1)}}}, "1": {"blocks": {"0": leaf(2), "1": leaf(3)}}},
            "downsamplings": {"0": {"reduction": leaf(4)}},
        },
        "norm": {"scale": jnp.ones(3)},
        "head": leaf(5),
    }


def updates(steps=3, **options):
    with jax.numpy_dtype_promotion("standard"):  # optax itself mixes dtypes
        params = small()
        optimizer = adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0, **options)
        state = optimizer.init(params)
        for step in range(steps):
            gradients = jax.tree.map(lambda x: jnp.cos(x + step), params)  # noqa: B023
            update, state = optimizer.update(gradients, state, params)
    return dict(flatten(update)), state


def test_layers():
    assert dict(flatten(layers(small()))) == {
        "backbone.patch_embedding.projection.kernel": 0,
        "backbone.stages.0.blocks.0.norm.kernel": 1,
        "backbone.downsamplings.0.reduction.kernel": 2,
        "backbone.stages.1.blocks.0.kernel": 2,
        "backbone.stages.1.blocks.1.kernel": 3,
        "norm.scale": 4,
        "head.kernel": 4,
    }


def test_layers_of_a_model():
    """Depths 1, 1, 1, 1: layers 0 to 5."""
    found = {}
    for name, layer in flatten(layers(get_parameters(abstract_model(lambda: description().build(rngs=SHAPE_KEYS))))):
        found.setdefault(".".join(name.split(".")[:3]), set()).add(layer)
    assert found.pop("backbone.patch_embedding.projection") == found.pop("backbone.patch_embedding.norm") == {0}
    for stage in range(4):
        assert found.pop(f"backbone.stages.{stage}") == {stage + 1}
    for index in range(3):
        assert found.pop(f"backbone.downsamplings.{index}") == {index + 2}
    assert found == {key: {5} for key in ("norm.scale", "norm.bias", "head.kernel", "head.bias")}


def test_layer_decay_multiplies_updates_exactly():
    plain, _ = updates()
    decayed, _ = updates(layer_decay=0.7)
    for name, layer in flatten(layers(small())):
        factor = np.float32(0.7 ** (4 - layer))
        np.testing.assert_array_equal(decayed[name], np.asarray(plain[name]) * factor, err_msg=name)


def test_plain_options_leave_the_plain_state():
    (_, state), (_, decayed) = updates(), updates(layer_decay=0.7)
    assert jax.tree.structure(updates(layer_decay=1.0, freeze_backbone=False)[1]) == jax.tree.structure(state)
    assert [type(part).__name__ for part in state] == ["EmptyState", "tuple"]
    assert jax.tree.structure(decayed) != jax.tree.structure(state)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_frozen_updates(layer_decay):
    """The head's are those of a model that is nothing but a head: clipping looks at nothing else either."""
    frozen, state = updates(freeze_backbone=True, layer_decay=layer_decay)
    assert all(not np.any(update) for name, update in frozen.items() if name.startswith("backbone."))
    assert sorted(frozen) == sorted(dict(flatten(small())))
    with jax.numpy_dtype_promotion("standard"):
        head = {name: value for name, value in small().items() if name != "backbone"}
        optimizer = adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0)
        alone = optimizer.init(head)
        for step in range(3):
            update, alone = optimizer.update(jax.tree.map(lambda x: jnp.cos(x + step), head), alone, head)  # noqa: B023
    for name, value in flatten(update):
        np.testing.assert_array_equal(frozen[name], value)
    assert jax.tree.structure(state) == jax.tree.structure(alone)


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.5, float("nan")])
def test_layer_decay_out_of_range(layer_decay):
    with pytest.raises(InputError, match="layer_decay must be above 0 and at most 1"):
        adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0, layer_decay=layer_decay)


# Other tasks


@functools.cache
def dense(task, names=tuple("abc")):
    """The description of a small model of a dense task, and the shapes of its weights."""
    kind = KINDS[task]
    sizes = {"segmentation": {"channels": 8, "auxiliary_channels": 8}, "detection": {"channels": 8, "hidden": 8}}[task]
    made = Description(
        model={**TINY, **sizes, "num_classes": len(names)},
        task=task,
        class_names=names,
        preprocessing=kind.preprocessing(),
    )
    return made, dict(flatten(get_weights(abstract_model(lambda: made.build(rngs=SHAPE_KEYS)))))


def saved(folder, made, shapes):
    weights = unflatten({name: np.full(leaf.shape, 2.0, np.float32) for name, leaf in shapes.items()})
    save_checkpoint(folder, made, weights)
    return folder


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_classifier_gives_its_backbone_to_other_tasks(released, task):
    made, wanted = dense(task)
    found = read_pretrained(released, made, wanted)
    assert sorted(found.leaves) == sorted(backbone(wanted))
    assert {name.partition(".")[0] for name in found.unused} == {"norm", "head"}


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_of_the_same_task_all_is_taken_but_what_depends_on_the_classes(tmp_path, task):
    made, wanted = dense(task)
    folder = saved(tmp_path / "checkpoint", made, wanted)
    assert read_pretrained(folder, made, wanted).leaves.keys() == wanted.keys()
    other, shapes_of_other = dense(task, tuple("xyz"))  # as many, with other names
    found = read_pretrained(folder, other, shapes_of_other)
    left = {name for name in shapes_of_other if name not in found.leaves}
    layers_left = {name.rpartition(".")[0] for name in left}
    assert (
        layers_left
        == {
            "segmentation": {"decode_head.classifier", "auxiliary_head.classifier"},
            "detection": {"box_head.score", "box_head.delta", "mask_head.score"},
        }[task]
    )
    assert sum(name.endswith(".mean") for name in found.leaves) == (13 if task == "segmentation" else 0)


def test_statistics_of_a_checkpoint_go_into_the_state(tmp_path):
    made, wanted = dense("segmentation")
    found = read_pretrained(saved(tmp_path / "checkpoint", made, wanted), made, wanted)
    built = made.build(rngs=nnx.Rngs(0))
    state = with_pretrained(initial_state(built, optax.sgd(0.1)), found, tmp_path)
    for tree in ("params", "batch_stats", "ema"):
        assert all((np.asarray(leaf) == 2).all() for _, leaf in flatten(state[tree])), tree
    assert json.loads((tmp_path / "pretrained.json").read_text())["new"] == []
