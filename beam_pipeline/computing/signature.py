"""What a callable part of a model takes and returns, in words that need no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """A tensor that a tower is called with.

    Attributes:
        name: as in the model.
        dtype: TensorFlow's name of its type, such as "string", "int64" or "float32".
        shape: of one row; None is any length. Empty for one value per row.
        is_ragged: rows of different length may be in one batch.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] = ()
    is_ragged: bool = False

    def __str__(self) -> str:
        lists = "".join(f"[{'' if length is None else length}]" for length in self.shape)
        return f"{self.name} ({self.dtype}{lists})"


@dataclass(frozen=True)
class Signature:
    """A tower as it is called.

    Attributes:
        inputs: by name, in the order in which they are passed.
        dimension: values in a vector that it returns.
        dtype: the type that holds them, "float32" or "float64".
        library: what computes it, and which version, such as "tensorflow 2.21.0".
    """

    inputs: tuple[Input, ...]
    dimension: int
    dtype: str = "float32"
    library: str = ""

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} → {self.dimension} values"
