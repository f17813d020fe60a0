"""Train a model, or go on with a run.

    python -m msvmamba_jax.train --config configs/digits.py --workdir runs/digits

Run it again with the same --workdir to go on where it stopped. Any value of the configuration can be given on the
command line, such as --config.batch_size=256 --config.optimizer.learning_rate=1e-3. The workdir gets metrics.jsonl,
TensorBoard events, config.json and checkpoints; `evaluate` and `predict` take it as it is.

On several hosts start one process on each, with the same --workdir on a file system that all share. Inside Slurm's srun
they find each other; elsewhere give --coordinator, --num_processes and --process_id.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from msvmamba_jax import command

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or your own.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.", required=True)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "For several processes: host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
flags.mark_flag_as_required("config")


def _main() -> int | None:
    from msvmamba_jax.data.datasets import load_dataset
    from msvmamba_jax.programs import keep_compiled_programs
    from msvmamba_jax.tasks.registry import make_task
    from msvmamba_jax.training.loop import train
    from msvmamba_jax.training.processes import join, together

    join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    keep_compiled_programs()
    config = _CONFIG.value
    with together():
        dataset = load_dataset(config.data)
        task = make_task(config, dataset)
    stopped_by = train(config, task, dataset, Path(_WORKDIR.value))
    return None if stopped_by is None else 128 + stopped_by


def main() -> None:
    """The command."""
    command.run_with_config(_main)


if __name__ == "__main__":
    main()
