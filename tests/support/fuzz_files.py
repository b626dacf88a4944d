"""Mutates real files of vectors, ids and features and reads them as the job does: rows or a named error, in bounded memory.

    python tests/support/fuzz_files.py [--number=5000] [--seed=1] [--first=0]

prints what came of them; exit 1 if one of them hung, took too much memory or ended in anything but a named error. A
mutation is made from (seed, number) alone. What the files have no checksum of may differ: vectors in `.npy` and
`.safetensors`, ids and features. Of `.npz` and of Parquet with checksums of its pages, vectors may not.
"""

import argparse
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz import EXTREMES, MEGABYTES, SECONDS, TooSlowError, _memory, _wrong_with, opener, some
from safetensors.numpy import save
from wire_format import varint

from beam_pipeline.computing import sources
from beam_pipeline.computing.columns import Columns, arrays, bind, ids_of
from beam_pipeline.computing.signature import Input, Signature
from beam_pipeline.errors import PipelineError
from beam_pipeline.formats.files import ids, vectors
from beam_pipeline.formats.model import VectorTable
from beam_pipeline.reading import pieces, rows, unordered
from beam_pipeline.reading.tally import tally
from beam_pipeline.training import Run, Training

ROWS, DIMENSION = 300, 4
VECTORS = np.random.default_rng(1).normal(size=(ROWS, DIMENSION)).astype("f4")
IDS = [f"i{n}é" for n in range(ROWS)]


def parquet(kind, **options):
    values = pa.array(VECTORS.tolist(), kind)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": IDS, "vector": values, "other": range(ROWS)}), buffer, **options)
    return buffer.getvalue()


def numpy(write, *arrays, **named):
    buffer = io.BytesIO()
    write(buffer, *arrays, **named)
    return buffer.getvalue()


def id_files():
    table = io.BytesIO()
    pq.write_table(pa.table({"id": IDS[::-1], "row": range(ROWS)[::-1]}), table, row_group_size=120)
    return {
        "ids.txt": "\n".join(IDS).encode(),
        "ids.json": json.dumps(IDS).encode(),
        "ids.npy": numpy(np.save, np.array(IDS)),
        "ids.npz": numpy(np.savez, ids=np.arange(ROWS)),
        "rows.json": json.dumps({name: row for row, name in enumerate(IDS)}).encode(),
        "rows.csv": "".join(["id,row\n", *(f"{name},{row}\n" for row, name in enumerate(IDS))]).encode(),
        "rows.parquet": table.getvalue(),
    }


def vector_files():
    lists = pa.list_(pa.float32())
    return {
        "v.parquet": parquet(lists, row_group_size=70, write_page_checksum=True),
        "plain.parquet": parquet(lists, compression="none", use_dictionary=False, write_page_checksum=True),
        "fixed.parquet": parquet(pa.list_(pa.float32(), DIMENSION), compression="zstd", write_page_checksum=True),
        "v.npz": numpy(np.savez, ids=np.array(IDS), vectors=VECTORS),
        "v.npy": numpy(np.save, VECTORS),
        "v.safetensors": save({"v": VECTORS, "w": VECTORS[:3]}),
    }


INPUTS = {
    "age": (Input("age", "int32"), pa.array(np.arange(ROWS) % 90, pa.int32())),
    "time": (Input("time", "float32"), pa.array(np.arange(ROWS) / ROWS, pa.float32())),
    "city": (Input("city", "string"), pa.array([["Metz", "Lens", "Albi"][n % 3] for n in range(ROWS)])),
    "last": (Input("last", "int64", (2,)), pa.array([[n, n + 1] for n in range(ROWS)], pa.list_(pa.int64(), 2))),
    "history": (Input("history", "string", (None,)), pa.array([[f"h{n % 5}"] * (n % 4) for n in range(ROWS)])),
}
COLUMNS = Columns("item", "item_id", tuple(INPUTS), tuple(each for each, _ in INPUTS.values()))
FEATURES = pa.table({"item_id": IDS, **{name: values for name, (_, values) in INPUTS.items()}})


def feature_files():
    def written(**options):
        buffer = io.BytesIO()
        pq.write_table(FEATURES, buffer, **options)
        return buffer.getvalue()

    return {
        "features.parquet": written(row_group_size=70),
        "plain.features.parquet": written(compression="none", use_dictionary=False, write_page_checksum=True),
        "zstd.features.parquet": written(compression="zstd", data_page_version="2.0"),
    }


def read_features(path, contents):
    """Returns the rows of features, checked and turned into what a model is called with."""
    sources.open_file = opener(contents)
    files, found, counted = sources.ParquetFiles(path, (path,)), [], 0
    signature = Signature(COLUMNS.inputs, DIMENSION)
    assert bind("item", signature, files.schema(), path).all == COLUMNS.all
    for share, said in files.cut(COLUMNS, None):
        counted += said
        for table in files.read(share, COLUMNS):
            assert table.num_rows <= sources.CHUNK_ROWS
            names = ids_of(table, COLUMNS)
            for _ in arrays(table, COLUMNS, names):
                pass
            found.append(table)
    table = pa.Table.from_batches(found) if found else FEATURES.slice(0, 0)
    assert table.num_rows == counted
    return table


def read(path, names, ids_path, contents, batch_bytes):
    """Returns the vectors and the number of ids, read and checked as a job does."""
    open_file = opener(contents)
    matrix, vocabulary = vectors.find_vectors("item", path, names, open_file, lambda _: [], outside_ids=bool(ids_path))
    if ids_path and not isinstance(matrix, VectorTable):
        found = ids.read_vocabulary(ids_path, "item", (), 0, open_file, lambda _: [])
        vocabulary = vectors.fitted("item", found, matrix)
    (tower,) = pieces.cover([vectors.file_tower("item", path, matrix, vocabulary)])
    towers, elements = {"run": tower}, []
    if isinstance(matrix, VectorTable):
        first = 0
        for group in matrix.groups:
            elements += rows.read_group("run", group, first, tower, open_file)
            first += group.rows
    elif vocabulary.in_row_order:
        elements = [("run", piece) for piece in pieces.cut(tower, open_file, batch_bytes)]
    else:
        found = [
            unordered.read_entries(some_entries, tower, open_file)
            for some_entries in unordered.cut_entries(tower, open_file, 100)
        ]
        numbers = np.concatenate([each for each, _ in found]) if found else np.zeros(0, np.int64)
        names = pa.concat_arrays([each for _, each in found]) if found else pa.array([], pa.binary())
        order = np.argsort(numbers, kind="stable")
        sorted_ids = numbers[order], names.take(pa.array(order))
        piece = pieces.Piece("item", 0, matrix.rows, None, rows_and_ids=sorted_ids)
        elements = [("run", piece), *(("run", piece) for piece in pieces.cut_rest(tower, batch_bytes))]
    batches, reports = [], []
    for element in elements:
        batch, report = rows.read(element, towers, open_file)
        reports.append(report)
        if batch is not None:
            assert len(batch.ids) == len(batch.vectors)
            batches.append(batch.vectors)
    counted = tally(reports, [Training(Run("run", "", "", "", date(2026, 3, 1), ""), path, towers)])
    assert counted["run", "item"].ids == sum(map(len, batches))
    return np.concatenate(batches)


def mutate_footer(data, rng):
    """Changes the footer of a Parquet file: its sizes and counts are varints."""
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length
    footer = some(data[start:-8], rng)
    if rng.random() < 0.4:
        at = rng.randrange(len(footer) or 1)
        footer = footer[:at] + varint(rng.choice(EXTREMES)) + footer[at + 1 :]
    size = len(footer) if rng.random() < 0.8 else rng.choice(EXTREMES) % (1 << 32)
    return data[:start] + footer + size.to_bytes(4, "little") + b"PAR1"


def one(seed, number, files, beside):
    """Runs one mutation; returns (what was mutated, what came of it, problem or None)."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(list(files))
    own_ids = not name.endswith((".npy", ".safetensors"))
    is_features = name.endswith("features.parquet")
    ids_name = None if own_ids else rng.choice(list(beside))
    contents = {name: files[name], **({ids_name: beside[ids_name]} if ids_name else {})}
    target = rng.choice(list(contents))
    data = contents[target]
    if target.endswith("parquet") and rng.random() < 0.6:
        contents[target] = mutate_footer(data, rng)
    elif rng.random() < 0.5:  # headers and directories are at the ends
        high = 200 if rng.random() < 0.5 else len(data)
        contents[target] = some(data, rng, max(0, high - 300), min(high, len(data)))
    else:
        contents[target] = some(data, rng)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    problem, outcome = None, "same"
    try:
        if is_features:
            is_same = read_features(name, contents).equals(FEATURES)
        else:
            found = read(name, ("v",) if name.endswith(".safetensors") else (), ids_name, contents, 1 << 10)
            is_same = np.array_equal(found, VECTORS)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if not is_same:
            outcome = "other rows"
            if name == "v.npz":
                problem = "other rows, although the zip's checksums cover what was changed"
    except PipelineError as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, problem = type(error).__name__, _wrong_with(error)
    except (Exception, TooSlowError) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, problem = type(error).__name__, "".join(traceback.format_exception(error)[-6:])
    if (used := _memory("VmHWM") - before) > MEGABYTES:
        problem = f"{used} MB; {problem or outcome}"
    return f"{name} {target}", outcome, problem, time.process_time() - started, used


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(argv)

    def too_slow(*_):
        raise TooSlowError(f"more than {SECONDS} s")

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    signal.signal(signal.SIGPROF, too_slow)
    files, beside = vector_files(), id_files()
    for name in files:  # What is not mutated is read.
        for ids_name in beside if name.endswith((".npy", ".safetensors")) else [None]:
            contents = {**files, **beside}
            found = read(name, ("v",) if name.endswith(".safetensors") else (), ids_name, contents, 1 << 10)
            assert np.array_equal(found, VECTORS), (name, ids_name)
    for name, data in feature_files().items():
        assert read_features(name, {name: data}).equals(FEATURES), name
    files |= feature_files()
    outcomes, problems, slowest, largest = Counter(), 0, 0.0, 0
    for number in range(options.first, options.first + options.number):
        print(number, end="\r", file=sys.stderr)  # what crashed the process
        what, outcome, problem, took, used = one(options.seed, number, files, beside)
        outcomes[outcome] += 1
        slowest, largest = max(slowest, took), max(largest, used)
        if problem:
            problems += 1
            print(json.dumps({"number": number, "what": what, "problem": problem}))
    print(f"{options.number:,} mutations, the slowest took {slowest:.1f} s, the largest {largest} MB")
    print(", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common()))
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
