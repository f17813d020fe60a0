"""A run's checkpoints: the latest ones to go on from, and the best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from msvmamba_jax.checkpoint import Description, available_weights
from msvmamba_jax.errors import InputError
from msvmamba_jax.training.step import State

_policies = ocp.checkpoint_managers


class RunCheckpoints:
    """Saves asynchronously into `workdir/checkpoints` and restores the latest.

    Keeps the latest two, so that a damaged one does not end the run, and the one with the best score.
    """

    def __init__(self, workdir: Path, description: Description):
        self._description = description
        # `best_fn` with `max_to_keep` would delete the latest checkpoint where an older one scores higher.
        keep = _policies.AnyPreservationPolicy(
            [_policies.LatestN(2), _policies.BestN(get_metric_fn=lambda m: m["score"], reverse=False, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=lambda m: m["score"], enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

    @staticmethod
    def any_in(workdir: Path) -> bool:
        """Whether there is a checkpoint to go on from, without making the folder."""
        folder = workdir / "checkpoints"
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    def latest_step(self) -> int | None:
        """The step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> State:
        """The latest state.

        Args:
            abstract_state: shapes, dtypes and shardings of the state, as `Layout.abstract` gives; it may have been
                saved with other shardings.

        Raises:
            InputError: the checkpoint is of another model, or damaged.
        """
        step = self._manager.latest_step()
        folder = self._manager.directory / str(step)
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))["model"]
        except Exception as error:
            raise InputError(f"cannot go on from {folder}: its description is damaged; delete the folder") from error
        mine = self._description.to_json()
        for key, what in (("task", "task"), ("model", "model"), ("class_names", "set of classes")):
            if saved.get(key) != mine[key]:
                raise InputError(
                    f"{self._manager.directory.parent} holds a run with another {what} "
                    f"({_short(saved.get(key))}, not {_short(mine[key])}): choose another --workdir"
                )
        averaged = "ema" in available_weights(folder)
        if averaged != ("ema" in abstract_state):
            raise InputError(
                f"the run in {self._manager.directory.parent} was started {'with' if averaged else 'without'} averaged "
                "weights: set config.ema_decay as it was, or choose another --workdir"
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
            return self._manager.restore(step, args=args)["state"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"cannot go on from {folder}: it is damaged or of another optimiser ({reason:.200}); "
                "delete the folder to go on from the one before, or choose another --workdir"
            ) from error

    def save(self, step: int, state: State, score: float | None = None) -> None:
        """Starts to save; `score` decides which checkpoint is the best."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), model=ocp.args.JsonSave(self._description.to_json())
        )
        self._manager.save(step, args=items, metrics=None if score is None else {"score": score}, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then releases the folder."""
        self._manager.close()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
