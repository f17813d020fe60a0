"""The selective scan of Mamba (Gu and Dao, arXiv:2312.00752, algorithm 2) over sequences and over 2D maps."""

from msvmamba_jax.kernels.selective_scan.api import selective_scan, selective_scan_2d
from msvmamba_jax.kernels.selective_scan.routes import Route
from msvmamba_jax.kernels.selective_scan.selection import (
    available_implementations,
    implementations,
    preferred_implementation,
    requested_implementation,
)

__all__ = [
    "Route",
    "available_implementations",
    "implementations",
    "preferred_implementation",
    "requested_implementation",
    "selective_scan",
    "selective_scan_2d",
]
