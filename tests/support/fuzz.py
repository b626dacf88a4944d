"""Mutates real models and reads them as the job does: right rows or a named error, in bounded time and memory.

    python tests/support/fuzz.py [--number=20000] [--seed=1] [--format=saved_model|keras] [--first=0] [--models DIR …]

runs that many mutations of each format in child processes, two at a time, and prints what came of them; exit 1 if one
of them crashed, hung, took too much memory or gave wrong rows. A mutation is made from (seed, format, number) and the
models alone, so a finding is replayed with `--seed`, `--format`, `--first=NUMBER --number=1`. Models are searched below
the folders given; without one they are made anew.

What may differ from the rows of the unmutated model, as nothing in the formats covers it with a checksum: in a
SavedModel the ids and which rows they get; in a `.keras` file nothing, but where the mutation mended the zip's CRC-32
anything that it covers. The bytes of a matrix must otherwise be those of a matrix of the unmutated model.
"""

import argparse
import copy
import faulthandler
import io
import json
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import wire_format
from wire_format import varint

from beam_pipeline import files
from beam_pipeline.errors import PipelineError
from beam_pipeline.formats import open_artifact
from beam_pipeline.formats.keras.reader import KerasFile
from beam_pipeline.formats.keras.weights import STRINGS
from beam_pipeline.formats.saved_model import checkpoint
from beam_pipeline.launch.options import DEFAULT_TOWERS
from beam_pipeline.launch.selection import discover
from beam_pipeline.reading import pieces, unordered
from beam_pipeline.reading.pieces import cover
from beam_pipeline.reading.rows import read_piece
from beam_pipeline.reading.tally import tally
from beam_pipeline.training import Run, Training, by_name

SECONDS = 10
"""Of processor time that reading a mutated model may take."""
MEGABYTES = 300
"""Above the imports that reading a mutated model may take."""

BATCH = 2500
FORMATS = ("saved_model", "keras")
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model: its files, and what is read from them."""

    folder: str
    files: dict[str, bytes] = field(repr=False)
    towers: dict[str, str]
    expected: dict[bool, dict[str, "Rows"] | None] = field(repr=False, default_factory=dict)
    matrices: frozenset[bytes] = field(repr=False, default=frozenset())
    free: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Rows:
    """What was read of a tower."""

    ids: list[str]
    vectors: np.ndarray
    raw: bytes


class TooSlowError(BaseException):
    """Not an Exception, so that no reader takes it for one of its own."""


# Reading, as the launcher and the workers do it.


def opener(contents):
    """An OpenFile over bytes by path; what is not among them is opened as the job does."""

    def open_file(path):
        data = contents.get(path)
        if data is None:
            return files.open_file(path)
        return files.ByteFile(path, io.BytesIO(data), len(data))

    return open_file


def read(folder, contents, layers, *, include_oov, piece_bytes):
    """Returns the rows of each tower, read and checked as a job does."""
    open_file = opener(contents)
    with closing(open_artifact(folder, open_file, layers.values())) as artifact:
        artifact.tower_layers()
        towers = cover([artifact.tower(name, layer, include_oov=include_oov) for name, layer in layers.items()])
        artifact.tails(layers)
    found, reports = {}, []
    for tower in towers:
        names, vectors = [], []
        for batch, report in _pieces(tower, open_file, piece_bytes):
            reports.append(report)
            if batch is not None:
                names += batch.ids.to_pylist()
                # Of the special rows before the ids, and of those after them, not all have names.
                vectors.append(batch.vectors[: len(batch.ids)])
        if not tower.vocabulary.in_row_order:
            order = sorted(range(len(names)), key=names.__getitem__)
            names = [names[at] for at in order]
            vectors = [np.concatenate(vectors)[order]] if vectors else []
        with open_file(tower.matrix.path) as file:
            raw = file.read(tower.matrix.offset, tower.matrix.rows * tower.matrix.row_bytes)
        vectors = np.concatenate(vectors) if vectors else np.zeros((0, tower.matrix.dimension))
        found[tower.name] = Rows(names, vectors, raw)
    run = Run("run", "", "", "", date(2026, 3, 1), "")
    counted = tally(reports, [Training(run, folder, by_name(towers))])
    assert {name: counted["run", name].ids for name in layers} == {name: len(r.ids) for name, r in found.items()}
    assert all(len(rows.ids) == len(rows.vectors) for rows in found.values())
    return found


def _pieces(tower, open_file, piece_bytes):
    """Yields what `read_piece` returns for all of a tower; ids in no order are sorted by row, as a shuffle does it."""
    if tower.vocabulary.in_row_order:
        for piece in pieces.cut(tower, open_file, piece_bytes):
            yield read_piece("run", piece, tower, open_file)
        return
    tokens = [token.encode() for token in tower.vocabulary.special_tokens]
    rows, names = [np.arange(len(tokens), dtype=np.int64)], [pa.array(tokens, pa.binary())]
    for entries in unordered.cut_entries(tower, open_file, piece_bytes // 16):
        for found, more in zip((rows, names), unordered.read_entries(entries, tower, open_file), strict=True):
            found.append(more)
    rows, names = np.concatenate(rows), pa.concat_arrays(names)
    step = max(1, piece_bytes // tower.matrix.row_bytes)
    for first in range(0, tower.matrix.rows, step):
        own = np.flatnonzero((rows >= first) & (rows < first + step))
        found = rows[own], names.take(pa.array(own))
        piece = pieces.Piece(tower.name, first, min(step, tower.matrix.rows - first), None, rows_and_ids=found)
        yield read_piece("run", piece, tower, open_file)


def subjects(folders, kind):
    """Returns the models of a format below folders."""
    marker = {"saved_model": "saved_model.pb", "keras": "model.keras"}[kind]
    return [_subject(path.parent) for folder in folders for path in sorted(Path(folder).rglob(marker))]


def _subject(folder):
    contents = {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with closing(open_artifact(str(folder), opener(contents), DEFAULT_TOWERS.values())) as artifact:
        layers = artifact.tower_layers()
        by_side = {side: next((one for one in layers if side in one), own) for side, own in DEFAULT_TOWERS.items()}
        towers = discover(layers, artifact.index_layers()) or ({"user": layers[0]} if len(layers) == 1 else by_side)
        free = []
        if isinstance(artifact, KerasFile):
            weights = artifact._members["model.weights.h5"].span
            start, spans = weights.start, []
            for dataset in artifact._weights._datasets.values():
                if dataset.offset is not None and dataset.dtype != STRINGS:  # References are mutated, too.
                    size = int(np.prod(dataset.shape)) * int(re.sub(r"\D", "", dataset.dtype) or 1)
                    spans.append((dataset.offset, dataset.offset + size))
            data = contents[artifact.path]
            matrices = frozenset(data[start + a : start + b] for a, b in spans)
            at = 0
            for a, b in [*sorted(spans), (weights.end - start, 0)]:
                free.append((at, a))
                at = b
        else:
            bundle = artifact._graph.bundle
            matrices = frozenset(
                contents[bundle.data_path(entry)][entry.offset : entry.offset + entry.size]
                for entry in bundle.entries.values()
            )
    subject = Subject(str(folder), contents, dict(towers), {}, matrices, tuple((a, b) for a, b in free if a < b))
    for include_oov in (False, True):
        try:
            subject.expected[include_oov] = read(
                subject.folder, contents, subject.towers, include_oov=include_oov, piece_bytes=1 << 14
            )
        except PipelineError:
            subject.expected[include_oov] = None
    for tower in towers:
        answer = folder.parent / f"{folder.name}.{tower}.json"
        if answer.exists() and subject.expected[False]:  # what Keras or TensorFlow itself says
            rows, vectors = subject.expected[False][tower], np.load(answer.with_suffix(".npy"))
            right = dict(zip(json.loads(answer.read_text("utf-8")), vectors.tolist(), strict=True))
            assert dict(zip(rows.ids, rows.vectors.astype(float).tolist(), strict=True)) == right
    return subject


# Mutations of bytes.


def mutate(data, rng, low=0, high=None):
    """Returns the bytes with one thing changed between two positions."""
    high = len(data) if high is None else high
    if high <= low:
        return data + rng.randbytes(rng.randint(0, 3))
    at = rng.randrange(low, high)
    length = min(high - at, rng.choice((1, 1, 2, 4, 8, rng.randint(1, 64), rng.randint(1, 4096))))
    part = data[at : at + length]
    other = rng.randrange(low, high)
    match rng.randrange(12):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + rng.randbytes(length) + data[at + length :]
        case 2:
            return data[:at] + rng.randbytes(length) + data[at:]
        case 3:
            return data[:at] + data[at + length :]
        case 4:
            return data[: at + length] + part + data[at + length :]
        case 5:
            return data[:at] + bytes(length) + data[at + length :]
        case 6:
            return data[:at] + b"\xff" * length + data[at + length :]
        case 7:
            return data[:at]
        case 8:  # a block somewhere else
            return data[:other] + part + data[other + length :]
        case 9:  # a length
            return data[:at] + varint(rng.choice(EXTREMES)) + data[at + 1 :]
        case 10:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(EXTREMES) % (1 << 8 * width)
            return data[:at] + number.to_bytes(width, "little") + data[at + width :]
        case _:
            small = bytes([rng.choice((0, 1, 2, 4, 8, 10, 0x7F, 0x80, 0xFE, 0xFF, ord("\n"), ord('"'), ord("\\")))])
            return data[:at] + small + data[at + 1 :]


def some(data, rng, low=0, high=None):
    """Returns the bytes with one or a few things changed."""
    size = len(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        # The end of the region moves with what was put in or taken out before it.
        data = mutate(data, rng, low, None if high is None else max(low, high + len(data) - size))
    return data


def spliced(one, other, rng):
    """Returns the start of one file and the end of another."""
    return one[: rng.randrange(len(one) + 1)] + other[rng.randrange(len(other) + 1) :]


def mutate_message(data, rng, depth=0):
    """Returns a protobuf message in which one field, at any depth, was changed, and all lengths around it mended."""
    try:
        fields = list(wire_format.fields(data))
        parts = [raw for _, _, raw in fields]
    except IndexError:
        return some(data, rng)
    if not parts or b"".join(parts) != data:
        return some(data, rng)
    at = rng.randrange(len(parts))
    number, content, raw = fields[at]
    if content and depth < 12 and rng.random() < 0.85:
        parts[at] = wire_format.field(number, mutate_message(content, rng, depth + 1))
        return b"".join(parts)
    match rng.randrange(8):
        case 0:
            del parts[at]
        case 1:
            parts.insert(rng.randrange(len(parts)), raw)
        case 2:
            parts[at] = wire_format.field(number, rng.choice(EXTREMES))
        case 3:
            parts[at] = wire_format.field(rng.randint(1, 20), content if content is not None else rng.choice(EXTREMES))
        case 4:
            parts[at] = wire_format.field(number, some(content or b"", rng))
        case 5:
            parts[at] = raw * min(rng.choice((2, 10, 1000)), 1 + (1 << 20) // len(raw))
        case 6:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case _:
            text = rng.choice((b"", b"../../x", b"a\nb", b"\0", b"\xff\xfe", b"x" * 5000, b"user_layer", b"embeddings"))
            parts[at] = wire_format.field(number, text)
    return b"".join(parts)


# Mutations of JSON.

_RAW = re.compile(r'"<raw (\d+)>"')
_RAWS = ("9" * 5000, "-" + "9" * 4300, "1e999999", "NaN", "-Infinity", "[" * 100_000, "[]x", '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"', '"a\\nb"', "0x10", "1.", *("[" * n + "]" * n for n in (50, 500, 900, 970, 985, 100_000)))  # fmt: skip
_VALUES = (None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 40, 1 << 63, -(1 << 63), 10**400, 1.5, "", "a", "x" * 5000, "int", [], {}, [[]], [None], {"class_name": "StringLookup"}, {"class_name": "Embedding", "config": {"name": "x"}}, "Functional", "[UNK]")  # fmt: skip


def mutate_json(text, rng):
    """Returns JSON text in which one value, at any depth, was changed for something odd."""
    root = [json.loads(text)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        parent, key = root, 0
        while True:
            one = parent[key]
            if not isinstance(one, dict | list) or not one or rng.random() < 0.1:
                break
            parent, key = one, rng.choice(list(one) if isinstance(one, dict) else range(len(one)))
        match rng.randrange(6):
            case 0 if parent is not root:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(["", "vocabulary", "layers", "name", "config", "a\nb"])] = parent.pop(key)
            case 2:
                parent[key] = [copy.deepcopy(parent[key]) for _ in range(rng.choice((1, 2, 20)))]
            case 3:
                parent[key] = f"<raw {rng.randrange(len(_RAWS))}>"
            case 4:
                other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
                parent[key], parent[other] = copy.deepcopy(parent[other]), parent[key]
            case _:
                parent[key] = copy.deepcopy(rng.choice(_VALUES))
    text = json.dumps(root[0], ensure_ascii=rng.random() < 0.5)
    text = _RAW.sub(lambda found: _RAWS[int(found[1])], text)
    return text.encode("utf-8", "surrogatepass")


# Mutations of a SavedModel.


def _table(entries, rng):
    """A LevelDB table of (key, value) pairs; see leveldb/doc/table_format.md."""

    def block(pairs):
        data = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
        restarts = rng.choice((1, 1, 1, 1, rng.choice(EXTREMES) % (1 << 32)))
        data += bytes(4) + restarts.to_bytes(4, "little")
        return data, data + _trailer(data)

    data, stored = block(entries)
    index, index_stored = block([(entries[-1][0] if entries else b"", varint(0) + varint(len(data)))])
    meta, meta_stored = block([])
    footer = varint(len(stored) + len(index_stored)) + varint(len(meta)) + varint(len(stored)) + varint(len(index))
    return stored + index_stored + meta_stored + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def _trailer(data):
    crc = google_crc32c.value(data + b"\0")
    return b"\0" + (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def _pairs(index):
    """Returns the (key, value) pairs of an index that TensorFlow wrote, and the place of its blocks."""
    file = files.ByteFile("index", io.BytesIO(index), len(index))
    footer, found, places = index[-48:], [], []
    _, _, at = checkpoint._handle(footer, 0)
    start, size, _ = checkpoint._handle(footer, at)
    places.append((start, size))
    for _, handle in checkpoint._block(file, start, size):
        start, size, _ = checkpoint._handle(handle, 0)
        places.append((start, size))
        found += checkpoint._block(file, start, size)
    return found, places


def _mutate_index(index, rng):
    """Returns an index that was changed behind its checksums, which were mended."""
    pairs, places = _pairs(index)
    if rng.random() < 0.4:
        start, size = rng.choice(places)
        block = some(index[start : start + size], rng)[:size].ljust(size, b"\0")
        return index[:start] + block + _trailer(block) + index[start + size + 5 :]
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(pairs))
        key, value = pairs[at]
        match rng.randrange(6):
            case 0:
                pairs[at] = some(key, rng), value
            case 1:
                pairs[at] = key, pairs[rng.randrange(len(pairs))][1]
            case 2:
                pairs.insert(rng.randrange(len(pairs) + 1), (key, mutate_message(value, rng)))
            case 3 if len(pairs) > 1:
                del pairs[at]
            case _:
                pairs[at] = key, mutate_message(value, rng)
    return _table(pairs, rng)


def _mutate_object_graph(subject, contents, rng):
    """Puts another object graph into the checkpoint, and its checksum."""
    prefix = next(path for path in contents if path.endswith("variables.index")).removesuffix(".index")
    pairs, _ = _pairs(contents[f"{prefix}.index"])
    bundle = checkpoint.read_bundle(prefix, opener(contents))
    entry = bundle.entries[checkpoint.OBJECT_GRAPH_KEY]
    graph = mutate_message(bundle.read_string(checkpoint.OBJECT_GRAPH_KEY, opener(contents)), rng)
    lengths = struct.pack("<I", len(graph))
    masked = _trailer(lengths)[1:]  # any checksum: it is compared as a part of the other
    stored = varint(len(graph)) + masked + graph
    crc = google_crc32c.value(lengths + masked + graph)
    crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    path = bundle.data_path(entry)
    value = b"".join(
        wire_format.field(number, content)
        for number, content in ((1, 7), (2, b""), (4, len(contents[path])), (5, len(stored)))
    )
    value += varint(6 << 3 | 5) + crc.to_bytes(4, "little")
    pairs = [(key, value if key == checkpoint.OBJECT_GRAPH_KEY.encode() else old) for key, old in pairs]
    fixed = random.Random(0)
    return {**contents, path: contents[path] + stored, f"{prefix}.index": _table(pairs, _Plain(fixed))}


class _Plain:
    """Chooses the plain thing: for a table without mutations of its own."""

    def __init__(self, rng):
        self._rng = rng

    def choice(self, options):
        return options[0]


def mutate_saved_model(subject, others, rng):
    """Returns (what was mutated, the files, what may differ: "", "ids")."""
    contents = dict(subject.files)

    def path(end):
        return next((path for path in contents if re.search(end, path)), None)

    pb, index = path(r"saved_model\.pb$"), path(r"variables\.index$")
    data, metadata, asset = path(r"\.data-"), path(r"keras_metadata\.pb$"), path("/assets/")
    what = rng.choice(
        [
            "pb",
            "message",
            "message",
            "objects",
            "objects",
            "objects",
            "initializer",
            "constants",
            "index",
            "table",
            "table",
            "table",
            "graph",
            "graph",
            "data",
            "asset",
            "metadata",
            "metadata-json",
            "splice",
            "other-file",
            "missing",
        ]
    )
    match what:
        case "pb":
            contents[pb] = some(contents[pb], rng)
        case "message":
            for _ in range(rng.choice((1, 1, 2, 5))):
                contents[pb] = mutate_message(contents[pb], rng)
        case "objects":  # MetaGraphDef.object_graph_def
            for _ in range(rng.choice((1, 1, 2, 5))):
                contents[pb] = wire_format.rewrite(contents[pb], [2, 7], lambda graph: mutate_message(graph, rng))
        case "initializer":  # GraphDef.library.function
            contents[pb] = wire_format.rewrite(
                contents[pb],
                [2, 2, 2, 1],
                lambda one: mutate_message(one, rng) if b"_initializer_" in one[:60] else one,
            )
        case "constants":  # GraphDef.node
            contents[pb] = wire_format.rewrite(
                contents[pb], [2, 2, 1], lambda node: mutate_message(node, rng) if b"Const" in node[:60] else node
            )
        case "index":
            contents[index] = some(contents[index], rng)
        case "table":
            contents[index] = _mutate_index(contents[index], rng)
        case "graph":
            contents = _mutate_object_graph(subject, contents, rng)
        case "data":
            contents[data] = some(contents[data], rng)
        case "asset" if asset:
            contents[asset] = some(contents[asset], rng)
        case "metadata" if metadata:
            contents[metadata] = mutate_message(contents[metadata], rng)
        case "metadata-json" if metadata:
            contents[metadata] = wire_format.rewrite(
                contents[metadata], [1, 5], lambda text: mutate_json(text, rng) if rng.random() < 0.5 else text
            )
        case "splice":
            one = rng.choice(list(contents))
            contents[one] = spliced(contents[one], rng.choice(list(rng.choice(others).files.values())), rng)
        case "other-file":
            one = rng.choice(list(contents))
            contents[one] = rng.choice(list(rng.choice(others).files.values()))
        case _:
            del contents[rng.choice(list(contents))]
    return what, contents, {"data": "", "index": "", "missing": ""}.get(what, "ids")


# Mutations of a `.keras` file.


def _zipped(members, rng):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _mutate_zip(data, members, rng):
    """Returns a file whose directory or headers were changed, or that was zipped in another way."""
    directory = data.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", data, directory + 16)[0]
    headers = [found.start() for found in re.finditer(b"PK\x03\x04", data) if found.start() < start]
    match rng.randrange(6):
        case 0 | 1:
            return some(data, rng, start)
        case 2:
            at = rng.choice(headers)
            return some(data, rng, at, at + 30)
        case 3:  # a number of an entry of the directory: sizes, offset, lengths of name and extra field
            entry = rng.choice([found.start() for found in re.finditer(b"PK\x01\x02", data) if found.start() >= start])
            at, width = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)))
            number = rng.choice(EXTREMES) % (1 << 8 * width)
            return data[: entry + at] + number.to_bytes(width, "little") + data[entry + at + width :]
        case 4:  # zip64
            entry = rng.choice([found.start() for found in re.finditer(b"PK\x01\x02", data) if found.start() >= start])
            name, extra = struct.unpack_from("<HH", data, entry + 28)
            numbers = b"".join((rng.choice(EXTREMES) % (1 << 64)).to_bytes(8, "little") for _ in range(3))
            field = struct.pack("<HH", 1, rng.choice((24, 16, 8, 4, 0xFFFF))) + numbers
            head = bytearray(data[entry : entry + 46])
            struct.pack_into("<II", head, 20, 0xFFFFFFFF, 0xFFFFFFFF)
            struct.pack_into("<H", head, 30, extra + len(field))
            struct.pack_into("<I", head, 42, rng.choice((0, 0xFFFFFFFF)))
            rest = data[entry + 46 : entry + 46 + name] + field + data[entry + 46 + name :]
            end = bytearray(data[directory:])
            size = struct.unpack_from("<I", end, 12)[0]
            struct.pack_into("<I", end, 12, size + len(field))
            return data[:entry] + bytes(head) + rest[: -len(end)] + bytes(end)
        case _:
            warnings.simplefilter("ignore")  # of names that are there twice
            odd = ("a/" * 300 + "x", "a\nb", "../x")
            names = [
                (rng.choice((name, name, name.upper(), f"assets/{name}", f"{name}\0x", *odd)), content)
                for name, content in members
            ]
            rng.shuffle(names)
            return _zipped(names + names[: rng.randrange(2)], rng)


def mutate_keras(subject, others, rng):
    """Returns (what was mutated, the files, what may differ: "", "ids" or "all")."""
    (path,) = subject.files
    data = subject.files[path]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    what = rng.choice(
        [
            "bytes",
            "zip",
            "zip",
            "config",
            "json",
            "json",
            "json",
            "json",
            "hdf5",
            "hdf5",
            "hdf5",
            "hdf5",
            "hdf5",
            "asset",
            "splice",
            "members",
        ]
    )
    match what:
        case "bytes":
            return what, {path: some(data, rng)}, ""
        case "zip":
            return what, {path: _mutate_zip(data, members.items(), rng)}, "ids"
        case "splice":  # perhaps the whole of the other
            return what, {path: spliced(data, rng.choice(list(rng.choice(others).files.values())), rng)}, "all"
        case "config":
            members["config.json"] = some(members["config.json"], rng)
        case "json":
            members["config.json"] = mutate_json(members["config.json"], rng)
        case "hdf5":
            weights = members["model.weights.h5"]
            for _ in range(rng.choice((1, 1, 2, 5))):
                low, high = rng.choice(subject.free)
                weights = mutate(weights, rng, min(low, len(weights)), min(high, len(weights)))
            members["model.weights.h5"] = weights
        case "asset":
            assets = [name for name in members if name.startswith("assets/")]
            if assets:
                name = rng.choice(assets)
                members[name] = some(members[name], rng)
        case "members":  # of another model
            with zipfile.ZipFile(io.BytesIO(*rng.choice(others).files.values())) as archive:
                name = rng.choice(archive.namelist())
                members[name] = archive.read(name)
    allowed = {"config": "ids", "json": "ids", "asset": "ids"}.get(what, "all")
    return what, {path: _zipped(members.items(), rng)}, allowed


# The verdict.


def verdict(subject, rows, allowed, include_oov):
    """Returns what came of it: "same", or a word for how rows differ; raises AssertionError if they must not."""
    expected = subject.expected[include_oov]
    if expected is not None and all(
        rows[name].ids == expected[name].ids and np.array_equal(rows[name].vectors, expected[name].vectors)
        for name in expected
    ):
        return "same"
    assert allowed, "other rows, although a checksum covers what was changed"
    if allowed == "ids":
        for name, found in rows.items():
            assert found.raw in subject.matrices, f"the vectors of {name} are none of the model's"
        return "other ids or rows"
    return "another model"


def one(kind, seed, number, models):
    """Runs one mutation; returns (what was mutated, what came of it, problem or None)."""
    rng = random.Random(f"{seed}:{kind}:{number}")
    subject = rng.choice(models)
    mutated = {"saved_model": mutate_saved_model, "keras": mutate_keras}[kind]
    what, contents, allowed = mutated(subject, models, rng)
    include_oov, piece_bytes = rng.random() < 0.4, rng.choice((1 << 10, 1 << 14, pieces.PIECE_BYTES))
    name = f"{Path(subject.folder).name}, {what}"
    # Memory is counted from here: writing 5 resets the peak (Documentation/filesystems/proc.rst).
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        folder = _missing_is_missing(subject, contents)
        rows = read(folder, contents, subject.towers, include_oov=include_oov, piece_bytes=piece_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, problem = verdict(subject, rows, allowed, include_oov), None
    except PipelineError as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, problem = type(error).__name__, _wrong_with(error)
    except (Exception, TooSlowError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, problem = f"{type(error).__name__}", "".join(traceback.format_exception(error)[-8:])
    took, used = time.process_time() - started, _memory("VmHWM") - before
    if used > MEGABYTES:
        problem = f"{used} MB; {problem or outcome}"
    return name, outcome, problem, took, used


def _missing_is_missing(subject, contents):
    """Returns the folder, renamed if files were taken away, so that they are not found on the disk instead."""
    if contents.keys() >= subject.files.keys():
        return subject.folder
    for path in [*contents]:
        contents[path.replace(subject.folder, f"{subject.folder}.gone")] = contents.pop(path)
    return f"{subject.folder}.gone"


def _wrong_with(error):
    text = str(error)
    if not text or not text.isprintable() or len(text) > 5000:
        return f"no line that can be shown: {text[:300]!r} ({len(text):,} characters)"
    cause = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"{cause!r} inside of {error}"
        cause = cause.__cause__
    return None


def _memory(name):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def run_batch(kind, seed, first, number, folders, state):
    """Runs mutations in this process; returns a summary."""

    def too_slow(*_):
        raise TooSlowError(f"more than {SECONDS} s")

    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # What wants more ends in MemoryError, not the machine.
    signal.signal(signal.SIGPROF, too_slow)
    models = subjects(folders, kind)
    outcomes, kinds, problems, slowest, largest = Counter(), Counter(), [], 0.0, 0
    for at in range(first, first + number):
        state.seek(0)
        state.write(f"{at}\n")
        state.flush()
        name, outcome, problem, took, used = one(kind, seed, at, models)
        kinds[name.split(", ")[1]] += 1
        outcomes[outcome] += 1
        slowest, largest = max(slowest, took), max(largest, used)
        if problem:
            problems.append({"format": kind, "seed": seed, "number": at, "what": name, "problem": problem})
    return {"outcomes": outcomes, "kinds": kinds, "problems": problems, "slowest": slowest, "largest": largest}


def run(number, seed, folders, *, formats=FORMATS, first=0, processes=2):
    """Runs mutations in child processes; returns {format: summary}."""
    summaries = {
        kind: {"outcomes": Counter(), "kinds": Counter(), "problems": [], "slowest": 0.0, "largest": 0}
        for kind in formats
    }

    def batch(kind, start, count):
        with tempfile.NamedTemporaryFile("r") as state:
            options = [str(option) for option in (kind, seed, start, count, state.name, *folders)]
            command = [sys.executable, __file__, "--batch", *options]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
                code, out, err = done.returncode, done.stdout, done.stderr
            except subprocess.TimeoutExpired as expired:
                code, out, err = "no end", "", str(expired)
            if code == 0:
                return kind, json.loads(out.splitlines()[-1])
            problem = f"the process ended with {code}: {err[-2000:]}"
            at = int(state.readline() or -1)
        found = {"format": kind, "seed": seed, "number": at, "what": "crash", "problem": problem}
        return kind, {"outcomes": {"crash": 1}, "kinds": {}, "problems": [found], "slowest": 0.0, "largest": 0}

    with ThreadPoolExecutor(processes) as pool:
        jobs = [
            pool.submit(batch, kind, start, min(BATCH, first + number - start))
            for start in range(first, first + number, BATCH)
            for kind in formats
        ]
        for ended, job in enumerate(jobs, 1):
            kind, result = job.result()
            if sys.stderr.isatty():
                print(f"{ended:,} of {len(jobs):,} batches of {BATCH:,}", end="\r", file=sys.stderr, flush=True)
            summary = summaries[kind]
            for name in ("outcomes", "kinds"):
                summary[name].update(result[name])
            summary["problems"] += result["problems"]
            for name in ("slowest", "largest"):
                summary[name] = max(summary[name], result[name])
    return summaries


def model_folders():
    """Returns folders with models of both formats."""
    from models import made_by  # Not for the batches, whose memory is measured.

    scripts = ("models", "tables", "exported_models", "keras_files", "indexes", "keras_indexes")
    return [str(made_by(f"make_{script}.py")("").folder) for script in scripts]


def main(argv):
    if argv[:1] == ["--batch"]:
        kind, seed, first, number, state, *folders = argv[1:]
        with open(state, "w") as file:
            print(json.dumps(run_batch(kind, int(seed), int(first), int(number), folders, file)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, action="append")
    parser.add_argument("--models", nargs="+")
    options = parser.parse_args(argv)
    folders = options.models or model_folders()
    summaries = run(options.number, options.seed, folders, formats=options.format or FORMATS, first=options.first)
    for kind, summary in summaries.items():
        count, slowest, largest = sum(summary["outcomes"].values()), summary["slowest"], summary["largest"]
        print(f"{kind}: {count:,} mutations, the slowest took {slowest:.1f} s, the largest {largest} MB")
        print("  mutated   ", ", ".join(f"{what} {count:,}" for what, count in summary["kinds"].most_common()))
        print("  came of it", ", ".join(f"{what} {count:,}" for what, count in summary["outcomes"].most_common()))
        for problem in summary["problems"]:
            print(json.dumps(problem))
    return int(any(summary["problems"] for summary in summaries.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
