"""Calls of modules that are compiled once, for the parity tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from msvmamba_jax.models.backbone import Backbone, Block

# Blocks of a stage are alike, so compile modules, not models.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_call(graph: nnx.GraphDef, method: str, state: nnx.State, *arguments: Any) -> Any:
    return getattr(nnx.merge(graph, state), method)(*arguments)


def call(module: nnx.Module, *arguments: Any, method: str = "__call__") -> Any:
    """What the module's method gives, compiled once for all modules of its structure."""
    graph, state = nnx.split(module)
    return _compiled_call(graph, method, state, *arguments)


def maps(backbone: Backbone, images: jax.Array) -> dict[str, jax.Array]:
    """What the stages' recordings hold: patch_embed, block0 (the first block) and stage0 to stage3."""
    x = call(backbone.patch_embedding, images)
    found = {"patch_embed": x}
    for index, stage in enumerate(backbone.stages):
        if index:
            x = call(backbone.downsamplings[index - 1], x)
        for block in stage.blocks:
            forget_place(block)
            x = call(block, x)
            found.setdefault("block0", x)
        found[f"stage{index}"] = x
    return found


def forget_place(block: Block) -> None:
    """Leaves nothing in `block` that tells it from the others of its stage (its place is for random keys only)."""
    block.mixer_drop_path.site = 0
    block.mixer_drop_path.rate = 0.0
    if block.ffn is not None:
        block.ffn_drop_path.site = 0
        block.ffn_drop_path.rate = 0.0


def norm_as_recorded(x: np.ndarray) -> float:
    """PyTorch's norm on the recording machine: float32 sums in eight lanes (up to 1e-4 off for the largest arrays)."""
    squares = np.pad(np.square(x.reshape(-1)), (0, -x.size % 8)).reshape(-1, 8)
    return float(np.sqrt(np.cumsum(squares, axis=0, dtype=np.float32)[-1].sum()))
