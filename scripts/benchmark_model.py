"""Images per second and memory of whole models, and the scan's share of their time, for each scan that runs here.

python scripts/benchmark_model.py --variants msvmamba_nano msvmamba_tiny --output model.json
python scripts/benchmark_model.py --task segmentation --variants msvmamba_tiny

Inference is the jitted prediction for a batch (for segmentation without, for detection with all that comes after the
network). Training is the whole step of `train`: stochastic depth, loss, gradients, AdamW, and for classification
averaged weights. Both run on one device, on arrays that are there already. Memory is the most that was in use at a
time, as the device's allocator reports it (a CPU's does not).

The share of the scan is not taken from a profile. It is the time that every block's scans take when they are run alone
on inputs of the same shapes (forward for inference; forward with what it keeps, and backward, for training), summed
over the blocks, over the time of the whole. In the model a scan may find its inputs in the cache, or its memory traffic
may share the time of something else.

Each measurement has a process of its own, so that the memory is its own and one that fails does not end the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msvmamba_jax import command
from msvmamba_jax.checkpoint import KINDS, Description
from msvmamba_jax.kernels.selective_scan import available_implementations, implementations
from msvmamba_jax.kernels.selective_scan.costs import traffic
from msvmamba_jax.kernels.selective_scan.measurement import examples, measure, median_seconds, workload
from msvmamba_jax.kernels.selective_scan.shapes import VARIANTS, model_scans
from msvmamba_jax.models.detection.inference import detect
from msvmamba_jax.models.parameters import SHAPE_KEYS, Tree, abstract_model, bind, flatten, get_weights, unflatten
from msvmamba_jax.tasks.base import Task
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.tasks.detection import Detection
from msvmamba_jax.tasks.segmentation import Segmentation
from msvmamba_jax.training.optimizer import adamw, cosine_schedule
from msvmamba_jax.training.step import initial_state, train_step

TASKS = {  # images at once, height and width, classes
    "classification": (128, (224, 224), 1000),
    "segmentation": (16, (512, 512), 150),
    "detection": (2, (800, 1344), 80),
}
MEASUREMENTS = ("inference_bfloat16", "inference_float32", "training_bfloat16", "training_float32")
OBJECTS = 16  # in each image of a detection batch


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process is to find out; it travels there as JSON."""

    task: str
    variant: str
    implementation: str
    name: str  # one of MEASUREMENTS
    batch: int
    height: int
    width: int
    repeats: int
    scan_share: bool

    @property
    def training(self) -> bool:
        """Whether it is about the training step."""
        return self.name.startswith("training")

    @property
    def dtype(self) -> str:
        """Of the computation."""
        return self.name.partition("_")[2]

    @property
    def options(self) -> dict[str, Any]:
        """For `Description.build`."""
        return {"dtype": self.dtype, "scan_implementation": self.implementation}

    @property
    def description(self) -> Description:
        """The model."""
        classes = TASKS[self.task][2]
        return Description(
            model={"name": self.variant, "num_classes": classes},
            task=self.task,
            class_names=tuple(map(str, range(classes))),
            preprocessing=KINDS[self.task].preprocessing(),
        )


def random_parameters(model: nnx.Module) -> Tree:
    """Weights for an abstract model. No time depends on them, and its own initialisation takes long to compile."""
    rng = np.random.default_rng(0)
    shapes = flatten(get_weights(model))
    drawn = {name: jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype) for name, leaf in shapes}
    return unflatten({name: jnp.abs(x) if name.endswith(".var") else x for name, x in drawn.items()})


def make_task(description: Description) -> Task:
    """The task, without what only evaluation needs."""
    if description.task == "classification":
        return Classification(description=description, label_smoothing=0.1)
    if description.task == "segmentation":
        return Segmentation(description=description)
    return Detection(description=description)


def make_batch(wanted: Measurement) -> dict[str, np.ndarray]:
    """A training batch, as the data pipeline gives it."""
    rng = np.random.default_rng(0)
    b, h, w, classes = wanted.batch, wanted.height, wanted.width, TASKS[wanted.task][2]
    images = rng.integers(0, 256, (b, h, w, 3), dtype=np.uint8)
    extent = np.tile(np.array([h, w], np.int32), (b, 1))
    if wanted.task == "classification":
        return {"image": images, "label": rng.integers(0, classes, b, dtype=np.int32)}
    if wanted.task == "segmentation":
        return {"image": images, "labels": rng.integers(0, classes, (b, h, w), dtype=np.uint8), "extent": extent}
    corner = rng.uniform(0, 0.6, (b, OBJECTS, 2)) * (w, h)
    sides = rng.uniform(0.02, 0.4, (b, OBJECTS, 2)) * (w, h)
    return {
        "image": images,
        "extent": extent,
        "boxes": np.concatenate([corner, corner + sides], axis=-1).astype(np.float32),
        "labels": rng.integers(0, classes, (b, OBJECTS), dtype=np.int32),
        "valid": np.ones((b, OBJECTS), bool),
        "masks": rng.integers(0, 256, (b, OBJECTS, h, -(-w // 8)), dtype=np.uint8),
    }


def inference(wanted: Measurement) -> Callable[[], Any]:
    """A function without arguments that starts one forward pass."""
    model = abstract_model(lambda: wanted.description.build(rngs=SHAPE_KEYS, **wanted.options))
    weights = random_parameters(model)
    images = jax.random.normal(jax.random.key(0), (wanted.batch, wanted.height, wanted.width, 3), jnp.float32)
    extent = jnp.tile(jnp.array([wanted.height, wanted.width], jnp.int32), (wanted.batch, 1))

    def forward(weights: Tree, images: jax.Array) -> Any:
        bound = bind(model, weights)
        if wanted.task == "detection":
            return detect(bound, images, extent, jnp.ones((wanted.batch, 2)))
        return bound(images)

    compiled = jax.jit(forward)
    return lambda: compiled(weights, images)


def training(wanted: Measurement) -> Callable[[], Any]:
    """A function without arguments that starts one training step, with the state that the last one left.

    The recipe is the ImageNet one of the original's authors, of which only the kind of work matters here.
    """
    description = wanted.description
    task, ema = make_task(description), wanted.task == "classification"
    schedule = cosine_schedule(peak=1e-3, warmup_start=1e-6, minimum=1e-5, warmup_steps=100, total_steps=10_000)
    optimizer = adamw(schedule, weight_decay=0.05, clip_norm=5.0)
    model = abstract_model(lambda: description.build(rngs=SHAPE_KEYS, **wanted.options))
    step = jax.jit(
        train_step(model, task, optimizer, schedule, seed=0, ema_decay=0.9999, accumulate=1), donate_argnums=0
    )
    state = jax.jit(lambda weights: initial_state(bind(model, weights), optimizer, ema=ema))(random_parameters(model))
    batch = jax.device_put(make_batch(wanted))

    def execute() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return execute


def scan_seconds(wanted: Measurement) -> float:
    """Seconds that the scans of all blocks take, each run alone."""
    total = 0.0
    for shape, blocks in model_scans(wanted.variant, wanted.batch, wanted.height, wanted.width):
        sets = examples(shape, wanted.dtype, traffic(shape, wanted.dtype, "forward"))
        for direction in ("saving", "backward") if wanted.training else ("forward",):
            found = measure(*workload(direction, shape, wanted.implementation, sets), wanted.repeats)
            total += 1e-3 * blocks * found.milliseconds
    return total


def run_measurement(wanted: Measurement) -> dict[str, Any]:
    """What a process prints."""
    execute = (training if wanted.training else inference)(wanted)
    began = time.perf_counter()
    jax.block_until_ready(execute())
    first_call_seconds = time.perf_counter() - began
    seconds = median_seconds(execute, wanted.repeats)
    memory = jax.devices()[0].memory_stats()
    scans = scan_seconds(wanted) if wanted.scan_share else None
    return {
        "milliseconds": 1e3 * seconds,
        "images_per_second": wanted.batch / seconds,
        "first_call_seconds": first_call_seconds,
        "peak_bytes": memory and memory["peak_bytes_in_use"],
        "scan_milliseconds": scans and 1e3 * scans,
        "scan_share": scans and scans / seconds,
    }


def describe() -> dict[str, Any]:
    """The device, and what runs on it."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "available": available_implementations(),
    }


def in_own_process(wanted: Measurement | None) -> dict[str, Any]:
    """The result of `run_measurement` (None: of `describe`), or what went wrong as {"failed": sentence}.

    The process that starts the others does not touch the device: it would hold a part of its memory.
    """
    task = json.dumps(wanted and dataclasses.asdict(wanted))
    # Otherwise the last line of a traceback would be JAX's note on what it left out, not the reason.
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", task], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
    return {"failed": lines[-1]}


HEADER = (
    f"{'model':<15} {'implementation':<14} {'measurement':<18} {'ms':>10} {'images/s':>10} {'peak GiB':>9} "
    f"{'scan ms':>10} {'share':>6}"
)


def line(row: dict[str, Any]) -> str:
    """The row as it is printed."""
    start = f"{row['variant']:<15} {row['implementation']:<14} {row['name']:<18} "
    if "failed" in row:
        return f"{start}failed: {row['failed']}"
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"
    scans = ("-", "-") if row["scan_share"] is None else (f"{row['scan_milliseconds']:.2f}", f"{row['scan_share']:.0%}")
    return (
        f"{start}{row['milliseconds']:>10.2f} {row['images_per_second']:>10.1f} {peak:>9} {scans[0]:>10} {scans[1]:>6}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    models = [name for name in VARIANTS if name.startswith("msvmamba")]
    parser.add_argument("--variants", choices=VARIANTS, default=models, help=f"default: {' '.join(models)}", **several)
    parser.add_argument(
        "--measurements",
        choices=MEASUREMENTS,
        default=list(MEASUREMENTS[:3]),
        help=f"default: {' '.join(MEASUREMENTS[:3])}; also {MEASUREMENTS[3]}",
        **several,
    )
    parser.add_argument("--implementations", choices=implementations(), help="default: all that run here", **several)
    parser.add_argument("--task", choices=TASKS, default="classification", help="default: %(default)s")
    parser.add_argument("--batch", type=int, help="images at once (default: 128, 16 or 2, by the task)")
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PIXELS",
        help="both ways, or height and width (default: 224, 512, or 800 1344, by the task)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (default: 5)")
    parser.add_argument("--no-scan-share", action="store_true", help="leave out the scans by themselves")
    parser.add_argument("--quick", action="store_true", help="small images, two at once, timed once")
    parser.add_argument("--output", metavar="FILE", help="write everything to this JSON file as well")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """The command."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.child:
        task = json.loads(arguments.child)
        print(json.dumps(run_measurement(Measurement(**task)) if task else describe()))
        return 0
    if arguments.quick:
        arguments.batch, arguments.image_size, arguments.repeats = 2, [32], 1
    batch, image_size, _ = TASKS[arguments.task]
    arguments.batch = batch if arguments.batch is None else arguments.batch
    height, width = image_size if arguments.image_size is None else (arguments.image_size * 2)[:2]
    if min(arguments.batch, arguments.repeats) < 1 or min(height, width) < 4:
        parser.error("--batch and --repeats must be at least 1, --image-size at least 4")
    machine = in_own_process(None)
    if "failed" in machine:
        print(f"error: the device cannot be used: {machine['failed']}", file=sys.stderr)
        return 1
    here = [name for name, reason in machine["available"].items() if reason is None]
    for name in arguments.implementations or ():
        if name not in here:
            parser.error(f"the implementation {name!r} cannot run here: {machine['available'][name]}")

    report: dict[str, Any] = {
        "device": machine["device"],
        "jax": machine["jax"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "child"},
        "finished": False,
        "rows": [],
    }
    print(
        f"{machine['device']}, jax {machine['jax']}, {arguments.task}, batch {arguments.batch}, "
        f"{height} x {width} pixels"
    )
    print(HEADER, flush=True)
    for variant in arguments.variants:
        for implementation in arguments.implementations or here:
            for name in arguments.measurements:
                wanted = Measurement(
                    task=arguments.task,
                    variant=variant,
                    implementation=implementation,
                    name=name,
                    batch=arguments.batch,
                    height=height,
                    width=width,
                    repeats=arguments.repeats,
                    scan_share=not arguments.no_scan_share,
                )
                row = {**dataclasses.asdict(wanted), **in_own_process(wanted)}
                print(line(row), flush=True)
                report["rows"].append(row)
                if arguments.output:  # a run that is cut off leaves what it has found out
                    command.write_json(arguments.output, report)
    report["finished"] = True
    if arguments.output:
        command.write_json(arguments.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
