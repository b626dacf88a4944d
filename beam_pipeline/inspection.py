"""Shows what is in a model, for a person who has to choose its towers; runs nothing and needs no cloud."""

from __future__ import annotations

from collections.abc import Iterator

from beam_pipeline.errors import PipelineError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats import ids
from beam_pipeline.formats.artifact import Artifact, Tower

_EXAMPLES = 3
_LONGEST_EXAMPLE = 40


def describe(artifact: Artifact, open_file: OpenFile) -> Iterator[str]:
    """Yields lines about every tower of a model: layer, embedding, ids with examples, rows before the ids, bytes.

    The vocabularies are scanned to count their ids, the embeddings are not read.
    """
    layers = artifact.tower_layers()
    if not layers:
        yield "no layer holds one lookup and one embedding"
    for layer in layers:
        yield f"layer       {layer}"
        try:
            yield from _describe(artifact.tower("tower", layer), open_file)
        except PipelineError as error:
            yield f"  refused   {error}"


def _describe(tower: Tower, open_file: OpenFile) -> Iterator[str]:
    matrix = tower.matrix
    size = matrix.rows * matrix.row_bytes
    yield f"  embedding {matrix.rows:,} rows × {matrix.dimension} {matrix.dtype}, {size:,} bytes in {matrix.path}"
    if not tower.vocabulary.in_row_order:
        yield from _describe_entries(tower, open_file)
        return
    pieces = [piece for piece in ids.cut(tower, open_file, ids.PIECE_BYTES) if piece.ids]
    count = sum(piece.rows for piece in pieces)
    span = tower.vocabulary.span
    yield f"  ids       {count:,}, {span.end - span.start:,} bytes in {tower.vocabulary.path}"
    if pieces:
        first = ids.read(pieces[0], tower, open_file)[:_EXAMPLES].to_pylist()
        examples = ", ".join(ids.shown(name[:_LONGEST_EXAMPLE]) for name in first)
        yield f"  such as   {examples}{', …' if count > len(first) else ''}"
    yield f"  no ids    {matrix.rows - count:,} rows, {tower.vocabulary.first_row:,} of them before the first id"


def _describe_entries(tower: Tower, open_file: OpenFile) -> Iterator[str]:
    """The same of a lookup whose ids are in no order."""
    entries = list(ids.cut_entries(tower, open_file, ids.PIECE_ENTRIES))
    span = tower.vocabulary.span
    yield f"  ids       {sum(e.count for e in entries):,}, {span.end - span.start:,} bytes in {tower.vocabulary.path}"
    if entries:
        rows, names = ids.read_entries(entries[0], tower, open_file)
        first = names[:_EXAMPLES].to_pylist()
        examples = ", ".join(
            f"{ids.shown(name[:_LONGEST_EXAMPLE])} (row {row:,})" for name, row in zip(first, rows, strict=False)
        )
        yield f"  such as   {examples}, in the order of the table, not of the rows"
