"""What every registered variant promises. Widths and depths are cut down, so that variants of one kind compile once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomised

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.backbone import Backbone, BackboneConfig
from msvmamba_jax.models.classifier import Classifier
from msvmamba_jax.models.layers import DropPath, LayerNorm
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters
from msvmamba_jax.models.variants import VARIANTS, create_model, list_models

SMALL = {"width": 8, "depths": (1, 1, 1, 1), "num_classes": 5, "drop_path": 0.0}
HEIGHT, WIDTH = 37, 70  # neither a multiple of 4; the last stage has 2 x 3 positions
BFLOAT16_TOLERANCE = 0.05  # relative L2 of logits and maps; measured: at most 0.027

every_variant = pytest.mark.parametrize("name", list_models())
every_kind = pytest.mark.parametrize("name", ["msvmamba_nano", "vssm_tiny"])


@functools.cache
def small_model(name: str, **options) -> Classifier:
    """A small model with random parameters."""
    return randomised(abstract_model(lambda: create_model(name, rngs=nnx.Rngs(0), **(SMALL | options))))


def images(batch=2, height=HEIGHT, width=WIDTH) -> jax.Array:
    return jax.random.normal(jax.random.key(batch), (batch, height, width, 3))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, images, keys):
    model = nnx.merge(graph, state)
    maps = model.features(images, keys)
    return model.head(jnp.mean(model.norm(maps[-1]), (1, 2), dtype=jnp.float32)), maps


def run(model: Classifier, images: jax.Array, keys=None) -> tuple[jax.Array, list[jax.Array]]:
    """Logits and maps."""
    return _run(*nnx.split(model), images, keys)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graph, state, images):
    def loss(state, images):
        logits = nnx.merge(graph, state)(images)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, images)


def gradients(model: Classifier, images: jax.Array):
    """Gradients of parameters and images, and logits."""
    (state, images), logits = _gradients(*nnx.split(model), images)
    parameters = get_parameters(nnx.merge(nnx.graphdef(model), state))
    return {path: np.asarray(x) for path, x in flatten(parameters)}, images, logits


@every_variant
def test_is_made_with_options(name):
    """Every row of the table; one of each kind stands for the others in what follows."""
    model = small_model(name, num_classes=7, states=3)
    assert jax.eval_shape(model, images()).shape == (2, 7)
    assert model.num_classes == 7
    ssm = [x for path, x in flatten(get_parameters(model)) if path.endswith("A_log")]
    assert {x.shape[1] for x in ssm} == {3}


@every_kind
class TestContract:
    @pytest.mark.parametrize(("height", "width"), [(HEIGHT, WIDTH), (32, 32), (224, 224), (4, 131)])
    def test_shapes(self, name, height, width):
        model = small_model(name)
        logits, maps = jax.eval_shape(lambda x: (model(x), model.features(x)), images(3, height, width))
        assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
        rows, columns = height // 4, width // 4
        for features, found in zip((8, 16, 32, 64), maps, strict=True):
            assert (found.shape, found.dtype) == ((3, rows, columns, features), jnp.float32)
            rows, columns = -(-rows // 2), -(-columns // 2)
        if height % 32 == width % 32 == 0:
            assert [height // x.shape[1] for x in maps] == [width // x.shape[2] for x in maps] == [4, 8, 16, 32]

    def test_every_parameter_and_the_image_receive_a_gradient(self, name):
        parameters, image, _ = gradients(small_model(name), images())
        assert parameters.keys() == dict(flatten(get_parameters(small_model(name)))).keys()
        for path, gradient in parameters.items():
            assert np.isfinite(gradient).all(), path
            assert np.abs(gradient).max() > 1e-7, path
        assert np.isfinite(image).all()
        covered = np.abs(image[:, : HEIGHT // 4 * 4, : WIDTH // 4 * 4])
        assert (covered > 0).mean() > 0.999


def test_table_of_variants():
    assert {name: (v.backbone.width, *v.backbone.depths, v.backbone.states) for name, v in VARIANTS.items()} == {
        "msvmamba_nano": (48, 1, 2, 5, 2, 1),
        "msvmamba_micro": (64, 1, 2, 5, 2, 1),
        "msvmamba_tiny": (96, 1, 2, 9, 2, 1),
        "vssm_tiny": (96, 2, 2, 9, 2, 16),
        "vssm_small": (96, 2, 2, 27, 2, 16),
        "vssm_base": (128, 2, 2, 27, 2, 16),
    }


@every_kind
def test_remat_changes_nothing_but_memory(name):
    plain, plain_image, plain_logits = gradients(small_model(name), images())
    remat, remat_image, remat_logits = gradients(small_model(name, remat=True), images())
    np.testing.assert_allclose(remat_logits, plain_logits, atol=1e-5)
    np.testing.assert_allclose(remat_image, plain_image, atol=1e-5)
    for path, gradient in plain.items():
        np.testing.assert_allclose(remat[path], gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max(), err_msg=path)


@every_kind
def test_bfloat16_stays_close_to_float32(name, relative_error, record_property):
    logits, maps = run(small_model(name), images())
    half_logits, half_maps = run(small_model(name, dtype="bfloat16"), images())
    assert half_logits.dtype == jnp.float32
    assert {x.dtype.name for x in half_maps} == {"bfloat16"}
    errors = [relative_error(x, np.asarray(y)) for x, y in zip([half_logits, *half_maps], [logits, *maps], strict=True)]
    record_property("errors", errors)
    print(f"{name} in bfloat16: errors {errors}")
    assert max(errors) < BFLOAT16_TOLERANCE


@every_kind
def test_an_image_does_not_see_its_batch(name):
    both, both_maps = run(small_model(name), images())
    alone, maps = run(small_model(name), images()[1:])
    np.testing.assert_allclose(alone[0], both[1], atol=1e-5)
    for one, two in zip(maps, both_maps, strict=True):
        np.testing.assert_allclose(one[0], two[1], atol=1e-5 * np.abs(two).max())


def test_a_call_outside_of_jit_runs_one_program():
    model = small_model("msvmamba_nano")
    logits, maps = run(model, images())
    traced = []
    original = Backbone.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "__call__", lambda *arguments: traced.append(1) or original(*arguments))
        for _ in range(2):
            np.testing.assert_allclose(model(images()), logits, atol=1e-5)
    assert len(traced) == 1
    for found, expected in zip(model.features(images=images()), maps, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    keys = jax.random.key(0)
    dropping = small_model("msvmamba_nano", drop_path=0.5)
    np.testing.assert_allclose(dropping(images(), keys=keys), run(dropping, images(), keys)[0], atol=1e-5)


class TestWrongInputs:
    @pytest.mark.parametrize("shape", [(1, 3, 64, 3), (1, 64, 3, 3), (1, 64, 64, 4), (1, 3, 64, 64), (64, 64, 3)])
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3\) with at least 4 x 4 pixels"):
            small_model("msvmamba_nano")(jnp.zeros(shape))

    def test_bytes(self):
        with pytest.raises(ValueError, match="images must be normalised floating-point values; got uint8"):
            small_model("msvmamba_nano")(jnp.zeros((1, 32, 32, 3), jnp.uint8))

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("resnet50", {}, "there is no model 'resnet50'; choose one of msvmamba_nano, "),
            ("msvmamba_nano", {"num_classes": 0}, "num_classes must be at least 1; got 0"),
            ("msvmamba_nano", {"width": 10}, "width must be a multiple of 4, at least 8; got 10"),
            ("msvmamba_nano", {"width": 4}, "width must be a multiple of 4, at least 8; got 4"),
            ("msvmamba_nano", {"depths": (1, 2, 3)}, r"depths must be 4 numbers from 1 to 1000; got \(1, 2, 3\)"),
            ("msvmamba_nano", {"depths": [1, 0, 1, 1]}, r"depths must be 4 numbers from 1 to 1000; got \(1, 0, 1, 1\)"),
            ("vssm_tiny", {"states": 0}, "states must be at least 1; got 0"),
            ("vssm_tiny", {"drop_path": 1.0}, r"drop_path must be in \[0, 1\); got 1.0"),
            ("msvmamba_nano", {"dtype": "float8"}, "dtype must be float32 or bfloat16; got 'float8'"),
            ("msvmamba_nano", {"dtype": "int32"}, "dtype must be float32 or bfloat16; got 'int32'"),
        ],
    )
    def test_options(self, name, options, message):
        with pytest.raises(InputError, match=message):
            create_model(name, rngs=nnx.Rngs(0), **options)

    def test_mixer(self):
        with pytest.raises(InputError, match="mixer must be 'multi_scale' or 'cross_scan'; got 'attention'"):
            BackboneConfig(width=8, depths=(1, 1, 1, 1), mixer="attention")


class TestDropPath:
    def test_each_image_keeps_or_drops_its_whole_branch(self):
        x = jnp.ones((1000, 2, 3))
        y = np.asarray(DropPath(0.25, site=3)(x, jax.random.split(jax.random.key(0), 1000)))
        assert (y == y[:, :1, :1]).all()
        np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
        assert abs(y.mean() - 1) < 4 * np.sqrt(0.25 / 0.75 / 1000)  # the expectation is the plain branch

    def test_sites_decide_independently(self):
        keys = jax.random.split(jax.random.key(0), 1000)
        decisions = [np.asarray(DropPath(0.5, site)(jnp.ones((1000, 1)), keys))[:, 0] > 0 for site in range(3)]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs((decisions[a] == decisions[b]).mean() - 0.5) < 0.08

    def test_without_keys_or_rate_nothing_happens(self):
        x = jnp.ones((2, 3))
        assert DropPath(0.5, 0)(x, None) is x
        assert DropPath(0.0, 0)(x, jax.random.split(jax.random.key(0), 2)) is x

    def test_keeps_bfloat16(self):
        y = DropPath(0.5, 0)(jnp.ones((4, 1), jnp.bfloat16), jax.random.split(jax.random.key(0), 4))
        assert y.dtype == jnp.bfloat16

    def test_rates_rise_linearly(self):
        model = small_model("msvmamba_nano", depths=(1, 1, 2, 1), drop_path=0.4)
        blocks = [block for stage in model.backbone.stages for block in stage.blocks]
        np.testing.assert_allclose([block.mixer_drop_path.rate for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])
        np.testing.assert_allclose([block.ffn_drop_path.rate for block in blocks], [0, 0.1, 0.2, 0.3, 0.4])
        sites = [drop.site for block in blocks for drop in (block.mixer_drop_path, block.ffn_drop_path)]
        assert sites == list(range(10))

    def test_a_model_decides_by_image_whatever_the_batch(self):
        model, batch = small_model("msvmamba_nano", drop_path=0.5), images(4, 32, 32)
        logits, _ = run(model, batch, jax.random.key(7))
        again, _ = run(model, batch, jax.random.key(7))
        np.testing.assert_array_equal(logits, again)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(4))
        first, second = (run(model, batch[part], keys[part])[0] for part in (slice(0, 2), slice(2, 4)))
        np.testing.assert_allclose(jnp.concatenate([first, second]), logits, atol=1e-5)
        other_keys, _ = run(model, batch[:2], keys[2:])
        assert np.abs(np.asarray(other_keys - first)).max() > 1e-2


def test_layer_norm_of_a_large_mean():
    """The mean square minus the squared mean would lose every digit here."""
    x = np.random.default_rng(0).standard_normal((5, 64)) + 1e4
    norm = LayerNorm(64, dtype=jnp.float32)
    x = x.astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), exact, atol=2e-3)
    assert norm(jnp.ones((2, 64), jnp.bfloat16)).dtype == jnp.float32
