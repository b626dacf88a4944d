"""A model opened from Python: its layers, and the ids and vectors of its towers. No Beam pipeline, no TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipeline import emulators
from beam_pipeline.errors import BadIdError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.encodings import shown
from beam_pipeline.formats.model import Artifact, Tower
from beam_pipeline.reading import pieces, unordered
from beam_pipeline.reading.pieces import Piece
from beam_pipeline.reading.rows import read_piece
from beam_pipeline.reading.tally import Report, tally
from beam_pipeline.training import Run, Training, by_name

_NO_RUN = Run("", "", "", "", date(1970, 1, 1), "")
"""Stands for the run of a model that is opened by its path alone."""

_Rows = tuple[np.ndarray, pa.Array]
"""Row numbers of a matrix, and the id of each."""


def open_model(path: str | os.PathLike[str], layers: tuple[str, ...] = ()) -> Model:
    """Opens a model: a SavedModel or a `.keras` file, local or on Cloud Storage.

    Only what describes the model is read here; ids and vectors are read when they are asked for.

    >>> import beam_pipeline as bp
    >>> with bp.open_model(folder) as model:  # such as "gs://my-bucket/mlflow/1/4e6f/artifacts/model"
    ...     model.layers
    ...     ids, vectors = model.tower("user_layer").read()
    ['item_layer', 'user_layer']
    >>> ids[0].as_py(), vectors.shape, vectors.dtype.name
    ('u0', (3015, 8), 'float32')

    Args:
        path: the model's folder, or its `.keras` file.
        layers: for a subclassed model in a `.keras` file, which does not keep the names of all of its layers: every
            layer that `tower` will be asked for.

    Raises:
        NotAModelError: there is no model.
        UnsupportedModelError: its format is not supported.
        CorruptFileError: a file contradicts its format.
    """
    folder = os.fspath(path).rstrip("/")
    emulators.connect_if_emulated()  # Before a client is created: it looks for credentials then.
    return Model(folder, open_artifact(folder, open_file, layers))


class Model:
    """An open model; a context manager.

    Attributes:
        path: where it is stored.
    """

    def __init__(self, path: str, artifact: Artifact) -> None:
        self.path = path
        self._artifact = artifact

    @property
    def layers(self) -> list[str]:
        """The layers that are towers: each holds one lookup and one embedding, or is an embedding fed by a lookup."""
        return self._artifact.tower_layers()

    def tower(self, layer: str, *, include_oov: bool = False) -> ModelTower:
        """Returns the tower that a layer holds; it can be read after the model was closed, too.

        Args:
            layer: one of `layers`.
            include_oov: read the rows of out-of-vocabulary and mask tokens, too.

        Raises:
            TowerMissingError: there is no such layer, or it is not a tower.
        """
        return ModelTower(self.path, self._artifact.tower(layer, layer, include_oov=include_oov))

    def towers(self, layers: Mapping[str, str], *, include_oov: bool = False) -> dict[str, ModelTower]:
        """Returns towers that belong together, and whether their vectors are what the model serves.

        >>> import beam_pipeline as bp
        >>> with bp.open_model(folder) as model:
        ...     towers = model.towers({"user": "user_layer", "item": "item_layer"})
        >>> towers["item"].layer, towers["item"].is_served
        ('item_layer', True)

        Args:
            layers: name → layer of all towers of the model.
            include_oov: read the rows of out-of-vocabulary and mask tokens, too.

        Raises:
            TowerMissingError: there is no such layer, or it is not a tower.
        """
        towers = {name: self._artifact.tower(name, layer, include_oov=include_oov) for name, layer in layers.items()}
        tails = self._artifact.tails(layers)
        return {name: ModelTower(self.path, replace(tower, tail=tails[name])) for name, tower in towers.items()}

    def close(self) -> None:
        """Closes the model's files."""
        self._artifact.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True)
class ModelTower:
    """A tower of a model: ids, and a vector for each.

    It is a description: it can be pickled, and read wherever the model's files can be.

    Attributes:
        model_path: where the model is stored.
        description: where in its files the ids and the vectors are.
    """

    model_path: str
    description: Tower

    @property
    def layer(self) -> str:
        """The layer that holds it."""
        return self.description.layer

    @property
    def rows(self) -> int:
        """Rows of its embedding; those of out-of-vocabulary and mask tokens are among them."""
        return self.description.matrix.rows

    @property
    def dimension(self) -> int:
        """Values in a vector."""
        return self.description.matrix.dimension

    @property
    def is_served(self) -> bool:
        """Whether its vectors are what the model serves, or point where that does.

        False where the tower continues after its embedding, and where that is unknown, as it is for a tower that was
        opened alone, by `Model.tower`.
        """
        return self.description.tail.is_row

    def read(self) -> tuple[pa.StringArray, np.ndarray]:
        """Reads the whole tower into memory, and verifies the checksum of its bytes.

        Returns:
            ids: Arrow string array [n], no id twice.
            vectors: NumPy matrix [n, dimension] of floats as the model has them (bfloat16 as float32). float64, in
                which the tables hold them, has each exactly: `vectors.astype("float64")`.

        Raises:
            ChecksumError: the bytes are not those that the training wrote.
            BadIdError: an id is empty, appears twice, or is not UTF-8.
            BadVectorError: a vector holds NaN or infinity.
            PipelineError: a file is missing, or contradicts its format.
        """
        chunks = [*self.chunks()]
        ids = pa.concat_arrays([chunk for chunk, _ in chunks])
        _require_unique(ids, self.description)
        return ids, np.concatenate([vectors for _, vectors in chunks])

    def chunks(self, size: int = pieces.PIECE_BYTES) -> Iterator[tuple[pa.StringArray, np.ndarray]]:
        """Yields ids and vectors as `read` returns them, some rows at a time, in the order of the matrix.

        The checksum covers all bytes together: it is verified after the last chunk, so only a loop that ends without
        an error has seen what the training wrote. Whether an id appears twice is not checked. Vocabularies that are not
        in row order are held in memory; of all others, one chunk is.

        >>> import beam_pipeline as bp
        >>> with bp.open_model(folder) as model:
        ...     tower = model.tower("item_layer")
        >>> [len(ids) for ids, vectors in tower.chunks(size=32_000)]
        [1000, 1000, 14]

        Args:
            size: bytes of vectors in a chunk, about.

        Raises:
            PipelineError: as `read`.
        """
        emulators.connect_if_emulated()
        training = alone(self)
        (tower,) = training.towers.values()
        reports: list[Report] = []
        for piece in _pieces(tower, size):
            batch, report = read_piece(training.run.run_id, piece, tower, open_file)
            reports.append(report)
            if batch is not None:
                yield batch.ids, batch.vectors
        tally(reports, [training])


def alone(tower: ModelTower) -> Training:
    """Returns a training of a tower alone, of no run; what else its checksum covers in the file is read with it."""
    return Training(_NO_RUN, tower.model_path, by_name(pieces.cover([tower.description])))


def _pieces(tower: Tower, size: int) -> Iterator[Piece]:
    """Yields pieces that cover the matrix."""
    if tower.vocabulary.in_row_order:
        yield from pieces.cut(tower, open_file, size)
        return
    rows, ids = _sorted_ids(tower)
    step = tower.matrix.rows_in(size)
    for first in range(0, tower.matrix.rows, step):
        count = min(step, tower.matrix.rows - first)
        start, end = np.searchsorted(rows, [first, first + count]).tolist()
        yield Piece(tower.name, first, count, None, rows_and_ids=(rows[start:end], ids[start:end]))
    yield from pieces.cut_rest(tower, size)


def _sorted_ids(tower: Tower) -> _Rows:
    """Returns the ids of a vocabulary that is not in row order, sorted by row."""
    tokens = tower.vocabulary.special_tokens
    rows = [np.arange(len(tokens), dtype=np.int64)]
    ids = [pa.array([token.encode() for token in tokens], pa.large_binary())]
    for entries in unordered.cut_entries(tower, open_file, unordered.PIECE_ENTRIES):
        some_rows, some_ids = unordered.read_entries(entries, tower, open_file)
        rows.append(some_rows)
        ids.append(some_ids.cast(pa.large_binary()))  # Together they may exceed the 2 GiB of a binary array.
    all_rows = np.concatenate(rows)
    order = np.argsort(all_rows, kind="stable")
    return all_rows[order], pa.concat_arrays(ids).take(pa.array(order))


def _require_unique(ids: pa.StringArray, tower: Tower) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counts = pc.value_counts(ids)
    times = counts.field("counts").to_numpy()
    name = counts.field("values")[int(times.argmax())].as_py()
    raise BadIdError(
        f"tower {tower.name!r}: id {shown(name.encode())} appears {times.max()} times in the vocabulary; an id has one "
        "embedding: remove the duplicates and train again"
    )
