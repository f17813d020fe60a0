"""Time each detection operator beside its obvious version, and whole detectors with the shares of their parts.

python scripts/benchmark_detection.py --output detection.json
python scripts/benchmark_detection.py --quick                    # small shapes, for a CPU

Both versions of an operator run in this process on the same made-up proposals, after a check that they agree. The
obvious ones are what the definitions say: RoIAlign from whole maps, one suppression step for each box, a matrix of all
overlaps, all masks unpacked at once.

Of a detector, a share is the part of the time in which the GPU works that its profile gives to `backbone`, `fpn`,
`rpn`, `proposals` and so on, forward and, for training, backward (a fusion counts where its result belongs). On a CPU
there are no shares. Training is loss and gradients, without the optimiser. "ms" is by the clock, "busy" without the
gaps between programs. Compiling takes minutes.
"""

from __future__ import annotations

import argparse
import collections
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from msvmamba_jax import command
from msvmamba_jax.kernels.selective_scan.measurement import Program, median_seconds, profiled, relative_error
from msvmamba_jax.models.detection.anchors import STRIDES, pyramid_anchors
from msvmamba_jax.models.detection.assignment import RPN_THRESHOLDS, assign
from msvmamba_jax.models.detection.boxes import iou
from msvmamba_jax.models.detection.inference import PER_IMAGE, SCORE_THRESHOLD, THRESHOLD, detect
from msvmamba_jax.models.detection.masks import mask_targets, unpack_masks
from msvmamba_jax.models.detection.nms import multiclass_nms, nms, overlaps
from msvmamba_jax.models.detection.roi_align import axis_weights, region_levels, roi_align, sampling_grid
from msvmamba_jax.models.flops import stage_sizes
from msvmamba_jax.models.parameters import bind, get_parameters
from msvmamba_jax.models.variants import create_detector
from msvmamba_jax.tasks.detection_losses import Truth, detection_loss

CLASSES = 80
TRUTHS = 20
PADDED_TRUTHS = 100  # as COCO needs it; assignment alone would notice
PARTS = (
    "backbone",
    "fpn",
    "rpn",
    "proposals",
    "rpn_losses",
    "regions",
    "roi_align",
    "box_head",
    "mask_head",
    "mask_targets",
    "suppression",
)

Function = Callable[..., Any]


class Shapes:
    """Made-up inputs of the size asked for."""

    def __init__(self, arguments: argparse.Namespace):
        self.batch: int = arguments.batch
        self.regions: int = arguments.regions
        self.channels: int = arguments.channels
        self.height: int = arguments.size[0]
        self.width: int = arguments.size[1]
        self.rng = np.random.default_rng(0)
        sizes = stage_sizes(self.height, self.width)
        self.sizes = [*sizes, (-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2))]

    def boxes(self, *shape: int) -> jax.Array:
        """Boxes in the image around a few centres, with sides from 10 to 600 pixels where the image has 800 rows."""
        extent = np.asarray([self.width, self.height])
        centre = self.rng.uniform(0, 1, (*shape[:-1], 30, 2))[..., self.rng.integers(0, 30, shape[-1]), :] * extent
        centre = centre + self.rng.normal(0, 0.01, (*shape, 2)) * extent
        half = np.exp(self.rng.uniform(np.log(10), np.log(600), (*shape, 1)) + self.rng.normal(0, 0.3, (*shape, 2))) / 2
        half = half * min(self.height, self.width) / 800
        return jnp.asarray(
            np.clip(np.concatenate([centre - half, centre + half], -1), 0, np.tile(extent, 2)), jnp.float32
        )

    def scores(self, *shape: int) -> jax.Array:
        """Uniform in [0, 1)."""
        return jnp.asarray(self.rng.random(shape), jnp.float32)

    def pyramid(self, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
        """The four levels that regions are read from."""
        shape = (self.batch,)
        return [jnp.asarray(self.rng.standard_normal((*shape, *size, self.channels)), dtype) for size in self.sizes[:4]]

    def truth(self) -> Truth:
        """Whole boxes as masks."""
        boxes = self.boxes(self.batch, TRUTHS)
        y, x = np.arange(self.height)[:, None], np.arange(self.width)
        x1, y1, x2, y2 = np.asarray(boxes)[..., None, None].transpose(2, 0, 1, 3, 4)
        masks = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        return Truth(
            box=boxes,
            label=jnp.asarray(self.rng.integers(0, CLASSES, (self.batch, TRUTHS)), jnp.int32),
            valid=jnp.ones((self.batch, TRUTHS), bool),
            mask=jnp.asarray(np.packbits(masks, axis=-1)),
            image_size=jnp.full((self.batch, 2), jnp.asarray([self.height, self.width])),
        )


def dense_roi_align(pyramid: Sequence[jax.Array], boxes: jax.Array, bins: int) -> jax.Array:
    """Every region from its whole map on every level, of which one is kept."""
    own_level = region_levels(boxes)

    def region(image: Sequence[jax.Array], box: jax.Array, level: jax.Array) -> jax.Array:
        found = []
        for x, stride in zip(image, STRIDES, strict=False):
            weights = [
                axis_weights(
                    sampling_grid(box[axis], box[axis + 2], 1 / stride, size, bins),
                    jnp.arange(size, dtype=jnp.float32),
                    bins,
                )
                for axis, size in ((1, x.shape[0]), (0, x.shape[1]))
            ]
            rows, columns = (w.astype(x.dtype) for w in weights)
            along = jnp.einsum("qx,yxc->yqc", columns, x)
            found.append(jnp.einsum("py,yqc->pqc", rows, along))
        return jnp.stack(found)[level]

    def image(maps: Sequence[jax.Array], boxes: jax.Array, levels: jax.Array) -> jax.Array:
        return lax.map(lambda x: region(maps, *x), (boxes, levels), batch_size=8)

    return lax.map(lambda x: image(*x), (list(pyramid), boxes, own_level))


def loop_nms(boxes: jax.Array, scores: jax.Array, threshold: float) -> jax.Array:
    """One step for each box, by falling score, with the matrix of all overlaps."""
    order = jnp.argsort(scores, descending=True)
    against = overlaps(boxes[order][:, None], boxes[order], threshold)
    later = jnp.arange(boxes.shape[0])
    alive = lax.fori_loop(
        0, boxes.shape[0], lambda i, alive: alive & ~(against[i] & alive[i] & (later > i)), jnp.ones(scores.shape, bool)
    )
    return jnp.zeros_like(alive).at[order].set(alive)


def all_classes_nms(boxes: jax.Array, scores: jax.Array) -> jax.Array:
    """Suppression of each class by itself, then the best of all: their scores."""
    kept = jax.vmap(functools.partial(loop_nms, threshold=THRESHOLD), in_axes=1, out_axes=1)(boxes, scores)
    scores = jnp.where(kept & (scores > SCORE_THRESHOLD), scores, 0.0)
    return lax.top_k(scores.reshape(-1), PER_IMAGE)[0]


def matrix_assign(anchors: jax.Array, truths: jax.Array, valid: jax.Array) -> jax.Array:
    """From the matrix of all overlaps."""
    matrix = lax.optimization_barrier(jnp.where(valid, iou(anchors[:, None], truths), -1.0))
    best, owner, highest = matrix.max(1), matrix.argmax(1).astype(jnp.int32), matrix.max(0)
    owner = jnp.where(best >= RPN_THRESHOLDS.positive, owner, jnp.where(best < RPN_THRESHOLDS.negative, -1, -2))
    takes = (matrix == highest) & (highest >= RPN_THRESHOLDS.low_quality)
    last = jnp.max(jnp.where(takes, jnp.arange(truths.shape[0], dtype=jnp.int32), -1), axis=1)
    return jnp.where(last >= 0, last, owner)


def unpacked_targets(bits: jax.Array, boxes: jax.Array, owner: jax.Array, size: jax.Array) -> jax.Array:
    """RoIAlign of each region's whole mask as one more feature map of one channel."""
    masks = unpack_masks(bits, 8 * bits.shape[2])[owner].astype(jnp.float32)
    height, width = size
    weights = [
        axis_weights(
            sampling_grid(boxes[:, axis], boxes[:, axis + 2], 1.0, end, 28), jnp.arange(n, dtype=jnp.float32), 28
        )
        for axis, end, n in ((1, height, masks.shape[1]), (0, width, masks.shape[2]))
    ]
    return jnp.einsum("npy,nyx,nqx->npq", weights[0], masks, weights[1]) >= 0.5 - 2e-5


def operators(shapes: Shapes) -> dict[str, tuple[Function, Function, tuple[Any, ...], float]]:
    """Of each: ours, the obvious version, inputs, and the relative difference that is allowed."""
    pyramid, regions = shapes.pyramid(), shapes.boxes(shapes.batch, shapes.regions)
    ours = functools.partial(roi_align, strides=STRIDES[:4], bins=7)
    dense = functools.partial(dense_roi_align, bins=7)
    squared = lambda align: jax.grad(lambda x, boxes: jnp.sum(align(x, boxes).astype(jnp.float32) ** 2))  # noqa: E731
    level, scores = shapes.boxes(shapes.batch, 2 * shapes.regions), shapes.scores(shapes.batch, 2 * shapes.regions)
    class_boxes = jnp.repeat(regions[:, :, None], CLASSES, 2) + shapes.scores(*regions.shape[:2], CLASSES, 4)
    class_scores = shapes.scores(*regions.shape[:2], CLASSES) ** 8
    truth, anchors = shapes.truth(), pyramid_anchors(shapes.sizes)
    padding = ((0, 0), (0, PADDED_TRUTHS - TRUTHS), (0, 0))
    positives = regions[:, : shapes.regions // 4]
    owner = jnp.asarray(shapes.rng.integers(0, TRUTHS, positives.shape[:2]), jnp.int32)
    classwise = functools.partial(multiclass_nms, score_threshold=SCORE_THRESHOLD, threshold=THRESHOLD, count=PER_IMAGE)
    return {
        "RoIAlign": (ours, dense, (pyramid, regions), 0.02),
        "RoIAlign, gradient": (squared(ours), squared(dense), (pyramid, regions), 0.05),
        "suppression": (
            jax.vmap(lambda x, y: nms(x, y, 0.7)),
            jax.vmap(lambda x, y: loop_nms(x, y, 0.7)),
            (level, scores),
            0.0,
        ),
        "suppression by class": (
            jax.vmap(lambda x, y: classwise(x, y).score),
            jax.vmap(all_classes_nms),
            (class_boxes, class_scores),
            0.0,
        ),
        "assignment": (
            jax.vmap(lambda x, valid: assign(anchors, x, RPN_THRESHOLDS, valid_truths=valid).truth),
            jax.vmap(lambda x, valid: matrix_assign(anchors, x, valid)),
            (jnp.pad(truth.box, padding), jnp.pad(truth.valid, padding[:2])),
            0.0,
        ),
        "mask targets": (
            jax.vmap(mask_targets),
            jax.vmap(unpacked_targets),
            (truth.mask, positives, owner, truth.image_size),
            0.0,
        ),
    }


def compare(ours: Function, other: Function, inputs: tuple[Any, ...], tolerance: float, repeats: int) -> dict[str, Any]:
    """Milliseconds of both, and their ratio; they must agree."""
    run, run_other = jax.jit(ours), jax.jit(other)
    flat = lambda tree: jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(tree)])  # noqa: E731
    error = float(relative_error(flat(run(*inputs)), flat(run_other(*inputs))))
    if not error <= tolerance:
        raise AssertionError(f"the two versions differ by {error:.1e}")
    milliseconds = [1e3 * median_seconds(functools.partial(f, *inputs), repeats) for f in (run, run_other)]
    return {"ours_ms": milliseconds[0], "obvious_ms": milliseconds[1], "ratio": milliseconds[1] / milliseconds[0]}


def detectors(shapes: Shapes, options: dict[str, Any]) -> tuple[Any, dict[str, Function]]:
    """Random weights of a detector, and its inference and training, which each takes as its only argument."""
    model, truth = create_detector(**options, rngs=nnx.Rngs(0)), shapes.truth()
    images = jnp.asarray(shapes.rng.standard_normal((shapes.batch, shapes.height, shapes.width, 3)), jnp.float32)
    scales = jnp.ones((shapes.batch, 2))
    keys = jax.random.split(jax.random.key(0), shapes.batch)
    return get_parameters(model), {
        "inference": lambda parameters: detect(bind(model, parameters), images, truth.image_size, scales),
        "training": jax.grad(lambda parameters: detection_loss(bind(model, parameters), images, truth, keys)[0]),
    }


def whole(function: Function, parameters: Any, batch: int, repeats: int) -> dict[str, Any]:
    """Images per second and, on a GPU, milliseconds in which it works, and the share of each part in these."""
    lowered = jax.jit(function).lower(parameters)
    compiled = lowered.compile()
    seconds = median_seconds(functools.partial(compiled, parameters), repeats)
    row = {"ms": 1e3 * seconds, "images_per_second": batch / seconds}
    if jax.devices()[0].platform != "gpu":
        return row
    # Of what XLA puts into a CUDA graph the profiler only tells which graph it belongs to.
    compiled = lowered.compile({"xla_gpu_graph_min_graph_size": 1_000_000})
    jax.block_until_ready(compiled(parameters))
    programs = profiled(functools.partial(compiled, parameters), repeats)
    busy, share = parts(compiled.as_text(), programs)
    return row | {"busy_ms": 1e-6 * busy / repeats, "shares": share}


def parts(text: str, programs: Sequence[Program]) -> tuple[float, dict[str, float]]:
    """The time of all programs, in nanoseconds, and the share of each part of the detector, largest first.

    A part is a `jax.named_scope`: that of an instruction of the compiled HLO `text` is the innermost in its metadata.
    """
    scopes = dict(re.findall(r"%([\w.-]+) = [^\n]*op_name=\"([^\"]*)\"", text))
    times: collections.Counter[str] = collections.Counter()
    for program in programs:
        found = re.findall(rf"\b({'|'.join(PARTS)})\b", scopes.get(program.operation, ""))
        times[found[-1] if found else "other"] += program.end - program.start
    total = times.total()
    return total, {part: time / total for part, time in times.most_common()}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--variant", default="msvmamba_tiny", help="the detector's backbone")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--regions", type=int, default=512, help="regions of an image for single operators")
    parser.add_argument("--channels", type=int, default=256, help="of the pyramid")
    parser.add_argument("--repeats", type=int, default=5)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--operators-only", action="store_true", help="leave out whole detectors")
    only.add_argument("--detectors-only", action="store_true", help="leave out single operators")
    parser.add_argument("--quick", action="store_true", help="small shapes and a small detector, for a CPU")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    options: dict[str, Any] = {"name": arguments.variant, "channels": arguments.channels, "dtype": "bfloat16"}
    if arguments.quick:
        arguments.size, arguments.batch, arguments.regions, arguments.channels = (128, 192), 1, 64, 32
        arguments.repeats = 1
        options |= {"width": 16, "depths": (1, 1, 1, 1), "channels": 32, "hidden": 64}
    if min(arguments.batch, arguments.regions, arguments.channels, arguments.repeats, *arguments.size) < 1:
        parser.error("--batch, --size, --regions, --channels and --repeats must be at least 1")

    device = jax.devices()[0].device_kind
    report: dict[str, Any] = {"device": device, "jax": jax.__version__, "operators": {}, "detectors": {}}

    def save() -> None:
        if arguments.output:
            command.write_json(arguments.output, report)

    shapes = Shapes(arguments)
    print(f"{device}, jax {jax.__version__}, {shapes.batch} images of {shapes.height} x {shapes.width}, bfloat16 maps")
    if not arguments.detectors_only:
        print(f"{'operator':<22} {'ours ms':>10} {'obvious ms':>11} {'ratio':>7}")
        for name, (ours, other, inputs, tolerance) in operators(shapes).items():
            row = compare(ours, other, inputs, tolerance, arguments.repeats)
            report["operators"][name] = row
            print(f"{name:<22} {row['ours_ms']:>10.2f} {row['obvious_ms']:>11.2f} {row['ratio']:>7.1f}", flush=True)
            save()
    if not arguments.operators_only:
        parameters, functions = detectors(shapes, options)
        for name, function in functions.items():
            row = whole(function, parameters, shapes.batch, arguments.repeats)
            report["detectors"][name] = row
            rate = f"{row['ms']:.1f} ms, {row['images_per_second']:.1f} images/s"
            busy = f"; busy {row['busy_ms']:.1f} ms: " if "shares" in row else ""
            shares = ", ".join(f"{part} {100 * share:.0f} %" for part, share in row.get("shares", {}).items())
            print(f"{arguments.variant}, {name}: {rate}{busy}{shares}", flush=True)
            save()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
