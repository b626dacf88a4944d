"""Which lookup feeds which embedding, from a SavedModel's functions."""

from __future__ import annotations

from beam_pipeline.files import ByteFile
from beam_pipeline.formats import wire
from beam_pipeline.formats.wire import Span


def definitions(file: ByteFile, graph: Span) -> dict[str, Span]:
    """Returns the `FunctionDef` of each function in a GraphDef's library, by name."""
    found = {}
    for library in wire.spans(file, graph, 2):
        for definition in wire.spans(file, library, 1):
            signature = next(wire.spans(file, definition, 1), None)
            name = next(wire.spans(file, signature, 1), None) if signature else None
            if name:
                found[wire.text(file, name)] = definition
    return found
