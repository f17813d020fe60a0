"""MSVMamba in JAX: models, training, evaluation and conversion of the released checkpoints.

The public names are loaded on first use, so that data workers and small commands do not pay for importing JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msvmamba_jax.checkpoint import load_model
    from msvmamba_jax.errors import InputError
    from msvmamba_jax.inference import inference_function
    from msvmamba_jax.models.variants import create_detector, create_model, create_segmenter, list_models

_HOME = {
    "InputError": "msvmamba_jax.errors",
    "create_detector": "msvmamba_jax.models.variants",
    "create_model": "msvmamba_jax.models.variants",
    "create_segmenter": "msvmamba_jax.models.variants",
    "list_models": "msvmamba_jax.models.variants",
    "load_model": "msvmamba_jax.checkpoint",
    "inference_function": "msvmamba_jax.inference",
}

__all__ = [
    "InputError",
    "create_detector",
    "create_model",
    "create_segmenter",
    "inference_function",
    "list_models",
    "load_model",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
