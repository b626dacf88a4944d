"""Keeps the history of a two-tower model's embeddings: from an MLflow run's artifact to BigQuery.

From Python, everything that a notebook or another pipeline needs is here:

    import beam_pipeline as bp

    with bp.open_model("gs://my-bucket/model") as model:
        ids, vectors = model.tower("user_layer").read()

The names are imported when they are first used: `import beam_pipeline` itself imports neither Beam nor a Google client,
and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from beam_pipeline import errors as errors
from beam_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from beam_pipeline.model import Model, ModelTower, open_model
    from beam_pipeline.training import Run
    from beam_pipeline.transforms import PublishEmbeddings, ReadEmbeddings

__version__ = "0.1.0"

__all__ = [
    "Model",
    "ModelTower",
    "PipelineError",
    "PublishEmbeddings",
    "ReadEmbeddings",
    "Run",
    "__version__",
    "errors",
    "open_model",
]

_MODULES = {
    "Model": "model",
    "ModelTower": "model",
    "open_model": "model",
    "Run": "training",
    "PublishEmbeddings": "transforms",
    "ReadEmbeddings": "transforms",
}
"""Public name → its module."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
