"""Evaluate a checkpoint on the evaluation split of a configuration's data.

    python -m msvmamba_jax.evaluate --config configs/digits.py --checkpoint runs/digits

Prints the metrics of the raw and of the averaged weights, where there are both, with parameters and multiply-adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from msvmamba_jax import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/: gives the data.", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A checkpoint folder, or the workdir of a run.", required=True)
_WEIGHTS = flags.DEFINE_enum("weights", None, ["raw", "ema"], "Evaluate only these; by default all there are.")
_PER_CLASS = flags.DEFINE_bool(
    "per_class", None, "Print a row for each class; by default for all tasks but classification."
)
_THROUGHPUT = flags.DEFINE_bool("throughput", False, "Also measure images per second and milliseconds for a batch.")
_JSON = flags.DEFINE_string("json", None, "Also write everything, with a row for each class, to this file.")
_DETECTIONS = flags.DEFINE_string(
    "detections",
    None,
    "Detection: also write all that was found to this file, in COCO's results format; of the averaged weights, where "
    "both kinds are evaluated.",
)
flags.mark_flag_as_required("config")

_TIMED_BATCHES = 10
_NAMES = {"raw": "raw weights", "ema": "averaged weights"}


def _main() -> None:
    from msvmamba_jax.checkpoint import available_weights, build_model, find_checkpoint, load_checkpoint
    from msvmamba_jax.data.datasets import load_dataset
    from msvmamba_jax.data.pipeline import evaluation_batches, plan_evaluation
    from msvmamba_jax.errors import InputError
    from msvmamba_jax.models.parameters import count, get_parameters, get_weights
    from msvmamba_jax.programs import keep_compiled_programs
    from msvmamba_jax.tasks.registry import task_of_checkpoint
    from msvmamba_jax.training.evaluation import evaluate, evaluation_batch_size
    from msvmamba_jax.training.parallelism import make_layout
    from msvmamba_jax.training.step import predict_step

    keep_compiled_programs()
    config = _CONFIG.value
    folder = find_checkpoint(_CHECKPOINT.value)
    dataset = load_dataset(config.data)
    batch_size = evaluation_batch_size(config)
    layout = make_layout(config.parallelism, fsdp=config.fsdp, batch_size=batch_size)
    if _DETECTIONS.value and config.task != "detection":
        raise InputError(f"--detections is for detection, but the configuration is for {config.task!r}")
    for path in filter(None, (_JSON.value, _DETECTIONS.value)):
        command.check_writable(path)
    report: dict[str, Any] = {"checkpoint": str(folder)}
    predict: Any = None
    wanted: list[Any] = [_WEIGHTS.value] if _WEIGHTS.value else available_weights(folder)
    for kind in wanted:
        description, weights = load_checkpoint(folder, kind)
        task = task_of_checkpoint(config, description, dataset)
        model = build_model(
            description, weights, dtype=config.dtype, scan_implementation=config.scan_implementation or None
        )
        if predict is None:  # one program serves both kinds of weights
            predict = layout.compile_predict(predict_step(model, task))
            height, width = description.preprocessing.nominal_size
            report["model"] = description.model["name"]
            report["parameters"] = count(get_parameters(model))
            report["multiply_adds"] = description.flops(height, width).total
            print(
                f"{folder}: {report['model']}, {report['parameters']:,} parameters, {report['multiply_adds']:,} "
                f"multiply-adds at {height} x {width}",
                flush=True,
            )
        evaluator: Any = evaluate(
            predict, get_weights(model), dataset, task, layout, batch_size=batch_size, title=_NAMES[kind]
        ).evaluator
        report[kind] = {**evaluator.result(), "per_class": evaluator.per_class()}
        print(f"{_NAMES[kind]}: {evaluator.sentence()}", flush=True)
        if _PER_CLASS.value if _PER_CLASS.value is not None else config.task != "classification":
            print(command.table(report[kind]["per_class"]))
    if _THROUGHPUT.value:
        batch = next(evaluation_batches(dataset, plan_evaluation(dataset, batch_size=batch_size)))
        del batch["mask"]
        report["throughput"] = _throughput(predict, layout.place(get_weights(model)), layout.put(batch), batch_size)
        _print_throughput(report["throughput"])
    if _JSON.value:
        command.write_json(_JSON.value, report)
    if _DETECTIONS.value:
        evaluator.save(_DETECTIONS.value)  # of the last weights


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


def _print_throughput(speed: Mapping[str, Any]) -> None:
    print(
        f"throughput: {speed['images_per_second']:.1f} images/s, {speed['milliseconds_per_batch']:.2f} ms for a "
        f"batch of {speed['batch_size']} on {speed['devices']} x {speed['device']}"
    )


def main() -> None:
    """The command."""
    command.run_with_config(_main)


if __name__ == "__main__":
    main()
