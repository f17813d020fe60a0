"""Prints the lowest versions that pyproject.toml admits, as constraints for pip: for `>=4.10` any release of 4.10."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
for name, version in sorted({m.groups() for r in requirements if (m := re.match(r"([\w-]+)>=([\w.]+)", r))}):
    print(f"{name}=={version}" if version.count(".") > 1 else f"{name}=={version}.*")
