"""The training loop: reads top to bottom as a run goes."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx

from msvmamba_jax.data.pipeline import Dataset, evaluation_batches, train_batches, train_steps_per_epoch
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, count
from msvmamba_jax.tasks.base import Task
from msvmamba_jax.training.checkpoints import RunCheckpoints, abstract
from msvmamba_jax.training.devices import make_layout
from msvmamba_jax.training.evaluation import evaluate
from msvmamba_jax.training.logging import MetricsFile, Progress, TensorBoard
from msvmamba_jax.training.optimizer import adamw, schedule_of
from msvmamba_jax.training.pretrained import with_pretrained
from msvmamba_jax.training.step import initial_state, predict_step, train_step


class NonFiniteError(InputError):
    """The loss or the gradient is not a number any more."""


class StopRequest:
    """SIGTERM or Ctrl-C: the run saves, then ends. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def train(config: Any, task: Task, dataset: Dataset, workdir: Path) -> int | None:
    """Trains, or goes on with the run in `workdir`, to the last step.

    Args:
        config: see `configs/digits.py` for the keys.
        task: the task, with the model's description.
        dataset: what to train and evaluate on.
        workdir: where everything is written.

    Returns:
        None when the run is complete; the signal's number where it was stopped by one, after saving.

    Raises:
        InputError: an option is impossible, the workdir holds something else, or the loss is not finite.
    """
    stop = StopRequest()
    layout = make_layout(config.batch_size)
    steps = total_steps(config, dataset)
    _check(config, steps)

    # Model and optimiser. Abstract: the state is made, or restored, in place.
    options = {
        "dtype": config.dtype,
        "remat": config.remat,
        "scan_implementation": config.scan_implementation or None,
    }
    model = abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS, **options))
    schedule = schedule_of(config, steps)
    optimizer = adamw(
        schedule,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
        layer_decay=config.optimizer.layer_decay,
        freeze_backbone=config.freeze_backbone,
    )

    def init() -> dict[str, Any]:
        return initial_state(task.description.build(rngs=nnx.Rngs(config.seed), **options), optimizer)

    # Resume: the latest checkpoint in the workdir, or a fresh start.
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = RunCheckpoints(workdir, task.description)
    start = checkpoints.latest_step()
    if start is None:
        state = jax.jit(init, out_shardings=layout.replicated)()
        state = with_pretrained(state, config, task.description, workdir)
        start = 0
    else:
        state = checkpoints.restore(abstract(jax.eval_shape(init), layout.replicated))
    _write_config(workdir, config)
    _announce(config, task, dataset, workdir, steps, start, count(state["params"]))
    if start >= steps:
        print(f"the run is complete: {start} of {steps} steps are done")
        checkpoints.close()
        return None

    step_fn = jax.jit(
        train_step(
            model,
            task,
            optimizer,
            schedule,
            seed=config.seed,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            freeze_backbone=config.freeze_backbone,
        ),
        in_shardings=(layout.replicated, layout.batch),
        out_shardings=(layout.replicated, None),
        donate_argnums=0,
    )
    predict_fn = jax.jit(predict_step(model, task), in_shardings=(layout.replicated, layout.batch))
    batches = train_batches(
        dataset, batch_size=config.batch_size, seed=config.seed, start_step=start, workers=config.data.workers
    )
    metrics_file = MetricsFile(workdir / "metrics.jsonl", start)
    tensorboard = TensorBoard(workdir / "tensorboard", start)
    progress = Progress(steps, start)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        metrics_file.write(step, metrics)
        tensorboard.write(step, metrics)

    def evaluate_both(step: int) -> float:
        scores = {}
        for name, weights in (("eval", "params"), ("eval_ema", "ema")):
            host_batches = evaluation_batches(dataset, batch_size=config.batch_size)
            result = evaluate(predict_fn, state[weights], host_batches, task, layout)
            scores[weights] = result[task.score]
            write(step, {f"{name}/{key}": value for key, value in result.items()})
            progress.say(f"step {step}, {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.items()))
        return scores["ema"]

    try:
        clock, since, step = time.perf_counter(), start, start
        while step < steps and stop.signal is None:
            state, device_metrics = step_fn(state, layout.put(next(batches)))
            step += 1
            # Read every step: a bad value is noticed before anything of it is saved, and no more than one step is ever
            # queued, which collectives of simulated devices need.
            metrics = {f"train/{name}": float(value) for name, value in jax.device_get(device_metrics).items()}
            _check_finite(step, metrics, workdir)
            progress.advance()
            if step == start + 1:  # leave the compilation out of the rate
                clock, since = time.perf_counter(), step
            elif step % config.log_every == 0 or step == steps:
                rate = (step - since) * config.batch_size / (time.perf_counter() - clock)
                metrics["train/images_per_second"] = rate
                write(step, metrics)
                progress.show(step, metrics)
                clock, since = time.perf_counter(), step
            evaluated = step % config.evaluate_every == 0 or step == steps
            if evaluated:
                score = evaluate_both(step)
            if evaluated or step % config.save_every == 0:
                checkpoints.save(step, state, score if evaluated else None)
                clock, since = time.perf_counter(), step
        if stop.signal is not None and step > start:
            checkpoints.save(step, state)
        checkpoints.wait()
    finally:
        batches.close()
        progress.close()
        metrics_file.close()
        tensorboard.close()
        checkpoints.close()
    if stop.signal is not None and step < steps:
        name = signal.Signals(stop.signal).name
        print(f"stopped by {name} after step {step} of {steps}; run the same command again to go on")
        return stop.signal
    return None


def total_steps(config: Any, dataset: Dataset) -> int:
    """`config.epochs` in steps."""
    return math.ceil(config.epochs * train_steps_per_epoch(dataset, batch_size=config.batch_size))


def _check(config: Any, steps: int) -> None:
    for name in ("log_every", "evaluate_every", "save_every", "accumulate"):
        if config[name] < 1:
            raise InputError(f"config.{name} must be at least 1; got {config[name]}")
    if steps < 1:
        raise InputError(f"config.epochs is {config.epochs}, which makes no step")
    if config.batch_size % (config.accumulate * jax.device_count()):
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {config.accumulate} parts "
            f"on {jax.device_count()} devices: choose a multiple of {config.accumulate * jax.device_count()}"
        )
    if not 0.0 <= config.ema_decay < 1.0:
        raise InputError(f"config.ema_decay must be in [0, 1); got {config.ema_decay}")


def _check_finite(step: int, metrics: Mapping[str, float], workdir: Path) -> None:
    bad = [name for name in ("train/loss", "train/gradient_norm") if not np.isfinite(metrics[name])]
    if bad:
        raise NonFiniteError(
            f"{' and '.join(bad)} not finite at step {step} (learning rate {metrics['train/learning_rate']:.3g}); "
            f"nothing of this step was saved. Look at the curves in {workdir / 'metrics.jsonl'}, then try a lower "
            "config.optimizer.learning_rate, a longer warm-up, or config.dtype=float32, and start again: the run goes "
            "on from its latest checkpoint"
        )


def _write_config(workdir: Path, config: Any) -> None:
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=2, default=list) + "\n")
    os.replace(temporary, workdir / "config.json")


def _announce(
    config: Any, task: Task, dataset: Dataset, workdir: Path, steps: int, start: int, parameters: int
) -> None:
    device = jax.devices()[0]
    where = f"going on from step {start}" if start else "from the start"
    print(
        f"Training {task.description.model['name']} ({parameters:,} parameters, {config.dtype}) on "
        f"{len(dataset.train):,} images of {len(dataset.class_names)} classes for {steps:,} steps of "
        f"{config.batch_size}, {where}, on {jax.device_count()} x {device.device_kind}; everything goes to {workdir}.",
        flush=True,
    )
