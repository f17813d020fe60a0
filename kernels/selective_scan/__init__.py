"""The selective scan of Mamba (Gu and Dao, arXiv:2312.00752, algorithm 2) over sequences and over 2D maps."""

from msvmamba_jax.kernels.selective_scan.api import implementations, selective_scan, selective_scan_2d
from msvmamba_jax.kernels.selective_scan.routes import Route

__all__ = ["Route", "implementations", "selective_scan", "selective_scan_2d"]
