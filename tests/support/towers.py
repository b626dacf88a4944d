"""Towers for tests: described ones, whose files do not exist, and what a real one holds."""

from beam_pipeline.computing.columns import Columns
from beam_pipeline.computing.signature import Signature
from beam_pipeline.computing.sources import Query
from beam_pipeline.computing.tower import ComputedTower
from beam_pipeline.files import open_file
from beam_pipeline.formats.model import Checksum, Encoding, Matrix, Tower, Vocabulary
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.reading import pieces


def described(name, folder="gs://bucket", *, rows=11, dimension=8, ids_bytes=100, checksum=True):
    """Returns a tower of float32 vectors and a vocabulary file, neither of which is there."""
    stored = Checksum("crc32c", 0xABC, Span(0, rows * dimension * 4)) if checksum else None
    matrix = Matrix(f"{folder}/data", 0, rows, dimension, "float32", stored)
    return Tower(name, f"{name}_layer", matrix, Vocabulary(f"{folder}/ids", Span(0, ids_bytes), Encoding.LINES, 1))


def computed(name, *, rows=0, dimension=8, library="tensorflow 2.21.0"):
    """Returns a tower whose vectors a model would compute for the ids of a query."""
    return ComputedTower(
        name,
        f"{name}_tower",
        Matrix("gs://bucket/model", 0, rows, dimension, "float32", None),
        Vocabulary("", Span(0, 0), Encoding.LINES, 0),
        source="computed",
        model_path="gs://bucket/model",
        signature=Signature((), dimension, library=library),
        columns=Columns(name, "", (), ()),
        ids_from=Query("SELECT 1", "my-project"),
    )


def read_tower(tower, piece_bytes=1 << 20):
    """Reads a tower piece by piece: id → vector; asserts that the pieces cover every row once, in order."""
    found, row = {}, 0
    for piece in pieces.cut(tower, open_file, piece_bytes):
        if piece.rest:
            continue
        assert piece.first_row == row
        row += piece.rows
        names = pieces.read(piece, tower, open_file)
        with open_file(tower.matrix.path) as file:
            start = tower.matrix.offset + piece.first_row * tower.matrix.row_bytes
            vectors = tower.matrix.decode(file.read(start, piece.rows * tower.matrix.row_bytes))
        found.update(zip((name.decode() for name in names.to_pylist()), vectors.tolist(), strict=False))
    assert row == tower.matrix.rows
    return found
