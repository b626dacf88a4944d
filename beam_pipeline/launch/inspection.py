"""Shows what is in a model, for a person who has to choose its towers; runs nothing and needs no cloud."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from beam_pipeline.errors import PipelineError
from beam_pipeline.files import OpenFile
from beam_pipeline.formats import encodings
from beam_pipeline.formats.files import parquet
from beam_pipeline.formats.model import Artifact, Encoding, Matrix, Tower, VectorTable
from beam_pipeline.launch import vectors
from beam_pipeline.launch.selection import discover
from beam_pipeline.launch.sources import Sources
from beam_pipeline.reading import pieces, unordered

_EXAMPLES = 3
_LONGEST_EXAMPLE = 40
_NO_SOURCES = Sources({}, {}, {})


def describe(
    artifact: Artifact, folder: str, open_file: OpenFile, towers: Mapping[str, str], sources: Sources = _NO_SOURCES
) -> Iterator[str]:
    """Yields lines about every tower of a model: layer, embedding, ids with examples, rows before the ids, bytes.

    The vocabularies are scanned to count their ids, the embeddings are not read.

    Args:
        artifact: the model.
        folder: files are named as below it.
        open_file: opens them.
        towers: tower → layer, as they were named; where a tower ends depends on which the others are.
        sources: the ids of embeddings without a lookup.
    """
    layers, without_ids = artifact.tower_layers(), artifact.embeddings_without_ids()
    found = discover(layers or without_ids, artifact.index_layers())
    chosen = towers if {*towers.values()} <= {*layers, *without_ids} else found or {}
    if not layers:
        yield "no layer holds one lookup and one embedding, or a search index"
    for layer in layers:
        yield f"layer       {layer}"
        try:
            yield from _describe(artifact.tower("tower", layer), folder, open_file)
            others = {name: other for name, other in chosen.items() if other != layer}
            tail = artifact.tails({**others, "tower": layer})["tower"]
            yield f"  then      {vectors.describe(tail)}"
        except PipelineError as error:
            yield f"  refused   {error}"
    for layer in without_ids:
        yield f"layer       {layer}"
        name = next((name for name, named in chosen.items() if named == layer and name in sources.ids), None)
        try:
            if name:
                (tower,) = sources.towers_of_model(artifact, {name: layer}, include_oov=False)
                yield from _describe(tower, folder, open_file)
                tail = artifact.tails(chosen, sources.ids.keys() & chosen.keys())[name]
                yield f"  then      {vectors.describe(tail)}"
            else:
                yield _shape("embedding", artifact.matrix("tower", layer), folder)
                yield "  ids       not in the model: name them with --ids NAME=PATH"
        except PipelineError as error:
            yield f"  refused   {error}"


def describe_files(towers: Iterable[Tower], open_file: OpenFile) -> Iterator[str]:
    """Yields lines about towers whose vectors are in files that the trainer logged."""
    for tower in towers:
        yield f"vectors     {tower.layer}"
        yield from _describe(tower, tower.matrix.path.rpartition("/")[0], open_file)


def _shape(source: str, matrix: Matrix | VectorTable, folder: str) -> str:
    shape = f"{matrix.rows:,} rows × {matrix.dimension} {matrix.dtype}"
    return f"  {source:<9} {shape}, {matrix.size:,} bytes in {matrix.path.removeprefix(f'{folder}/')}"


def _describe(tower: Tower, folder: str, open_file: OpenFile) -> Iterator[str]:
    matrix, vocabulary = tower.matrix, tower.vocabulary
    size = vocabulary.span.end - vocabulary.span.start
    yield _shape(tower.source, matrix, folder)
    if isinstance(matrix, VectorTable):
        count, examples = _beside_vectors(matrix, open_file)
        yield f"  ids       {count:,}, in column {matrix.id_column!r} beside the vectors in {matrix.value_column!r}"
        yield f"  such as   {examples}"
        return
    count, examples = (_in_order if vocabulary.in_row_order else _unordered)(tower, open_file)
    if vocabulary.encoding is Encoding.ROWS:
        yield f"  ids       {count:,}, the numbers of the rows"
    else:
        yield f"  ids       {count:,}, {size:,} bytes in {vocabulary.path.removeprefix(f'{folder}/')}"
    if examples:
        yield f"  such as   {examples}"
    if vocabulary.in_row_order:  # Elsewhere several ids may have one row.
        yield f"  no ids    {matrix.rows - count:,} rows, {vocabulary.first_row:,} of them before the first id"


def _in_order(tower: Tower, open_file: OpenFile) -> tuple[int, str]:
    """Returns the number of ids, and some of them."""
    found = [piece for piece in pieces.cut(tower, open_file, pieces.PIECE_BYTES) if piece.ids]
    count = sum(piece.rows for piece in found)
    first = pieces.read(found[0], tower, open_file)[:_EXAMPLES].to_pylist() if found else []
    examples = ", ".join(encodings.shown(name[:_LONGEST_EXAMPLE]) for name in first)
    return count, f"{examples}{', …' if count > len(first) else ''}"


def _beside_vectors(table: VectorTable, open_file: OpenFile) -> tuple[int, str]:
    """Returns the number of ids, and some of them."""
    group = next(group for group in table.groups if group.rows)
    ids, _ = next(parquet.read_vectors(table, group, _EXAMPLES, open_file))
    examples = ", ".join(encodings.shown(name[:_LONGEST_EXAMPLE]) for name in ids.to_pylist())
    return table.rows, f"{examples}{', …' if table.rows > len(ids) else ''}"


def _unordered(tower: Tower, open_file: OpenFile) -> tuple[int, str]:
    """Returns the number of ids, and some of them with their rows."""
    entries = list(unordered.cut_entries(tower, open_file, unordered.PIECE_ENTRIES))
    if not entries:
        return 0, ""
    rows, names = unordered.read_entries(entries[0], tower, open_file)
    examples = ", ".join(
        f"{encodings.shown(name[:_LONGEST_EXAMPLE])} (row {row:,})"
        for name, row in zip(names[:_EXAMPLES].to_pylist(), rows, strict=False)
    )
    return sum(each.count for each in entries), f"{examples}, in the order of the table, not of the rows"
