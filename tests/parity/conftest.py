"""The parity tests of nano are part of the run on a GPU; whole models of every variant would take it too long."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and "nano" in item.name:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # which share what the model computes
