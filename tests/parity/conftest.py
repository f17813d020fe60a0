"""The parity tests are part of the run on a GPU, but for those that take long."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.gpu)
