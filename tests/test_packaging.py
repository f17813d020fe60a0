"""The package as it is installed: what a wheel holds, and that its rooms import only downwards."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "convert", "data", "kernels")  # reached as msvmamba_jax.ROOM through symbolic links

# What each part must not import (of this package, without its name, or of others), beside what stands above it.
COMMANDS = ("train", "evaluate", "predict", "summary", "command")
FORBIDDEN = {
    "kernels": ("models", "data", "convert", "configs", "tasks", "training", "checkpoint", "inference", *COMMANDS),
    "data": ("models", "kernels", "convert", "configs", "tasks", "training", "checkpoint", "inference", *COMMANDS),
    "msvmamba_jax/models": ("data", "convert", "configs", "tasks", "training", "checkpoint", "inference", *COMMANDS),
    "convert": ("configs", "tasks", "training", "inference", "train", "evaluate", "predict", "summary"),
    "msvmamba_jax/tasks": ("convert", "configs", "training", *COMMANDS),
    "msvmamba_jax/training": ("configs", *COMMANDS),
    "configs": ("models", "data", "kernels", "convert", "tasks", "training", "checkpoint", "inference", *COMMANDS),
}


def sources(folder: str) -> list[Path]:
    found = [path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]
    assert found, folder
    return found


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, at any depth; `from a import b` counts as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# The structure


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_downwards(part):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(part)
        for name in imports(path)
        for other in FORBIDDEN[part]
        if within(name, f"msvmamba_jax.{other}")
    ]
    assert wrong == []


def test_kernels_know_nothing_of_the_project():
    """Only the error class, which is the package's own way to say what a person can mend, and their own files."""
    names = {name for path in sources("kernels") for name in imports(path) if within(name, "msvmamba_jax")}
    allowed = ("msvmamba_jax.kernels", "msvmamba_jax.errors")
    assert {name for name in names if not any(within(name, package) for package in allowed)} == set()


def test_data_runs_without_jax():
    names = {name for path in sources("data") for name in imports(path)}
    forbidden = ("jax", "flax", "optax", "orbax", "tensorflow", "torch")
    assert {name for name in names if any(within(name, package) for package in forbidden)} == set()


def test_the_rooms_are_never_imported_by_their_generic_names():
    files = [path for folder in (*ROOMS, "msvmamba_jax", "scripts", "tests") for path in sources(folder)]
    wrong = [(path, name) for path in files for name in imports(path) for room in ROOMS if within(name, room)]
    assert wrong == []


def test_every_folder_has_its_rules():
    folders = {
        str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/__init__.py") if path.parent.name != "msvmamba_jax"
    } | {f"msvmamba_jax/{path.parent.name}" for path in ROOT.glob("msvmamba_jax/*/__init__.py")}
    assert folders - {f"msvmamba_jax/{room}" for room in ROOMS} == set(FORBIDDEN)


@pytest.mark.parametrize("room", ROOMS)
def test_the_links_are_relative(room):
    assert os.readlink(ROOT / "msvmamba_jax" / room) == f"../{room}"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what belongs to the project, so that nothing is left in the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to tell what belongs to the project")
    folder = tmp_path_factory.mktemp("wheel")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        source, target = ROOT / name, folder / "source" / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    assert (folder / "source" / "msvmamba_jax" / "kernels").is_symlink()
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", folder / "source"],
        check=True,
        capture_output=True,
        timeout=500,
    )
    [path] = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def files(wheel) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.nightly
def test_the_wheel_has_two_folders(wheel, files):
    name, version, *_ = wheel.name.split("-")
    assert name == "msvmamba_jax"
    assert {file.split("/")[0] for file in files} == {"msvmamba_jax", f"msvmamba_jax-{version}.dist-info"}


@pytest.mark.nightly
def test_the_wheel_holds_every_source_file(files):
    expected = {str(path.relative_to(ROOT)) for path in sources("msvmamba_jax")}
    for room in ROOMS:
        expected |= {f"msvmamba_jax/{path.relative_to(ROOT)}" for path in sources(room)}
    expected |= {"msvmamba_jax/py.typed", "msvmamba_jax/data/imagenet_classes.txt"}
    expected |= {"msvmamba_jax/data/ade20k_classes.txt", "msvmamba_jax/data/coco_classes.txt"}
    expected.add("msvmamba_jax/kernels/selective_scan/measured.json")
    found = {file for file in files if ".dist-info/" not in file}
    assert found == expected
    assert {
        "msvmamba_jax/kernels/selective_scan/api.py",
        "msvmamba_jax/configs/digits.py",
        "msvmamba_jax/convert/__main__.py",
    } < found


USE = """
import json, sys
import msvmamba_jax
at_first = sorted(sys.modules)
import jax.numpy as jnp
from flax import nnx
from msvmamba_jax.configs.digits import get_config
from msvmamba_jax.convert.checkpoint import convert
from msvmamba_jax.data.labels import imagenet_class_names
options = dict(width=16, depths=(1, 1, 1, 1), num_classes=5)
model = msvmamba_jax.create_model("msvmamba_nano", **options, rngs=nnx.Rngs(0))
logits = model(jnp.zeros((1, 32, 32, 3)))
report = {"file": msvmamba_jax.__file__, "shape": logits.shape, "finite": bool(jnp.isfinite(logits).all())}
report |= {"names": len(imagenet_class_names()), "config": get_config().model.name}
report |= {"early": [name for name in ("jax", "flax", "orbax") if name in at_first]}
report |= {"unwanted": [name for name in ("torch", "tensorflow", "sklearn", "grain") if name in sys.modules]}
print(json.dumps(report))
"""


@pytest.mark.nightly
def test_the_wheel_in_an_empty_environment(wheel, tmp_path):
    """With nothing but its own dependencies, from a folder that has nothing to do with the checkout."""
    venv.create(tmp_path / "env", with_pip=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "install", "--disable-pip-version-check", wheel)
    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    assert not any((site / room).exists() and (site / room / "__init__.py").exists() for room in (*ROOMS, "tests"))
    [record] = site.glob("msvmamba_jax-*.dist-info/RECORD")
    with record.open(newline="") as file:
        tops = {Path(row[0]).parts[0] for row in csv.reader(file)}
    assert tops == {"msvmamba_jax", record.parent.name}

    report = json.loads(run("-c", USE))
    assert Path(report["file"]).is_relative_to(site)
    assert report == {
        "file": report["file"],
        "shape": [1, 5],
        "finite": True,
        "names": 1000,
        "config": "msvmamba_nano",
        "early": [],
        "unwanted": [],
    }
    assert "msvmamba_tiny     33,046,312" in run("-m", "msvmamba_jax.summary", "--size", "64")
    assert "usage: python -m msvmamba_jax.convert" in run("-m", "msvmamba_jax.convert", "--help")
