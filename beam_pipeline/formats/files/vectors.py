"""Towers whose vectors a trainer logged as a file, and ids from a file for the embeddings of a model."""

from __future__ import annotations

from dataclasses import replace

from beam_pipeline.errors import BadIdError, UnsupportedModelError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats.files import arrays, parquet
from beam_pipeline.formats.files.parquet import ListFolder
from beam_pipeline.formats.model import Encoding, Ending, Matrix, Tail, Tower, VectorTable, Vocabulary
from beam_pipeline.formats.protobuf import Span


def find_vectors(
    name: str,
    path: str,
    names: tuple[str, ...],
    open_file: OpenFile,
    list_folder: ListFolder,
    *,
    outside_ids: bool,
) -> tuple[Matrix | VectorTable, Vocabulary | None]:
    """Returns where the vectors of a tower are, and its ids if they are in the same file.

    Args:
        name: of the tower.
        path: a `.npy`, `.npz`, `.safetensors` or Parquet file; of Parquet a folder or a pattern, too.
        names: of the columns of ids and of vectors, or of the arrays of ids and of vectors, or of the vectors alone;
            empty where the file leaves no choice.
        open_file: opens a file.
        list_folder: lists the names in a folder.
        outside_ids: the ids are elsewhere.

    Raises:
        UnsupportedModelError: the file is of a kind that is not read, or has not what is asked for.
        BadIdError: the ids are missing, or there twice.
        BadVectorError: there are no vectors of one length in it.
        CorruptFileError: it contradicts its format.
    """
    if len(names) > 2 or (outside_ids and len(names) > 1):
        raise UnsupportedModelError(f"{path}#{','.join(names)}: {'one name' if outside_ids else '#IDS,VECTORS'}")
    if path.endswith(arrays.SUFFIXES):
        return _from_arrays(name, path, names, open_file, outside_ids=outside_ids)
    if not parquet.is_parquet(path):
        raise UnsupportedModelError(
            f"{path} is of a kind that is not read; vectors are in .parquet files (or a folder of them), .npy, .npz or "
            ".safetensors"
        )
    if outside_ids:
        raise BadIdError(f"tower {name!r}: {path} has a column of ids; leave out --ids {name}=…")
    if len(names) == 1:
        raise UnsupportedModelError(f"{path}#{names[0]}: the columns of ids and of vectors, #ID,VECTORS")
    columns = (names[0], names[1]) if names else None
    table = parquet.find_vectors(path, name, columns, open_file, list_folder)
    return table, Vocabulary(table.files[0][0], Span(0, 0), Encoding.PARQUET, 0, table.rows, table=table)


def _from_arrays(
    name: str, path: str, names: tuple[str, ...], open_file: OpenFile, *, outside_ids: bool
) -> tuple[Matrix, Vocabulary | None]:
    found = arrays.read_arrays(path, open_file)
    option = f"--vectors {name}={path}#"
    matrix = arrays.choose(found, names[-1] if names else "", "vectors", f"{option}NAME").matrix()
    if outside_ids:
        return matrix, None
    if len(names) < 2 and not any(array.is_ids for array in found.values()):
        raise BadIdError(
            f"tower {name!r}: {path} has no ids: name them with --ids {name}=PATH (text, JSON, .npy, CSV or Parquet), "
            f"or --ids {name}=rows if the ids are the numbers of the rows"
        )
    vocabulary = arrays.choose(found, names[0] if len(names) > 1 else "", "ids", f"{option}IDS,VECTORS").vocabulary(0)
    return matrix, fitted(name, vocabulary, matrix)


def fitted(name: str, vocabulary: Vocabulary, matrix: Matrix) -> Vocabulary:
    """Returns ids that belong to the rows of a matrix, one to each from the first one's on.

    Ids that are in row order say nothing of their rows but by their number: one id more or fewer than rows, and each
    could be the neighbour's. So there have to be as many, unlike those of a lookup, whose rows the model knows.

    Raises:
        BadIdError: there are more or fewer.
    """
    if not vocabulary.in_row_order:
        return vocabulary
    expected = max(0, matrix.rows - vocabulary.first_row)
    if vocabulary.count is not None:
        require_as_many(name, vocabulary, vocabulary.count, expected)
    return replace(vocabulary, count=expected, fills=True)


def require_as_many(name: str, vocabulary: Vocabulary, count: int, expected: int) -> None:
    """Raises BadIdError unless there are as many ids as rows for them."""
    if count != expected:
        rows = f"rows {vocabulary.first_row:,} to {vocabulary.first_row + expected - 1:,}" if expected else "no rows"
        raise BadIdError(
            f"tower {name!r}: {vocabulary.path} has {count:,} ids for {rows} of the vectors, which are {expected:,}; "
            f"name the row of the first id with --first_row {name}=ROW, or give each id with its row (a JSON object, "
            "CSV or Parquet)"
        )


def file_tower(name: str, path: str, matrix: Matrix | VectorTable, vocabulary: Vocabulary) -> Tower:
    """Returns a tower whose vectors are what the trainer logged: what the model serves, by the trainer's word."""
    return Tower(name, path, matrix, vocabulary, tail=Tail(Ending.LOGGED), source="file")
