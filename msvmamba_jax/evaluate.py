"""Evaluate a checkpoint on the evaluation split of a configuration's data.

    python -m msvmamba_jax.evaluate --config configs/digits.py --checkpoint runs/digits

Prints the metrics of the raw and of the averaged weights, where there are both, with parameters and multiply-adds.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from absl import flags
from ml_collections import config_flags

from msvmamba_jax import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/: gives the data.", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint folder, or the workdir of a run.", required=True)
_WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "Evaluate only these; by default all there are.")
_THROUGHPUT = flags.DEFINE_bool("throughput", False, "Also measure images per second and milliseconds for a batch.")
_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
flags.mark_flag_as_required("config")

_TIMED_BATCHES = 10


def _main() -> None:
    import tqdm

    from msvmamba_jax.checkpoint import available_weights, build_model, find_checkpoint, load_checkpoint
    from msvmamba_jax.data.pipeline import evaluation_batches, evaluation_steps, load_dataset
    from msvmamba_jax.errors import InputError
    from msvmamba_jax.models.flops import classifier_flops
    from msvmamba_jax.models.parameters import count, get_parameters
    from msvmamba_jax.tasks.classification import Classification
    from msvmamba_jax.training.evaluation import evaluate
    from msvmamba_jax.training.parallelism import make_layout
    from msvmamba_jax.training.step import predict_step

    config = _CONFIG.value
    folder = find_checkpoint(_CHECKPOINT.value)
    dataset = load_dataset(config.data)
    layout = make_layout(config.parallelism, fsdp=config.fsdp, batch_size=config.batch_size)
    report: dict[str, Any] = {"checkpoint": str(folder)}
    predict: Any = None
    wanted: list[Any] = [_WEIGHTS.value] if _WEIGHTS.value else available_weights(folder)
    for weights in wanted:
        description, parameters = load_checkpoint(folder, weights)
        if len(description.class_names) != len(dataset.class_names):
            raise InputError(
                f"{folder} knows {len(description.class_names)} classes, but the data of this configuration has "
                f"{len(dataset.class_names)}: evaluate with the configuration it was trained with"
            )
        task = Classification(description=description)
        model = build_model(
            description, parameters, dtype=config.dtype, scan_implementation=config.scan_implementation or None
        )
        if predict is None:  # one program serves both kinds of weights
            predict = layout.compile_predict(predict_step(model, task))
        size = description.preprocessing.size
        report["model"] = description.model["name"]
        report["parameters"] = count(get_parameters(model))
        report["multiply_adds"] = classifier_flops(model.backbone.config, model.num_classes, size, size).total
        batches = tqdm.tqdm(
            evaluation_batches(dataset, batch_size=config.batch_size),
            total=evaluation_steps(dataset, batch_size=config.batch_size),
            unit="batch",
            desc=f"{weights} weights",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        report[weights] = evaluate(predict, get_parameters(model), batches, task, layout)
    if _THROUGHPUT.value:
        batch = layout.put(
            {k: v for k, v in next(evaluation_batches(dataset, batch_size=config.batch_size)).items() if k != "mask"}
        )
        report["throughput"] = _throughput(predict, layout.place(get_parameters(model)), batch, config.batch_size)
    _print(report, size)
    if _JSON.value:
        command.write_json(_JSON.value, report)


def _throughput(predict: Any, parameters: Any, batch: Any, batch_size: int) -> dict[str, Any]:
    """Median of several batches that are already on the device, after one that compiles and one that warms up."""
    import jax

    for _ in range(2):
        jax.block_until_ready(predict(parameters, batch))
    seconds = []
    for _ in range(_TIMED_BATCHES):
        began = time.perf_counter()
        jax.block_until_ready(predict(parameters, batch))
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    return {
        "images_per_second": batch_size / median,
        "milliseconds_per_batch": 1e3 * median,
        "batch_size": batch_size,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def _print(report: dict[str, Any], size: int) -> None:
    print(f"{report['checkpoint']}: {report['model']}, {report['parameters']:,} parameters, ", end="")
    print(f"{report['multiply_adds']:,} multiply-adds at {size} x {size}")
    for weights, name in (("raw", "raw weights"), ("ema", "averaged weights")):
        if weights in report:
            result = report[weights]
            print(
                f"{name}: top-1 {result['accuracy_top1']:.2%}, top-5 {result['accuracy_top5']:.2%}, "
                f"loss {result['loss']:.4f} on {result['images']:,} images"
            )
    if "throughput" in report:
        speed = report["throughput"]
        print(
            f"throughput: {speed['images_per_second']:.1f} images/s, {speed['milliseconds_per_batch']:.2f} ms for a "
            f"batch of {speed['batch_size']} on {speed['devices']} x {speed['device']}"
        )


def main() -> None:
    """The command."""
    command.run_with_config(_main)


if __name__ == "__main__":
    main()
