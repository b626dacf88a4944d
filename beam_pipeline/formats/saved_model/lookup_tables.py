"""Where the ids of a SavedModel's lookup are.

The lookup's `_initialize` function says it: two captured constants (ids and their rows) or an asset (a file with an
id per line); those of a mutable table are in the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import google_crc32c
import numpy as np

from beam_pipeline.errors import ArtifactMissingError, ChecksumError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile, join
from beam_pipeline.formats import protobuf
from beam_pipeline.formats.model import Checksum, Encoding, Vocabulary, special_names
from beam_pipeline.formats.protobuf import Span
from beam_pipeline.formats.saved_model.object_graph import ObjectGraph

_DT_INT32, _DT_STRING, _DT_INT64 = 3, 7, 9
_IMPORT_OPS = ("LookupTableImportV2", "InitializeTableV2")
_FILE_OP = "InitializeTableFromTextFileV2"
_WHOLE_LINE, _LINE_NUMBER = -2, -1
_BLOCK = 4 << 20


def vocabulary(graph: ObjectGraph, table: int) -> Vocabulary:
    """Returns the ids that a lookup table maps to rows.

    Raises:
        UnsupportedModelError: they are not in the artifact, or in a form that cannot be read.
        CorruptFileError: the files contradict each other.
    """
    path = graph.path(table)
    for key in (graph.keys(table) or {}).values():
        if f"{key}-keys" in graph.bundle.entries:
            return _checkpoint_vocabulary(graph, key)
    where = f"{graph.file.path}: lookup {'.'.join(path)!r}"
    function = graph.function(graph.nodes[table].children.get("_initialize"))
    if function is None:
        raise UnsupportedModelError(f"{where} has no initializer: its ids are not in the artifact")
    captured = graph.captured(function)
    op, inputs, attributes = _initializer(graph, function, where)
    # The function's arguments are what it captured, in the order of `bound_inputs`.
    nodes = [captured[i] for i in inputs if i < len(captured)]
    if len(nodes) != len(inputs) or any(node >= len(graph.nodes) for node in nodes):
        raise CorruptFileError(f"{where}: its initializer names objects that are not there")
    if op == _FILE_OP:
        return _file_vocabulary(graph, nodes[1], attributes, _key_type(graph, table, where), where)
    return _constant_vocabulary(graph, nodes[1], nodes[2], where)


def _initializer(graph: ObjectGraph, function: str, where: str) -> tuple[str, list[int], Mapping[str, int]]:
    """Returns (op, argument number of each of its inputs, its integer attributes) of an initializer function."""
    definition = graph.library.definitions.get(function)
    signature = next(protobuf.spans(graph.file, definition, 1), None) if definition else None
    if definition and signature:
        names = (graph.string(argument, 1) for argument in protobuf.spans(graph.file, signature, 2))
        arguments = {name: number for number, name in enumerate(names)}
        for node in protobuf.spans(graph.file, definition, 3):
            op = graph.string(node, 2)
            if op == _FILE_OP or op in _IMPORT_OPS:
                inputs = [protobuf.text(graph.file, span) for span in protobuf.spans(graph.file, node, 3)]
                if len(inputs) < (2 if op == _FILE_OP else 3) or any(i not in arguments for i in inputs):
                    raise CorruptFileError(f"{where}: its initializer has other inputs than its arguments")
                return op, [arguments[name] for name in inputs], _integer_attributes(graph, node)
    raise UnsupportedModelError(f"{where} is initialized in an unknown way: neither from a list nor from a file")


def _integer_attributes(graph: ObjectGraph, node: Span) -> dict[str, int]:
    """Returns the attributes of a node that are integers or types."""
    attributes = {}
    for entry in protobuf.spans(graph.file, node, 5):
        value = next(protobuf.spans(graph.file, entry, 2), None)
        for number, content in protobuf.scan(graph.file, value) if value is not None else ():
            # AttrValue.i, two's complement in 64 bits, and AttrValue.type
            if number in (3, 6) and isinstance(content, int):
                attributes[graph.string(entry, 1)] = content - (1 << 64) if content >> 63 else content
    return attributes


def _key_type(graph: ObjectGraph, table: int, where: str) -> int:
    """Returns TensorFlow's number of the type of a table's keys, which only the function that makes it says."""
    function = graph.function(graph.nodes[table].children.get("_create_resource"))
    definition = graph.library.definitions.get(function or "")
    for node in protobuf.spans(graph.file, definition, 3) if definition else ():
        key_type = _integer_attributes(graph, node).get("key_dtype")
        if key_type is not None:
            return key_type
    raise UnsupportedModelError(f"{where}: the type of its ids is not in the artifact")


def _checkpoint_vocabulary(graph: ObjectGraph, key: str) -> Vocabulary:
    """Returns the vocabulary of a mutable table, whose ids are in the order of their hashes, not in row order."""
    where = f"{graph.bundle.prefix}.index: lookup {key!r}"
    keys, values = (graph.bundle.entries.get(f"{key}-{part}") for part in ("keys", "values"))
    if keys is None or values is None:
        raise CorruptFileError(f"{where} has ids but no rows; log the model again")
    if keys.sliced or values.sliced:
        raise UnsupportedModelError(f"{where} is saved in slices, which is not supported")
    if keys.dtype not in (_DT_STRING, _DT_INT64) or values.dtype != _DT_INT64:
        raise UnsupportedModelError(f"{where} {_other_types(keys.dtype, values.dtype)}")
    if len(keys.shape) != 1:  # A dense hash table keeps its empty buckets, and not what an empty one looks like.
        raise UnsupportedModelError(
            f"{where} has ids of shape {list(keys.shape)}, not a list: a DenseHashTable is not supported, "
            "save the model with a MutableHashTable or a StaticHashTable"
        )
    count = keys.shape[0]
    if values.shape != keys.shape or values.size != 8 * count or (keys.dtype == _DT_INT64 and keys.size != 8 * count):
        raise CorruptFileError(f"{where} has {count:,} ids, and rows of shape {list(values.shape)}; log it again")
    path, span = graph.bundle.data_path(values), Span(values.offset, values.offset + values.size)
    with graph.open_file(path) as file:
        first_row, _, crc = _row_order(file, span)
    if crc != values.crc32c:
        raise ChecksumError(f"{path}: {key}-values does not match its crc32c; log the model again")
    return Vocabulary(
        path=graph.bundle.data_path(keys),
        span=Span(keys.offset, keys.offset + keys.size),
        encoding=Encoding.STRING_TENSOR if keys.dtype == _DT_STRING else Encoding.INT64,
        first_row=first_row,
        count=count,
        row_numbers=span,
        in_row_order=False,
        row_numbers_path=path,
        checksum=Checksum("crc32c", keys.crc32c, Span(keys.offset, keys.offset + keys.size)),
    )


def _file_vocabulary(
    graph: ObjectGraph, node: int, attributes: Mapping[str, int], key_type: int, where: str
) -> Vocabulary:
    name = graph.asset(node, where)
    if attributes.get("key_index", _WHOLE_LINE) != _WHOLE_LINE or (
        attributes.get("value_index", _LINE_NUMBER) != _LINE_NUMBER
    ):
        raise UnsupportedModelError(f"{where} reads columns of its file; only one id per line, in order, is supported")
    encodings = {_DT_STRING: Encoding.LINES, _DT_INT64: Encoding.INTEGER_LINES}
    if key_type not in encodings:
        raise UnsupportedModelError(f"{where} {_other_types(key_type, _DT_INT64)}")
    first_row = attributes.get("offset", 0)
    if {"", ".", ".."} & {*name.split("/")}:
        raise CorruptFileError(f"{where}: its vocabulary file {name!r} is not in the model; log the model again")
    if not 0 <= first_row < 1 << 62:
        raise CorruptFileError(f"{where}: its first id has row {first_row}")
    path = join(graph.folder, "assets", name)
    with graph.open_file(path) as file:
        return Vocabulary(path, Span(0, file.size), encodings[key_type], first_row)


def _constant_vocabulary(graph: ObjectGraph, keys: int, values: int, where: str) -> Vocabulary:
    ids, count, ids_type = graph.constant(keys, where)
    rows, row_count, rows_type = graph.constant(values, where)
    if ids_type not in (_DT_STRING, _DT_INT64) or rows_type != _DT_INT64:
        raise UnsupportedModelError(f"{where} {_other_types(ids_type, rows_type)}")
    if count != row_count:
        raise CorruptFileError(f"{where} has {count:,} ids and {row_count:,} rows; log the model again")
    content = next(protobuf.spans(graph.file, rows, 4), None)
    in_row_order = True
    if content is not None:
        if content.end - content.start != 8 * count or not count:
            raise CorruptFileError(f"{where}: its rows have {content.end - content.start:,} bytes, not {8 * count:,}")
        first_row, in_row_order, _ = _row_order(graph.file, content)
    else:  # A list of one is written as a number instead.
        numbers = protobuf.integers(graph.file, rows, 10)
        if count > 1 or len(numbers) != count:
            raise UnsupportedModelError(f"{where}: its rows are not stored as a plain array")
        first_row = numbers[0] if numbers else 0
        if first_row >= 1 << 62:
            raise CorruptFileError(f"{where}: its first id has row {first_row}")
    encoding, span = constant_ids(graph, ids, ids_type, count, where)
    return Vocabulary(graph.file.path, span, encoding, first_row, count, row_numbers=content, in_row_order=in_row_order)


def constant_ids(graph: ObjectGraph, tensor: Span, dtype: int, count: int, where: str) -> tuple[Encoding, Span]:
    """Returns how and where the ids of a TensorProto are stored: strings, or integers of 32 or 64 bits."""
    if not count:
        return Encoding.PROTOBUF, Span(tensor.end, tensor.end)
    if dtype == _DT_STRING:
        first = protobuf.position(graph.file, tensor, 8)
        if first is None:
            raise UnsupportedModelError(f"{where}: its ids are not stored as a list of strings")
        return Encoding.PROTOBUF, Span(first, tensor.end)
    encoding, size, number = (Encoding.INT32, 4, 7) if dtype == _DT_INT32 else (Encoding.INT64, 8, 10)
    content = next(protobuf.spans(graph.file, tensor, 4), None)
    if content is not None:
        if content.end - content.start != size * count:
            raise CorruptFileError(f"{where}: its ids have {content.end - content.start:,} bytes, not {size * count:,}")
        return encoding, content
    packed = list(protobuf.spans(graph.file, tensor, number))
    if len(packed) != 1:
        raise UnsupportedModelError(f"{where}: its ids are not stored as a plain array")
    return Encoding.VARINTS, packed[0]


def special_tokens(graph: ObjectGraph, table: int, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Returns names for the rows before the first id, from the lookup's config in `keras_metadata.pb`.

    The file is Keras's `SavedMetadata` (tf_keras/protobuf/saved_metadata.proto): of each object the node number
    (field 2) and a JSON config (field 5). The mask token comes first, then one row per out-of-vocabulary bucket.
    """
    path = graph.path(table)[:-1]
    layers = {number for number, node in enumerate(graph.nodes) if node.children.get("lookup_table") == table}
    try:
        file = graph.open_file(join(graph.folder, "keras_metadata.pb"))
    except ArtifactMissingError as error:
        raise UnsupportedModelError(
            f"{graph.folder} has no keras_metadata.pb, which alone names the rows before the ids of "
            f"{'.'.join(path)!r}: it was not saved by Keras 2's model.save; leave out --include_oov"
        ) from error
    with file:
        for entry in protobuf.spans(file, Span(0, file.size), 1):
            fields = dict(protobuf.scan(file, entry))
            metadata = fields.get(5)
            if fields.get(2, 0) not in layers or not isinstance(metadata, Span):
                continue
            try:
                config = json.loads(protobuf.text(file, metadata))["config"]
                mask, oov, buckets = config["mask_token"], config["oov_token"], config["num_oov_indices"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CorruptFileError(f"{file.path}: no lookup's config for {'.'.join(path)!r}") from error
            tokens = special_names(f"{file.path}: lookup {'.'.join(path)!r}", mask, oov, buckets)
            if len(tokens) == vocabulary.first_row:
                return tuple(tokens)
    raise UnsupportedModelError(
        f"{graph.folder}: the {vocabulary.first_row} rows before the ids of {'.'.join(path)!r} have no names in "
        "keras_metadata.pb; leave out --include_oov"
    )


def _other_types(ids: int, rows: int) -> str:
    return f"maps TensorFlow type {ids} to {rows}; only strings and int64 to int64 are supported"


def _row_order(file: ByteFile, span: Span) -> tuple[int, bool, int]:
    """Returns (the lowest row, whether each is one more than the one before, crc32c) of an array of int64."""
    first, lowest, in_order, crc = 0, 0, True, 0
    for offset, block in file.blocks(span.start, span.end, _BLOCK):
        rows = np.frombuffer(block, "<i8")
        if offset == span.start:
            first = lowest = int(rows[0])
        position = first + (offset - span.start) // 8
        in_order = in_order and bool((rows == np.arange(position, position + len(rows))).all())
        lowest = min(lowest, int(rows.min()))
        crc = google_crc32c.extend(crc, block)
    # An id with a row below 0 is reported by whoever reads it, with its name.
    return max(lowest, 0), in_order and first >= 0, crc
