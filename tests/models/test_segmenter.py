"""What every segmenter promises. Widths and depths are cut down."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomised

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import MAX_DEPTH, STAGES
from msvmamba_jax.models.layers import ChannelDropout
from msvmamba_jax.models.parameters import (
    SHAPE_KEYS,
    abstract_model,
    bind,
    flatten,
    get_parameters,
    get_statistics,
    get_weights,
    merge,
)
from msvmamba_jax.models.segmenter import Segmenter
from msvmamba_jax.models.upernet import DROPOUT, AuxiliaryHead, UperNet
from msvmamba_jax.models.variants import VARIANTS, create_segmenter, list_models

SMALL = {
    "width": 8,
    "depths": (1, 1, 1, 1),
    "num_classes": 5,
    "channels": 12,
    "auxiliary_channels": 6,
    "drop_path": 0.0,
}
HEIGHT, WIDTH = 37, 70  # neither a multiple of 4; the maps are 9 x 17, 5 x 9, 3 x 5 and 2 x 3
BFLOAT16_TOLERANCE = 0.05  # relative L2; measured: 0.02

every_kind = pytest.mark.parametrize("name", ["msvmamba_nano", "vssm_tiny"])


@functools.cache
def small_model(name: str = "msvmamba_nano", **options) -> Segmenter:
    return randomised(abstract_model(lambda: create_segmenter(name, rngs=nnx.Rngs(0), **(SMALL | options))))


def images(batch=2, height=HEIGHT, width=WIDTH) -> jax.Array:
    return jax.random.normal(jax.random.key(batch), (batch, height, width, 3))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _run(graph, state, images, keys, train):
    model = nnx.merge(graph, state)
    logits = model.with_auxiliary(images, keys, train=train)
    return logits, get_statistics(model)


def run(model: Segmenter, images: jax.Array, keys=None, train=False):
    """Logits, auxiliary logits and the statistics afterwards."""
    (logits, auxiliary), statistics = _run(*nnx.split(model), images, keys, train)
    return np.asarray(logits), np.asarray(auxiliary), dict(flatten(statistics))


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        *((name, HEIGHT, WIDTH) for name in list_models()),
        *(("msvmamba_nano", *size) for size in ((32, 32), (4, 131), (4, 4))),
    ],
)
def test_shapes(name, height, width):
    model = small_model(name)
    call = lambda x: (model(x), *model.with_auxiliary(x), model.features(x))  # noqa: E731
    logits, again, auxiliary, maps = jax.eval_shape(call, images(3, height, width))
    rows, columns = height // 4, width // 4
    assert (logits.shape, logits.dtype) == ((3, rows, columns, 5), jnp.float32)
    assert (again.shape, again.dtype) == (logits.shape, logits.dtype)
    for stage, (features, found) in enumerate(zip((8, 16, 32, 64), maps, strict=True)):
        assert (found.shape, found.dtype) == ((3, rows, columns, features), jnp.float32)
        if stage == 2:
            assert (auxiliary.shape, auxiliary.dtype) == ((3, rows, columns, 5), jnp.float32)
        rows, columns = -(-rows // 2), -(-columns // 2)


@every_kind
def test_every_parameter_receives_a_gradient(name):
    """Although every layer but the classifiers is followed by normalisation of the batch."""
    model = small_model(name)

    @jax.jit
    @jax.grad
    def gradients(parameters, images):
        bound = bind(model, merge(parameters, get_statistics(model)))
        return sum(jnp.sum(jnp.sin(x)) for x in bound.with_auxiliary(images, train=True))

    found = dict(flatten(gradients(get_parameters(model), images())))
    assert found.keys() == dict(flatten(get_parameters(model))).keys()
    for path, gradient in found.items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-7, path


def test_an_image_does_not_see_its_batch_in_evaluation():
    both = run(small_model(), images())
    alone = run(small_model(), images()[1:])
    for one, two in zip(alone[:2], both[:2], strict=True):
        np.testing.assert_allclose(one[0], two[1], atol=1e-5)
    before = dict(flatten(get_statistics(small_model())))
    assert both[2].keys() == before.keys()
    for path, value in both[2].items():
        np.testing.assert_array_equal(value, before[path])


def test_training_outside_of_jit_moves_the_statistics_of_the_model():
    expected = run(small_model(), images(), train=True)
    model = bind(small_model(), get_weights(small_model()))
    np.testing.assert_allclose(model.with_auxiliary(images(), train=True)[0], expected[0], atol=1e-5)
    for path, value in flatten(get_statistics(model)):
        np.testing.assert_allclose(value, expected[2][path], atol=1e-6, err_msg=path)


def test_training_normalises_by_the_batch_and_moves_every_statistic():
    model = small_model()
    before = dict(flatten(get_statistics(model)))
    logits, _, after = run(model, images(), train=True)
    assert len(before) == 2 * (4 + 1 + 3 + 3 + 1 + 1)
    for path, value in after.items():
        assert (np.abs(value - before[path]) > 1e-6).all(), path
    others, _, _ = run(model, jnp.concatenate([images()[:1], 2 * images()[1:]]), train=True)
    assert np.abs(others[0] - logits[0]).max() > 1e-2
    np.testing.assert_array_equal(
        before["decode_head.fusion.bn.mean"], get_statistics(model)["decode_head"]["fusion"]["bn"]["mean"]
    )


def test_the_call_leaves_the_auxiliary_head_alone():
    def heads_with_new_statistics(images, method):
        model = bind(small_model(), get_weights(small_model()))
        getattr(model, method)(images, train=True)
        changed = {path for path, value in flatten(get_statistics(model)) if isinstance(value, jax.core.Tracer)}
        assert len(changed) in (24, 26)
        heads.append({path.split(".")[0] for path in changed})

    heads: list[set[str]] = []
    for method in ("__call__", "with_auxiliary"):
        jax.eval_shape(functools.partial(heads_with_new_statistics, method=method), images())
    assert heads == [{"decode_head"}, {"decode_head", "auxiliary_head"}]


def test_bfloat16_stays_close_to_float32(relative_error, record_property):
    logits, auxiliary, _ = run(small_model(), images())
    half_logits, half_auxiliary, _ = run(small_model(dtype="bfloat16"), images())
    assert half_logits.dtype == half_auxiliary.dtype == np.float32
    assert {x.dtype.name for x in jax.eval_shape(small_model(dtype="bfloat16").features, images())} == {"bfloat16"}
    errors = [relative_error(half_logits, logits), relative_error(half_auxiliary, auxiliary)]
    record_property("errors", errors)
    print(f"bfloat16: errors {errors}")
    assert max(errors) < BFLOAT16_TOLERANCE


class TestDropout:
    def test_channels_of_an_image_are_kept_or_dropped_as_a_whole(self):
        keys = jax.random.split(jax.random.key(0), 50)
        y = np.asarray(ChannelDropout(0.25, site=3)(jnp.ones((50, 2, 3, 40)), keys))
        assert (y == y[:, :1, :1]).all()
        np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
        assert abs(y.mean() - 1) < 4 * np.sqrt(0.25 / 0.75 / 2000)
        assert len(np.unique(y[:, 0, 0], axis=0)) == 50  # images decide for themselves

    def test_without_keys_or_rate_nothing_happens(self):
        x = jnp.ones((2, 1, 1, 3))
        assert ChannelDropout(0.5, 0)(x, None) is x
        assert ChannelDropout(0.0, 0)(x, jax.random.split(jax.random.key(0), 2)) is x

    def test_keeps_bfloat16(self):
        y = ChannelDropout(0.5, 0)(jnp.ones((4, 1, 1, 2), jnp.bfloat16), jax.random.split(jax.random.key(0), 4))
        assert y.dtype == jnp.bfloat16

    def test_no_other_decision_has_its_keys(self):
        model = small_model()
        heads = (model.decode_head, model.auxiliary_head)
        assert [head.dropout.rate for head in heads] == [DROPOUT, DROPOUT] == [0.1, 0.1]
        highest = 2 * STAGES * MAX_DEPTH - 1  # of stochastic depth, in the deepest backbone there can be
        sites = [head.dropout.site for head in heads]
        assert min(sites) > highest
        assert len(set(sites)) == 2

    def test_decisions_depend_on_the_image_s_key_alone(self):
        model, batch = small_model(drop_path=0.5), images(4)
        logits = run(model, batch, jax.random.key(7))[:2]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(4))
        parts = [run(model, batch[part], keys[part])[:2] for part in (slice(0, 2), slice(2, 4))]
        for whole, *halves in zip(logits, *parts, strict=True):
            np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-5)
        for other, whole in zip(run(model, batch[:2], keys[2:])[:2], logits, strict=True):
            assert np.abs(other - whole[:2]).max() > 1e-2

    def test_it_acts_in_both_heads(self):
        """There is no stochastic depth in this model."""
        keys = jax.random.split(jax.random.key(3), 2)
        for dropped, whole in zip(
            run(small_model(), images(), keys)[:2], run(small_model(), images())[:2], strict=True
        ):
            assert np.abs(dropped - whole).max() > 1e-2


class TestOptions:
    def test_they_reach_the_model(self):
        model = small_model(num_classes=7, states=3, channels=16, auxiliary_channels=10, remat=True, axis="data")
        weights = {path: x.shape for path, x in flatten(get_weights(model))}
        assert model.num_classes == 7
        assert weights["decode_head.classifier.kernel"] == (16, 7)
        assert weights["auxiliary_head.classifier.kernel"] == (10, 7)
        assert {shape[1] for path, shape in weights.items() if path.endswith("A_log")} == {3}
        assert model.backbone.stages[0].remat
        norms = [module for _, module in nnx.iter_modules(model) if type(module).__name__ == "BatchNorm"]
        assert [norm.axis for norm in norms] == ["data"] * 13

    @pytest.mark.parametrize(
        ("name", "rate"), [("msvmamba_nano", 0.3), ("msvmamba_micro", 0.3), ("msvmamba_tiny", 0.2), ("vssm_small", 0.3)]
    )
    def test_stochastic_depth_of_the_recipe(self, name, rate):
        make = functools.partial(create_segmenter, name, depths=(1, 1, 1, 1), rngs=SHAPE_KEYS)
        model = abstract_model(make)
        assert model.backbone.config.drop_path == rate
        assert model.backbone.stages[3].blocks[-1].mixer_drop_path.rate == pytest.approx(rate)
        assert abstract_model(lambda: make(drop_path=0.0)).backbone.config.drop_path == 0.0
        assert VARIANTS[name].backbone.drop_path == (0.3 if name == "vssm_small" else 0.2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "resnet50"}, "there is no model 'resnet50'"),
            ({"num_classes": 0}, "num_classes must be at least 1; got 0"),
            ({"channels": 0}, "channels must be at least 1; got 0"),
            ({"auxiliary_channels": -1}, "auxiliary_channels must be at least 1; got -1"),
            ({"width": 10}, "width must be a multiple of 4"),
            ({"dtype": "float8"}, "dtype must be float32 or bfloat16"),
            ({"scan_implementation": "cuda"}, "cuda"),
        ],
    )
    def test_wrong_ones(self, options, message):
        with pytest.raises(InputError, match=message):
            create_segmenter(**({"name": "msvmamba_nano", "rngs": nnx.Rngs(0)} | options))

    def test_one_image_cannot_train(self):
        with pytest.raises(InputError, match="use a batch of 2 or more"):
            jax.eval_shape(lambda x: bind(small_model(), get_weights(small_model()))(x, train=True), images(1))


def test_initialisation_of_the_heads():
    """ConvModule's: kaiming normal by the outputs; normal(0.01) for the classifiers."""

    @jax.jit
    def fresh(key):
        options = {"num_classes": 50, "dropout_site": 0, "axis": None, "dtype": jnp.float32, "rngs": nnx.Rngs(key)}
        decode_head = UperNet((8, 16, 32, 64), channels=64, **options)
        return get_parameters(nnx.List([decode_head, AuxiliaryHead(32, channels=24, **options)]))

    parameters = {path: np.asarray(x) for path, x in flatten(fresh(jax.random.key(0)))}
    kernels = [path for path in parameters if path.endswith("kernel")]
    assert len(kernels) == 15
    for path in kernels:
        x = parameters[path]
        fan_out = x.size // x.shape[-2]
        std = 0.01 if "classifier" in path else np.sqrt(2 / fan_out)
        assert abs(x.mean()) < 4 * std / np.sqrt(x.size), path
        assert abs(x.std() / std - 1) < 4 / np.sqrt(2 * x.size), path
        assert x.size < 10_000 or np.abs(x).max() > 3 * std, path  # not truncated
    for path, x in parameters.items():
        if not path.endswith("kernel"):
            assert (x == path.endswith("scale")).all(), path


@pytest.mark.nightly
def test_four_devices_train_as_one():
    """Under `pmap` each device sees two of eight images."""
    keys = jax.random.split(jax.random.key(1), 8)
    model = small_model(drop_path=0.2)
    spread = small_model(drop_path=0.2, axis="data")
    one = run(model, images(8), keys, train=True)
    called = jax.jit(lambda images, keys: bind(model, get_weights(model))(images, keys, train=True))
    np.testing.assert_allclose(called(images(8), keys), one[0], atol=1e-5)

    def step(weights, images, keys):
        bound = bind(spread, weights)
        return bound.with_auxiliary(images, keys, train=True), get_statistics(bound)

    parallel = jax.pmap(step, "data", in_axes=(None, 0, 0), out_axes=(0, None))
    (logits, auxiliary), statistics = jax.device_get(
        parallel(get_weights(spread), images(8).reshape(4, 2, HEIGHT, WIDTH, 3), keys.reshape(4, 2))
    )
    np.testing.assert_allclose(logits.reshape(one[0].shape), one[0], atol=1e-4)
    np.testing.assert_allclose(auxiliary.reshape(one[1].shape), one[1], atol=1e-4)
    for path, value in flatten(statistics):
        np.testing.assert_allclose(value, one[2][path], atol=1e-5, err_msg=path)


def test_labels_are_bytes():
    with pytest.raises(InputError, match="at most 255 classes; got 256"):
        create_segmenter("msvmamba_nano", num_classes=256, rngs=nnx.Rngs(0))
