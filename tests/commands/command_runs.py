"""Runs commands and scripts in this process, and the options of tiny models."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import jax
import pytest
from absl import app, flags
from absl import logging as absl_logging

from msvmamba_jax.models import depthwise

ROOT = Path(__file__).parents[2]
app.define_help_flags()  # absl does so once in a process, and these must not go with those of a command
LOGGERS = ("", "msvmamba_jax", "asyncio", "absl")


class Outcome(types.SimpleNamespace):
    """status, out, err."""

    @property
    def message(self) -> str:
        """The one sentence of a command that failed."""
        assert self.status == 1, self
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        assert self.out == ""
        return self.err.removeprefix("error: ").strip()


@contextlib.contextmanager
def process_state() -> Iterator[None]:
    """Restores the state of the process that a command changes: flags, signal handlers, logging, hooks."""
    values = flags.FLAGS
    before, parsed = set(values), values.is_parsed()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    loggers = [(logger, logger.level, list(logger.handlers)) for logger in map(logging.getLogger, LOGGERS)]
    verbosity, hook, argv = absl_logging.get_verbosity(), sys.unraisablehook, sys.argv
    try:
        yield
    finally:
        own_flags = {flag.name for flag in values.flags_by_module_dict().get(sys.argv[0], [])}  # not those of libraries
        for name in {name for name in values if name in own_flags or name.startswith("config.")} - before:
            delattr(values, name)
        values.unparse_flags()
        if parsed:
            values.mark_as_parsed()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        absl_logging.set_verbosity(verbosity)
        for logger, level, attached in loggers:
            logger.setLevel(level)
            logger.handlers[:] = attached
        sys.unraisablehook, sys.argv = hook, argv
        sys.modules.pop("config_config", None)  # as which ml_collections loads any configuration, into what is there


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Grouped depthwise convolutions, which compile in less time, for fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "_shifted_sum", depthwise._grouped_conv)
        patch.setattr(depthwise, "_shifted_sum_vjp", depthwise._grouped_conv_vjp)
        yield


def call_in_process(function: Callable[[], object], *argv: Any) -> Outcome:
    """Calls a function that reads `sys.argv`; captures what it prints and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with process_state(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quick_compilation():
        sys.argv = list(map(str, argv))
        try:
            function()
        except SystemExit as exit_:
            status = exit_.code or 0
    return Outcome(status=status, out=out.getvalue(), err=err.getvalue())


def run_command(module: str, *arguments: Any) -> Outcome:
    """Runs `python -m msvmamba_jax.MODULE` in this process, on its four devices."""
    name = f"msvmamba_jax.{module}" + ".__main__" * (module == "convert")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # as users have it
        patch.delitem(sys.modules, name, raising=False)  # or runpy warns
        jax.clear_caches()  # what is traced in a new process has one key in the compilation cache
        return call_in_process(lambda: runpy.run_module(name, run_name="__main__"), module, *arguments)


def run_process(module: str, *arguments: Any) -> Outcome:
    """Runs `python -m msvmamba_jax.MODULE` in a process of its own, on one device."""
    done = subprocess.run(
        [sys.executable, "-m", f"msvmamba_jax.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "JAX_PLATFORMS": "cpu"},
    )
    return Outcome(status=done.returncode, out=done.stdout, err=done.stderr)


def run_script(name: str, *arguments: Any) -> None:
    """Runs a script of `scripts/` in this process, with threads for its worker processes."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        script = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, script)  # dataclasses look their module up
        patch.setattr(multiprocessing, "get_context", lambda method: types.SimpleNamespace(Pool=ThreadPool))
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        spec.loader.exec_module(script)
        assert not script.main()


def succeed(module: str, *arguments: Any) -> str:
    """Standard output of a command that must succeed."""
    outcome = run_command(module, *arguments)
    assert outcome.status == 0, outcome
    return outcome.out


# Tiny models; a batch has an image for each of the four devices.
TINY = (
    "--config.model.width=8", "--config.model.depths=(1,1,1,1)", "--config.model.channels=8", "--config.batch_size=4",
    "--config.evaluation_per_device=1", "--config.optimizer.warmup=1 step", "--config.log_every=1 step",
    "--config.evaluate_every=4 steps", "--config.save_every=2 steps", "--config.duration=3 steps",
    "--config.pictures=2",
)  # fmt: skip
SEGMENTATION = (
    "--config=configs/shapes_segmentation.py", *TINY, "--config.model.auxiliary_channels=8", "--config.data.crop=32",
    "--config.data.scale=(64, 32)",
)  # fmt: skip
DETECTION = (
    "--config=configs/shapes_detection.py", *TINY, "--config.model.hidden=8", "--config.data.scale=(96, 64)",
    "--config.data.bucket=0", "--config.regions.proposals=(20,10)", "--config.regions.evaluation_proposals=(20,10)",
    "--config.regions.anchor_samples=16", "--config.regions.region_samples=8",
)  # fmt: skip
