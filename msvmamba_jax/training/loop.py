"""The training loop: reads top to bottom as a run goes."""

from __future__ import annotations

import collections
import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx

from msvmamba_jax.checkpoint import KINDS, Weights
from msvmamba_jax.data.pipeline import Dataset, train_batches, unused_records
from msvmamba_jax.errors import InputError
from msvmamba_jax.kernels.selective_scan import preferred_implementation
from msvmamba_jax.models.parameters import SHAPE_KEYS, Tree, abstract_model, bind, count, flatten, get_weights
from msvmamba_jax.tasks.base import Task
from msvmamba_jax.training.checkpoints import RunCheckpoints
from msvmamba_jax.training.durations import Clock, make_clock
from msvmamba_jax.training.evaluation import Stopped, evaluate, evaluation_batch_size
from msvmamba_jax.training.logging import Report, SilentReport
from msvmamba_jax.training.optimizer import adamw, peak_rate, schedule_of, warmup_steps
from msvmamba_jax.training.parallelism import make_layout
from msvmamba_jax.training.pretrained import find_pretrained, with_pretrained
from msvmamba_jax.training.processes import is_main, largest, together
from msvmamba_jax.training.step import State, initial_state, predict_step, train_step, weights_of
from msvmamba_jax.training.watching import Interval, Profile

_ASK_EVERY = 16  # steps between two questions to the other processes whether to stop


class NonFiniteError(InputError):
    """The loss or the gradient is not a number any more."""


class StopRequest:
    """SIGTERM or Ctrl-C on any process: the run saves, then ends everywhere. A second signal ends a process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)

    def agreed(self) -> int | None:
        """The signal that this or another process of the run has got, the same on all; all must call it."""
        return largest(self.signal or 0) or None

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
    layout = make_layout(config.parallelism, fsdp=config.fsdp, batch_size=config.batch_size)
    clock = make_clock(config, dataset)
    steps = clock.steps
    log_every, evaluate_every, save_every = (
        clock.steps_of(name, config[name]) for name in ("log_every", "evaluate_every", "save_every")
    )
    _check(config)
    evaluation_batch = evaluation_batch_size(config)
    profile = Profile(config.profile, workdir)

    # Model and optimiser. Abstract: the state is made, or restored, in place.
    options = {
        "dtype": config.dtype,
        "remat": config.remat,
        "scan_implementation": config.scan_implementation or None,
    }
    if KINDS[task.description.task].batch_normalised:
        options["axis"] = layout.axis
    model = abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS, **options))
    schedule = schedule_of(config, clock)
    optimizer = adamw(
        schedule,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
        no_decay=config.optimizer.no_decay,
        layer_decay=config.optimizer.layer_decay,
        freeze_backbone=config.freeze_backbone,
    )

    def init(weights: Tree) -> State:
        return initial_state(bind(model, weights), optimizer, ema=bool(config.ema_decay))

    # Resume: the latest checkpoint in the workdir, or a fresh start.
    pretrained = None
    with together():
        if not RunCheckpoints.any_in(workdir):
            pretrained = find_pretrained(config, task.description, dict(flatten(get_weights(model))))
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {workdir}: {error.strerror or error}") from error
    checkpoints = RunCheckpoints(workdir, task.description)
    start = checkpoints.latest_step() or 0
    if start:
        state = checkpoints.restore(layout.abstract(init, get_weights(model)))
    else:
        state = layout.create(init, get_weights(task.description.build(rngs=nnx.Rngs(config.seed), **options)))
    if pretrained is not None:
        state = with_pretrained(state, pretrained, workdir)
    if is_main():
        _write_config(workdir, config)
    _announce(config, task, dataset, workdir, clock, start, count(state["params"]))
    if start >= steps:
        _say(f"the run is complete: {start} of {steps} steps are done")
        checkpoints.close()
        return None

    step_fn = layout.compile_train(
        train_step(
            model,
            task,
            optimizer,
            schedule,
            seed=config.seed,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            freeze_backbone=config.freeze_backbone,
            axis=layout.axis,
            processes=layout.processes,
        )
    )
    predict_fn = layout.compile_predict(predict_step(model, task))
    with together():
        report = Report(workdir, steps, start) if is_main() else SilentReport()
    shard = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = train_batches(
        dataset, batch_size=config.batch_size, seed=config.seed, start_step=start, workers=config.data.workers, **shard
    )

    def evaluate_all(step: int) -> float | None:
        """Evaluates the raw and the averaged weights, where there are both; the score of the latter.

        None if the run is to stop: what was trained is saved first.
        """
        kinds: list[Weights] = ["raw", "ema"] if "ema" in state else ["raw"]
        score = 0.0
        for kind in kinds:
            name = {"raw": "eval", "ema": "eval_ema"}[kind]
            try:
                evaluation = evaluate(
                    predict_fn,
                    weights_of(state, kind),
                    dataset,
                    task,
                    layout,
                    batch_size=evaluation_batch,
                    title=f"{name} at step {step}",
                    pictures=config.pictures if kind == kinds[-1] else 0,
                    stopped=lambda: stop.agreed() is not None,
                )
            except Stopped:
                report.say(f"step {step}, {name}: not evaluated to the end; msvmamba_jax.evaluate can do it")
                return None
            result = evaluation.evaluator.result()
            score = result[task.score]
            report.write(step, {f"{name}/{key}": value for key, value in result.items()})
            report.say(f"step {step}, {name}: {evaluation.evaluator.sentence()}")
            if evaluation.picture is not None:
                report.picture(step, name, evaluation.picture)
        return score

    pending: collections.deque[tuple[int, Any]] = collections.deque()
    # Steps that may be under way: the host prepares the next one while the device works. Collectives of simulated
    # devices bear no second step.
    ahead = 0 if jax.default_backend() == "cpu" else 1

    def settle(left: int) -> None:
        """Reads the metrics of all steps but the latest `left`."""
        while len(pending) > left:
            of, device_metrics = pending.popleft()
            metrics = {f"train/{name}": float(value) for name, value in jax.device_get(device_metrics).items()}
            _check_finite(of, metrics, workdir)
            report.advance()
            interval.add(metrics)

    try:
        interval, step, stopped_by = Interval(), start, stop.agreed()
        compiled: set[Any] = set()  # shapes of batches that there is a program for
        while step < steps and stopped_by is None:
            if profile.due(step):
                settle(0)
                with interval.paused():  # writing a trace takes seconds
                    if told := profile.at(step):
                        report.say(told)
            batch = interval.next_batch(batches)
            shapes = tuple(array.shape for array in batch.values())
            compiles, last = shapes not in compiled, step + 1 == steps
            compiled.add(shapes)
            state, device_metrics = step_fn(state, layout.put(batch))
            step += 1
            pending.append((step, device_metrics))
            logged = last or step % log_every == 0
            evaluated = last or step % evaluate_every == 0
            saved = evaluated or step % save_every == 0
            # Before anything of a step is told or saved, its metrics are known to be numbers.
            settle(0 if compiles or logged or saved else ahead)
            if compiles and not last:  # leave the compilation out of the rate
                interval.restart_clock()
            elif logged:
                metrics = interval.finish(config.batch_size)
                report.write(step, metrics)
                report.show(step, metrics)
            with interval.paused():
                score = evaluate_all(step) if evaluated else None
                if saved:
                    checkpoints.save(step, state, score)
            # Other processes answer once the step is done, and then there is none ahead.
            if logged or saved or step % _ASK_EVERY == 0 or jax.process_count() == 1:
                stopped_by = stop.agreed()
        settle(0)
        if told := profile.finish(step):
            report.say(told)
        if stopped_by is not None and step > start:
            checkpoints.save(step, state)
        checkpoints.wait()
    finally:
        profile.close()
        batches.close()
        report.close()
        checkpoints.close()
    if stopped_by is not None and step < steps:
        name = signal.Signals(stopped_by).name
        _say(f"stopped by {name} after step {step} of {steps}; run the same command again to go on")
        return stopped_by
    return None


def _check(config: Any) -> None:
    for name, least in (("accumulate", 1), ("pictures", 0)):
        if config[name] < least:
            raise InputError(f"config.{name} must be at least {least}; got {config[name]}")
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
    config: Any, task: Task, dataset: Dataset, workdir: Path, clock: Clock, start: int, parameters: int
) -> None:
    device = jax.devices()[0]
    where = f"going on from step {start:,}" if start else "from the start"
    devices = jax.device_count()
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    layout = f"fsdp {config.fsdp}" if config.fsdp > 1 else "state on every device"
    height, width = task.description.preprocessing.nominal_size
    averaged = f"averaged weights: decay {config.ema_decay:g}" if config.ema_decay else "no averaged weights"
    lines = (
        f"Training {task.description.model['name']} ({task.description.task}), {where}; everything goes to {workdir}.",
        f"  model: {parameters:,} parameters, {task.description.flops(height, width).total:,} multiply-adds at "
        f"{height} x {width}",
        f"  data: {len(dataset.train):,} images of {len(dataset.class_names)} classes ({config.data.source}), "
        f"{len(dataset.evaluation):,} for evaluation",
        f"  steps: {clock.steps:,} of {config.batch_size} images ({clock.steps_per_epoch:,} an epoch), "
        f"{config.batch_size // devices} on each device "
        f"in {config.accumulate} part{'s' if config.accumulate > 1 else ''}",
        f"  devices: {devices} x {device.device_kind}{processes} ({config.parallelism}, {layout}); {config.dtype}; "
        f"selective scan: {config.scan_implementation or preferred_implementation()}",
        f"  learning rate: {peak_rate(config):.3g} after {warmup_steps(config, clock):,} steps of warm-up, then "
        f"{config.optimizer.schedule}; {averaged}",
    )
    _say("\n".join(lines))
    if unused := unused_records(dataset, batch_size=config.batch_size):
        _say(
            f"  left out: {unused:,} images whose shape fewer than {config.batch_size} have, too few for a batch; a "
            "smaller batch_size uses them"
        )


def _say(line: str) -> None:
    if is_main():
        print(line, flush=True)
