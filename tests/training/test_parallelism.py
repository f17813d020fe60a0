"""The layouts on four devices: one run, whatever the layout, and one checkpoint for all of them."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_runs import TinyModel

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, bind, get_weights
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.training.checkpoints import RunCheckpoints
from msvmamba_jax.training.optimizer import adamw
from msvmamba_jax.training.parallelism import JitLayout, PmapLayout, make_layout, state_spec
from msvmamba_jax.training.step import initial_state, predict_step, train_step, weights_of

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")

STEPS = 6
BATCH = 8
LAYOUTS = ("one", "fsdp", "pmap")


class Mixed(Classification):
    """Classification whose batches are noised by example and mixed with their mirror image."""

    def prepare(self, batch, keys, batch_key, mirror):
        batch = dict(super().prepare(batch, keys, batch_key, mirror))
        noise = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
        ratio = jax.random.uniform(batch_key, minval=0.6)
        image = batch["image"] + 0.1 * noise
        mix = lambda x: ratio * x + (1 - ratio) * mirror(x)  # noqa: E731
        return {**batch, "image": mix(image), "target": mix(batch["target"])}


DESCRIPTION = Description(
    model={"name": "msvmamba_nano", "width": 16, "depths": (1, 1, 1, 1), "drop_path": 0.3, "num_classes": 3},
    class_names=tuple("abc"),
    preprocessing=Preprocessing(size=32, resize=32),
)
TASK = Mixed(description=DESCRIPTION, label_smoothing=0.1)


def layout_of(name):
    if name == "one":
        axes = (AxisType.Auto,) * 2
        return JitLayout(jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:1]))
    return make_layout("pmap" if name == "pmap" else "jit", fsdp=2 if name == "fsdp" else 1, batch_size=BATCH)


def batch_of(step):
    rng = np.random.default_rng(step)
    labels = rng.integers(0, 3, BATCH).astype(np.int32)
    images = rng.integers(0, 100, (BATCH, 32, 32, 3)) + 70 * labels[:, None, None, None]
    return {"image": images.astype(np.uint8), "label": labels}


@jax.numpy_dtype_promotion("standard")  # optax itself mixes dtypes
def run(layout, step_fn, state, first, last):
    for step in range(first, last):
        state, metrics = jax.block_until_ready(step_fn(state, layout.put(batch_of(step))))
    return state, metrics


OPTIMIZER = adamw(lambda _: 1e-3, weight_decay=0.05, clip_norm=5.0)


class Trainer:
    """The programs of a model and its runs, each made when it is first needed."""

    def __init__(self, build, folder):
        self.build, self.folder = build, folder
        self.model = abstract_model(lambda: build(SHAPE_KEYS))
        self.layouts = {name: layout_of(name) for name in LAYOUTS}
        self._steps, self._runs = {}, {}

    def init(self, weights):
        with jax.numpy_dtype_promotion("standard"):
            return initial_state(bind(self.model, weights), OPTIMIZER)

    def create(self, name):
        """A fresh state."""
        return self.layouts[name].create(self.init, get_weights(self.build(nnx.Rngs(0))))

    def abstract(self, name):
        return self.layouts[name].abstract(self.init, get_weights(self.model))

    def step(self, name, accumulate=1):
        """The compiled step."""
        if (name, accumulate) not in self._steps:
            options = {"seed": 0, "ema_decay": 0.9, "accumulate": accumulate, "axis": self.layouts[name].axis}
            step = train_step(self.model, TASK, OPTIMIZER, lambda _: 1e-3, **options)
            self._steps[name, accumulate] = self.layouts[name].compile_train(step)
        return self._steps[name, accumulate]

    def run(self, name, state, first, last, accumulate=1):
        return run(self.layouts[name], self.step(name, accumulate), state, first, last)

    def whole_run(self, name):
        """State after half of the steps as a checkpoint folder, state and metrics after all."""
        if name not in self._runs:
            checkpoints = RunCheckpoints(self.folder / name, DESCRIPTION)
            half, _ = self.run(name, self.create(name), 0, STEPS // 2)
            checkpoints.save(STEPS // 2, half)
            checkpoints.wait()
            state, metrics = self.run(name, half, STEPS // 2, STEPS)
            self._runs[name] = checkpoints, jax.device_get(state), jax.device_get(metrics)
        return self._runs[name]


BUILD = {
    "tiny": lambda rngs: TinyModel(rngs, 3, normalised=False),
    "msvmamba_nano": lambda rngs: DESCRIPTION.build(rngs=rngs),
}


@pytest.fixture(scope="module", params=["tiny", pytest.param("msvmamba_nano", marks=pytest.mark.nightly)])
def trainer(request, tmp_path_factory):
    return Trainer(BUILD[request.param], tmp_path_factory.mktemp(request.param))


def distance(found, reference):
    """Relative L2 distance of two trees of arrays."""
    flat = lambda tree: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])  # noqa: E731
    found, reference = flat(found), flat(reference)
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("name", ["fsdp", "pmap"])
def test_every_layout_makes_the_same_run(trainer, name):
    _, reference, reference_metrics = trainer.whole_run("one")
    _, state, metrics = trainer.whole_run(name)
    assert jax.tree.structure(state) == jax.tree.structure(reference)
    for part in ("params", "ema"):
        assert distance(state[part], reference[part]) < 1e-4
    for key, value in reference_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-3, err_msg=key)


@pytest.mark.parametrize(("written", "read"), [("fsdp", "pmap"), ("pmap", "one"), ("one", "fsdp")])
def test_checkpoints_interchange(trainer, written, read):
    expected = trainer.abstract(read)
    state = trainer.whole_run(written)[0].restore(expected)
    pairs = zip(*map(jax.tree.leaves, (state, expected)), strict=True)
    assert all(found.sharding == wanted.sharding for found, wanted in pairs)
    state, _ = trainer.run(read, state, STEPS // 2, STEPS)
    assert distance(jax.device_get(state["params"]), trainer.whole_run("one")[1]["params"]) < 1e-4


def test_fsdp_splits_the_state_and_gathers_no_activation(trainer):
    state = trainer.create("fsdp")
    split = 0
    for part in ("params", "ema"):
        for leaf in jax.tree.leaves(state[part]):
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert sizes == {leaf.size // 2 if leaf.sharding.spec else leaf.size}
            split += leaf.size if leaf.sharding.spec else 0
    assert split > 0.8 * sum(leaf.size for part in ("params", "ema") for leaf in jax.tree.leaves(state[part]))
    with jax.numpy_dtype_promotion("standard"):
        lowered = trainer.step("fsdp").lower(state, trainer.layouts["fsdp"].put(batch_of(0)))
    text = lowered.compile().as_text()
    found = re.findall(r"= ([^=]*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    arrays = {
        tuple(map(int, dims.split(","))) for shapes, _ in found for dims in re.findall(r"f32\[([\d,]+)\]", shapes)
    }
    weights = {x.shape for x in jax.tree.leaves(state["params"])}
    prepared = {(BATCH // 4, 32, 32, 3), (BATCH // 4, 3)}  # what `mirror` exchanges
    allowed = {tuple(sorted(x)) for x in weights}
    assert arrays
    for shape in arrays - prepared:
        squeezed = tuple(sorted(shape))
        assert squeezed in allowed, shape


@pytest.mark.parametrize("name", ["fsdp", pytest.param("pmap", marks=pytest.mark.nightly)])
def test_accumulated_step_equals_the_large_batch(trainer, name):
    state, metrics = trainer.run(name, trainer.create(name), 0, 1)
    other, other_metrics = trainer.run(name, trainer.create(name), 0, 1, accumulate=2)
    for key, value in metrics.items():
        np.testing.assert_allclose(other_metrics[key], value, rtol=1e-4, err_msg=key)
    assert distance(jax.device_get(other["params"]), jax.device_get(state["params"])) < 1e-4


@pytest.mark.parametrize("name", ["fsdp", "pmap"])
def test_predictions_keep_the_order_of_the_batch(trainer, name):
    weights = weights_of(trainer.whole_run("one")[1], "raw")
    batch = batch_of(3)

    def predict(of):
        layout = trainer.layouts[of]
        return layout.compile_predict(predict_step(trainer.model, TASK))(weights, layout.put(batch))

    found, expected = predict(name), predict("one")
    assert np.ptp(expected["loss"]) > 1e-3  # rows differ
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["top"], expected["top"])


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((), 2, P()),
        ((64,), 2, P()),  # small
        ((4095, 1), 3, P()),  # small
        ((64, 64), 1, P()),
        ((64, 128), 2, P(None, "fsdp")),
        ((128, 64), 2, P("fsdp")),
        ((64, 64), 4, P(None, "fsdp")),
        ((129, 64), 2, P(None, "fsdp")),
        ((129, 63), 2, P()),
    ],
)
def test_state_spec(shape, fsdp, spec):
    assert state_spec(shape, fsdp) == spec


@pytest.mark.parametrize(
    ("parallelism", "options", "message"),
    [
        ("shard", {}, "unknown config.parallelism 'shard'"),
        ("jit", {"fsdp": 3}, "does not divide the 4 devices"),
        ("jit", {"batch_size": 6}, "does not divide among 4 devices"),
        ("pmap", {"batch_size": 6}, "does not divide among 4 devices"),
        ("pmap", {"fsdp": 2}, "must be 1"),
    ],
)
def test_impossible_layouts(parallelism, options, message):
    with pytest.raises(InputError, match=message):
        make_layout(parallelism, **{"fsdp": 1, "batch_size": BATCH, **options})


def test_layouts_by_name():
    assert isinstance(make_layout("pmap", fsdp=1, batch_size=4), PmapLayout)
    assert dict(make_layout("jit", fsdp=2, batch_size=4).mesh.shape) == {"data": 2, "fsdp": 2}
