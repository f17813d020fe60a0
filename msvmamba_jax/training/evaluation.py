"""One pass over the evaluation split."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from PIL import Image

from msvmamba_jax.data.pipeline import Dataset, evaluation_batches, plan_evaluation
from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import Tree
from msvmamba_jax.tasks.base import Batch, Evaluator, Task
from msvmamba_jax.training.parallelism import Layout
from msvmamba_jax.training.processes import gather_rows, is_main


class Stopped(Exception):  # noqa: N818
    """An evaluation was left before its end, because it was asked to."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to.

    Attributes:
        evaluator: with the predictions of the whole split.
        picture: of a few images, where any were asked for.
    """

    evaluator: Evaluator
    picture: Image.Image | None


def evaluation_batch_size(config: Any) -> int:
    """Images at a time in an evaluation, over all devices.

    Raises:
        InputError: `config.evaluation_per_device` is negative.
    """
    if config.evaluation_per_device < 0:
        raise InputError(f"config.evaluation_per_device must not be negative; got {config.evaluation_per_device}")
    return config.evaluation_per_device * jax.device_count() or config.batch_size


def evaluate(
    predict: Callable[[Tree, Batch], dict[str, jax.Array]],
    weights: Tree,
    dataset: Dataset,
    task: Task,
    layout: Layout,
    *,
    batch_size: int,
    title: str,
    pictures: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluates `weights` on the whole evaluation split. A bar on the terminal shows how far it is.

    With several processes each prepares its rows of the batches, evaluates all predictions and comes to the same
    metrics.

    Args:
        predict: `predict_step`, compiled by `layout`.
        weights: what it takes.
        dataset: with the split.
        task: gives the evaluator.
        layout: of the devices.
        batch_size: over all devices.
        title: of the bar.
        pictures: images on the picture, at most; only the process that writes gets one.
        stopped: asked before each batch whether to leave; the same on all processes.

    Raises:
        Stopped: as `stopped` wanted.
    """
    evaluator = task.evaluator()
    weights = layout.place(weights)
    plan = plan_evaluation(dataset, batch_size=batch_size)
    shard = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    bar = tqdm.tqdm(
        total=plan.images, unit="image", desc=title, leave=False, disable=not (is_main() and sys.stderr.isatty())
    )
    examples: list[tuple[Any, Any]] = []
    seen = set()
    with bar, contextlib.closing(evaluation_batches(dataset, plan, **shard)) as batches:
        for batch in batches:
            if stopped():
                raise Stopped
            mask = batch.pop("mask")
            seen.add(tuple(array.shape for array in batch.values()))
            if plan.shapes > 1:  # each of them is compiled for, unless a compilation cache has it
                bar.set_postfix_str(f"{len(seen)} of {plan.shapes} shapes")
            predictions = jax.device_get(predict(weights, layout.put(batch)))
            all_masks = gather_rows({"mask": mask})["mask"]
            evaluator.update(predictions, all_masks)
            if is_main():  # whose rows are the first of all
                wanted = [row for row in range(len(mask)) if mask[row]][: pictures - len(examples)]
                examples += [jax.tree.map(lambda x, row=row: x[row], (batch, predictions)) for row in wanted]
            bar.update(int(all_masks.sum()))
    return Evaluation(evaluator, task.draw(examples) if examples else None)
