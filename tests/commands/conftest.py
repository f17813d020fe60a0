"""One data set and one trained run of each task for all tests of commands."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import DETECTION, SEGMENTATION, run_script, succeed
from PIL import Image


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A folder that the first worker that needs it makes, while the others wait; tests must not change it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, unfinished = root / name, root / f"{name}.unfinished"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, whatever happens
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return get


@pytest.fixture(scope="session")
def scenes(once) -> Path:
    """Eight training images, and five for evaluation in two sizes."""
    pytest.importorskip("cv2")

    def make(root: Path) -> None:
        options = ("--train=8", "--val=5", "--low=40", "--high=60", "--processes=1")
        run_script("make_scenes_dataset", root, *options)
        for kind, extension in (("images", "jpg"), ("annotations", "png")):
            files = sorted((root / kind / "validation").iterdir())
            assert all(file.suffix == f".{extension}" for file in files)
            for file, size in zip(files, [(32, 40), (48, 32), (32, 40), (32, 40), (48, 32)], strict=True):
                with Image.open(file) as image:
                    image.load()
                image.crop((0, 0, *size)).save(file)

    return once("scenes", make)


@pytest.fixture(scope="session")
def objects(once) -> Path:
    """Twelve training images and five for evaluation, all of one size."""
    pytest.importorskip("cv2")
    pytest.importorskip("pycocotools")
    options = ("--train=12", "--val=5", "--low=64", "--high=64", "--processes=1")
    return once("objects", lambda root: run_script("make_objects_dataset", root, *options))


@pytest.fixture(scope="session")
def segmenter(once, scenes) -> Path:
    """The workdir of a run on the scenes; `printed.txt` holds its output."""

    def make(workdir: Path) -> None:
        out = succeed("train", *SEGMENTATION, f"--config.data.root={scenes}", f"--workdir={workdir}")
        (workdir / "printed.txt").write_text(out)

    return once("segmenter", make)


@pytest.fixture(scope="session")
def detector(once, objects) -> Path:
    """The workdir of a run on the objects."""
    options = (*DETECTION, f"--config.data.root={objects}")
    return once("detector", lambda workdir: succeed("train", *options, f"--workdir={workdir}"))
