"""Images per second and memory of whole models, and the scan's share of their time, for each scan that runs here.

python scripts/benchmark_model.py --variants msvmamba_nano msvmamba_tiny --output model.json

Inference is the jitted forward pass on normalised images. Training is the whole step of `train`: stochastic depth,
loss, gradients, AdamW, averaged weights. Both run on one device, on arrays that are there already. Memory is the most
that was in use at a time, as the device's allocator reports it (a CPU's does not).

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
from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.kernels.selective_scan import available_implementations, implementations
from msvmamba_jax.kernels.selective_scan.costs import traffic
from msvmamba_jax.kernels.selective_scan.measurement import examples, measure, median_seconds, workload
from msvmamba_jax.kernels.selective_scan.shapes import VARIANTS, model_scans
from msvmamba_jax.models.parameters import SHAPE_KEYS, Tree, abstract_model, bind, flatten, get_parameters, unflatten
from msvmamba_jax.models.variants import create_model
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.training.optimizer import adamw, cosine_schedule
from msvmamba_jax.training.step import initial_state, train_step

MEASUREMENTS = ("inference_bfloat16", "inference_float32", "training_bfloat16", "training_float32")
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process is to find out; it travels there as JSON."""

    variant: str
    implementation: str
    name: str  # one of MEASUREMENTS
    batch: int
    image_size: int
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
        """For `create_model`, beside the name."""
        return {"dtype": self.dtype, "scan_implementation": self.implementation}


def random_parameters(model: nnx.Module) -> Tree:
    """Weights for an abstract model. No time depends on them, and its own initialisation takes long to compile."""
    rng = np.random.default_rng(0)
    shapes = flatten(get_parameters(model))
    return unflatten({name: jnp.asarray(rng.normal(0.0, 0.1, leaf.shape), leaf.dtype) for name, leaf in shapes})


def inference(wanted: Measurement) -> Callable[[], Any]:
    """A function without arguments that starts one forward pass."""
    model = abstract_model(lambda: create_model(wanted.variant, num_classes=CLASSES, rngs=SHAPE_KEYS, **wanted.options))
    parameters = random_parameters(model)
    shape = (wanted.batch, wanted.image_size, wanted.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    forward = jax.jit(lambda parameters, images: bind(model, parameters)(images))
    return lambda: forward(parameters, images)


def training(wanted: Measurement) -> Callable[[], Any]:
    """A function without arguments that starts one training step, with the state that the last one left.

    The recipe is the ImageNet one of the original's authors, of which only the kind of work matters here.
    """
    description = Description(
        model={"name": wanted.variant, "num_classes": CLASSES},
        class_names=tuple(map(str, range(CLASSES))),
        preprocessing=Preprocessing(),
    )
    task = Classification(description=description, label_smoothing=0.1)
    schedule = cosine_schedule(peak=1e-3, warmup_start=1e-6, minimum=1e-5, warmup_steps=100, total_steps=10_000)
    optimizer = adamw(schedule, weight_decay=0.05, clip_norm=5.0)
    model = abstract_model(lambda: description.build(rngs=SHAPE_KEYS, **wanted.options))
    step = jax.jit(
        train_step(model, task, optimizer, schedule, seed=0, ema_decay=0.9999, accumulate=1), donate_argnums=0
    )
    state = jax.jit(lambda parameters: initial_state(bind(model, parameters), optimizer))(random_parameters(model))
    rng = np.random.default_rng(0)
    shape = (wanted.batch, wanted.image_size, wanted.image_size, 3)
    batch = jax.device_put(
        {
            "image": rng.integers(0, 256, shape, dtype=np.uint8),
            "label": rng.integers(0, CLASSES, wanted.batch, dtype=np.int32),
        }
    )

    def execute() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return execute


def scan_seconds(wanted: Measurement) -> float:
    """Seconds that the scans of all blocks take, each run alone."""
    total = 0.0
    for shape, blocks in model_scans(wanted.variant, wanted.batch, wanted.image_size, wanted.image_size):
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
    done = subprocess.run([sys.executable, __file__, "--child", task], capture_output=True, text=True, check=False)
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
    parser.add_argument("--batch", type=int, default=128, help="images at once (default: 128)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels, both ways (default: 224)")
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
        arguments.batch, arguments.image_size, arguments.repeats = 2, 32, 1
    if min(arguments.batch, arguments.repeats) < 1 or arguments.image_size < 4:
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
    size = arguments.image_size
    print(f"{machine['device']}, jax {machine['jax']}, batch {arguments.batch}, {size} x {size} pixels")
    print(HEADER, flush=True)
    for variant in arguments.variants:
        for implementation in arguments.implementations or here:
            for name in arguments.measurements:
                wanted = Measurement(
                    variant=variant,
                    implementation=implementation,
                    name=name,
                    batch=arguments.batch,
                    image_size=size,
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
