"""One training step: accumulation, devices, randomness, averaged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.models.batch_norm import BatchNorm
from msvmamba_jax.models.parameters import abstract_model
from msvmamba_jax.tasks.classification import Classification, ClassificationEvaluator
from msvmamba_jax.tasks.mixing import Mixing
from msvmamba_jax.training.step import initial_state, train_step, weights_of

BATCH = 8


class Tiny(nnx.Module):
    """A model that uses its keys, and compiles in no time."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, images, keys=None):
        x = jnp.mean(images, axis=(1, 2))
        if keys is not None:
            x = x * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5))(keys)[:, None].astype(x.dtype)
        return self.linear(x)


@pytest.fixture
def task():
    description = Description(
        model={"name": "msvmamba_nano", "num_classes": 4}, class_names=tuple("abcd"), preprocessing=Preprocessing()
    )
    return Classification(description=description, label_smoothing=0.1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 4, 4, 3), dtype=np.uint8)
    return {"image": images, "label": rng.integers(0, 4, BATCH).astype(np.int32)}


def run(task, batch, *, steps=3, accumulate=1, jit=jax.jit, seed=0):
    optimizer = optax.sgd(0.5)
    step = train_step(
        abstract_model(lambda: Tiny(nnx.Rngs(0))), task, optimizer, lambda _: 0.5,
        seed=seed, ema_decay=0.75, accumulate=accumulate,
    )  # fmt: skip
    step = jit(step)
    state = initial_state(Tiny(nnx.Rngs(0)), optimizer)
    history = []
    for _ in range(steps):
        state, metrics = jax.block_until_ready(step(state, batch))
        history.append((state, metrics))
    return history


def assert_same(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_update_equals_the_large_batch(task, batch, accumulate):
    state, metrics = run(task, batch)[-1]
    accumulated, accumulated_metrics = run(task, batch, accumulate=accumulate)[-1]
    assert_same(state, accumulated)
    assert_same(metrics, accumulated_metrics)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_four_devices_equal_one(task, batch, accumulate):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))
    jit = lambda step: jax.jit(step, in_shardings=shardings, out_shardings=(shardings[0], None))  # noqa: E731
    assert_same(run(task, batch)[-1], run(task, batch, jit=jit, accumulate=accumulate)[-1])


def test_averaged_weights(task, batch):
    (first, _), (second, _), _ = run(task, batch)
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, first["ema"], second["params"])
    assert_same(second["ema"], expected)


class TwoParts(nnx.Module):
    """A model with a backbone and a head."""

    def __init__(self, rngs):
        self.backbone, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, images, keys=None):
        return self.head(self.backbone(jnp.mean(images, axis=(1, 2))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_backbone_has_no_gradient(task, batch, accumulate):
    """With an optimiser that would use it; the head learns as ever, and the average stays to the last bit."""
    optimizer = optax.sgd(0.5)
    state = initial_state(TwoParts(nnx.Rngs(0)), optimizer)
    after, norms = {}, {}
    for frozen in (False, True):
        step = train_step(
            abstract_model(lambda: TwoParts(nnx.Rngs(0))), task, optimizer, lambda _: 0.5,
            seed=0, ema_decay=0.98, accumulate=accumulate, freeze_backbone=frozen,
        )  # fmt: skip
        after[frozen], metrics = jax.jit(step)(state, batch)
        norms[frozen] = float(metrics["gradient_norm"])
    for tree in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[True][tree]["backbone"], state["params"]["backbone"])
        assert_same(after[True][tree]["head"], after[False][tree]["head"])
    assert not np.array_equal(after[False]["params"]["backbone"]["kernel"], state["params"]["backbone"]["kernel"])
    assert norms[True] < norms[False]


def test_randomness_depends_on_seed_and_step(task, batch):
    losses = [float(metrics["loss"]) for _, metrics in run(task, batch)]
    assert losses == [float(metrics["loss"]) for _, metrics in run(task, batch)]
    assert losses != [float(metrics["loss"]) for _, metrics in run(task, batch, seed=1)]


def test_loss_is_the_smoothed_cross_entropy(task, batch):
    model = Tiny(nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), BATCH)
    prepared = task.prepare({k: jnp.asarray(v) for k, v in batch.items()}, keys, keys[0], lambda x: x[::-1])
    loss, metrics = task.loss(model, prepared, None)
    x = (batch["image"] / 255.0 - np.array(Preprocessing().mean)) / np.array(Preprocessing().std)
    logits = x.mean((1, 2)) @ np.asarray(model.linear.kernel[...]) + np.asarray(model.linear.bias[...])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = 0.9 * np.eye(4)[batch["label"]] + 0.1 / 4
    np.testing.assert_allclose(loss, -(targets * log_p).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_top1"], (logits.argmax(-1) == batch["label"]).mean())


def test_evaluator_counts_masked_rows_nowhere():
    evaluator = ClassificationEvaluator("abc")
    top = np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 1, 2]])
    label = np.array([0, 0, 1, 0])
    mask = np.array([True, True, True, False])
    evaluator.update({"top": top, "label": label, "loss": np.array([1.0, 2.0, 3.0, 1e9], np.float32)}, mask)
    evaluator.update({"top": top[2:3], "label": np.array([3]), "loss": np.array([6.0])}, np.array([False]))
    evaluator.update({"top": top[2:3], "label": np.array([2]), "loss": np.array([6.0])}, np.array([True]))
    assert evaluator.result() == {"accuracy_top1": 0.5, "accuracy_top5": 1.0, "loss": 3.0, "images": 4}
    assert evaluator.per_class() == [
        {"name": "a", "images": 2, "accuracy_top1": 0.5},
        {"name": "b", "images": 1, "accuracy_top1": 0.0},
        {"name": "c", "images": 1, "accuracy_top1": 1.0},
    ]
    assert evaluator.sentence() == "top-1 50.00%, top-5 100.00%, loss 3.0000 on 4 images"
    assert ClassificationEvaluator("a").per_class() == [{"name": "a", "images": 0, "accuracy_top1": None}]


@pytest.mark.parametrize(
    ("mixing", "devices"),
    [
        (Mixing(mixup=0.8), 1),
        (Mixing(cutmix=1.0), 4),
        pytest.param(Mixing(mixup=0.8), 4, marks=pytest.mark.nightly),
        pytest.param(Mixing(cutmix=1.0), 1, marks=pytest.mark.nightly),
    ],
)
def test_mixing_is_the_same_in_parts_and_on_four_devices(task, batch, mixing, devices):
    mixed = dataclasses.replace(task, mixing=mixing, erase_probability=0.5)
    expected = run(mixed, batch)[-1]
    assert float(expected[1]["loss"]) != float(run(task, batch)[-1][1]["loss"])
    if devices == 1:
        assert_same(expected, run(mixed, batch, accumulate=4)[-1])
        return
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    shardings = (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))
    jit = lambda step: jax.jit(step, in_shardings=shardings, out_shardings=(shardings[0], None))  # noqa: E731
    assert_same(expected, run(mixed, batch, jit=jit)[-1])


class WithStatistics(nnx.Module):
    """A model with batch normalisation."""

    def __init__(self, rngs, axis=None):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = BatchNorm(5, axis=axis, dtype=jnp.float32)
        self.second = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, images, keys=None):
        return self.second(self.norm(self.first(jnp.mean(images, axis=(1, 2))), train=keys is not None))


def run_with_statistics(task, batch, *, accumulate=1, ema=True, pmap=False):
    optimizer = optax.sgd(0.5)
    axis = "data" if pmap else None
    step = train_step(
        abstract_model(lambda: WithStatistics(nnx.Rngs(0), axis)), task, optimizer, lambda _: 0.5,
        seed=0, ema_decay=0.75, accumulate=accumulate, axis=axis,
    )  # fmt: skip
    state = initial_state(WithStatistics(nnx.Rngs(0), axis), optimizer, ema=ema)
    if pmap:
        batch = {name: array.reshape(4, -1, *array.shape[1:]) for name, array in batch.items()}
        devices = jax.local_devices()[:4]
        step = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=(None, None), devices=devices)
    else:
        step = jax.jit(step)
    history = [(state, None)]
    for _ in range(3):
        history.append(jax.block_until_ready(step(history[-1][0], batch)))
    return [state for state, _ in history]


def test_statistics_of_a_batch_move_the_running_ones(task, batch):
    before, after, *_ = run_with_statistics(task, batch)
    prepared = (batch["image"] / 255.0 - np.array(Preprocessing().mean)) / np.array(Preprocessing().std)
    params = before["params"]["first"]
    hidden = prepared.mean((1, 2)) @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    expected = {"mean": 0.1 * hidden.mean(0), "var": 0.9 + 0.1 * hidden.var(0, ddof=1)}
    assert_same(after["batch_stats"], {"norm": expected})
    averaged = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before["ema"], weights_of(after, "raw"))
    assert_same(after["ema"], averaged)
    assert "mean" not in after["params"]["norm"]
    assert weights_of(after, "ema")["norm"].keys() == {"scale", "bias", "mean", "var"}


def test_statistics_are_the_global_batch_s_on_four_devices(task, batch):
    assert_same(run_with_statistics(task, batch)[-1], run_with_statistics(task, batch, pmap=True)[-1])


def test_statistics_of_the_parts_of_a_batch_are_averaged(task, batch):
    """The mean is that of the batch, the variance the mean of the parts'."""
    _, whole, *_ = run_with_statistics(task, batch)
    _, parts, *_ = run_with_statistics(task, batch, accumulate=2)
    assert_same(whole["batch_stats"]["norm"]["mean"], parts["batch_stats"]["norm"]["mean"])
    assert not np.allclose(whole["batch_stats"]["norm"]["var"], parts["batch_stats"]["norm"]["var"])


def test_no_averaged_weights(task, batch):
    with_average, without = (run_with_statistics(task, batch, ema=ema)[-1] for ema in (True, False))
    assert with_average.keys() - without.keys() == {"ema"}
    assert_same(without, {name: value for name, value in with_average.items() if name != "ema"})
