"""Operators with loops whose length depends on the data work on each device's images alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msvmamba_jax.models.detection.assignment import RPN_THRESHOLDS, assign
from msvmamba_jax.models.detection.nms import multiclass_nms, nms
from msvmamba_jax.models.detection.roi_align import roi_align


def align(maps, boxes):
    return roi_align([maps], 10 * boxes, strides=[4], bins=7, levels=jnp.zeros(boxes.shape[:2], jnp.int32))


OPERATORS = {
    "assignment": lambda maps, boxes, scores: jax.vmap(lambda x: assign(x, x[:5], RPN_THRESHOLDS))(boxes),
    "suppression": lambda maps, boxes, scores: jax.vmap(lambda x, y: nms(x, y, 0.3))(boxes, scores),
    "classes": lambda maps, boxes, scores: jax.vmap(
        lambda x, y: multiclass_nms(x.reshape(10, 6, 4), y.reshape(10, 6), score_threshold=0, threshold=0.3, count=20)
    )(boxes, scores),
    "alignment": lambda maps, boxes, scores: align(maps, boxes),
    "gradient": lambda maps, boxes, scores: jax.grad(lambda x: jnp.sum(align(x, boxes) ** 2))(maps),
}


@pytest.mark.parametrize("way", ["jit", "shard_map"])
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_travels(random_boxes, name, way):
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((4, 25, 30, 3)).astype(np.float32)
    arguments = maps, random_boxes(rng, 4, 60), rng.random((4, 60)).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()[:2]), "data")
    run = OPERATORS[name]
    if way == "shard_map":
        run = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    split = jax.device_put(arguments, NamedSharding(mesh, P("data")))
    compiled = jax.jit(run).lower(*split).compile()
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    expected = jax.jit(OPERATORS[name])(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), compiled(*split), expected)
