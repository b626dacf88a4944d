"""Files in the temp location: arrays that all workers of a step need, and the change of each id, to be loaded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from beam_pipeline.comparison import measures, tables
from beam_pipeline.comparison.measures import Fit, ScoreMoments
from beam_pipeline.comparison.work import (
    Joined,
)


def save_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file of arrays by name."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **dict(arrays))
    with FileSystems.create(path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED) as file:
        file.write(content.getvalue())


@lru_cache(maxsize=2)
def load_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads a file once for all streams of a worker; it is written once."""
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        content = io.BytesIO(file.read())
    # A worker may be made to run code by what it unpickles; a bucket is shared by more than this job.
    with np.load(content, allow_pickle=False) as arrays:
        return dict(arrays)


def fit_arrays(found: Fit) -> dict[str, np.ndarray]:
    """Returns a fit as arrays by name."""
    arrays = {"cosine": np.array(found.cosine)}
    if found.turn is not None:
        arrays["turn"] = found.turn
    for tower, moments in found.moments.items():
        arrays |= {
            f"{tower}.before": moments.before,
            f"{tower}.after": moments.after,
            f"{tower}.across": moments.across,
        }
    return arrays


def fit_of(arrays: Mapping[str, np.ndarray]) -> Fit:
    """Returns the fit that `fit_arrays` turned into arrays."""
    towers = [name.removesuffix(".across") for name in arrays if name.endswith(".across")]
    return Fit(
        bool(arrays["cosine"]),
        {t: ScoreMoments(arrays[f"{t}.before"], arrays[f"{t}.after"], arrays[f"{t}.across"]) for t in towers},
        arrays.get("turn"),
    )


class ChangeWriter:
    """Writes what became of ids to a Parquet file, which is not created before there is a row."""

    def __init__(self, path: str, joined: Joined) -> None:
        self._path = path
        self._pair = joined.pair
        self._schema = pa.schema(
            [
                ("pair", pa.int64()),
                (f"{joined.tower}_id", pa.string()),
                *((name, pa.float64()) for name in tables.CHANGE_COLUMNS),
            ]
        )
        self._writer: pq.ParquetWriter | None = None

    def write(self, ids: np.ndarray, change: measures.Change) -> None:
        """Adds ids."""
        if self._writer is None:
            self._file = FileSystems.create(
                self._path, "application/octet-stream", compression_type=CompressionTypes.UNCOMPRESSED
            )
            self._writer = pq.ParquetWriter(self._file, self._schema)
        values = [pa.array(getattr(change, name), from_pandas=True) for name in tables.CHANGE_COLUMNS]
        pairs = pa.array(np.full(len(ids), self._pair))
        self._writer.write_table(pa.table([pairs, pa.array(ids, pa.string()), *values], schema=self._schema))

    def close(self) -> bool:
        """Returns whether there is a file."""
        if self._writer is None:
            return False
        self._writer.close()
        self._file.close()
        return True
