"""Ids in a file beside the model, by its suffix.

They are in row order (text, a JSON array, an array of NumPy's), or each has its row beside it (a JSON object, CSV,
Parquet).
"""

from __future__ import annotations

import csv
import io

from beam_pipeline.errors import BadIdError, CorruptFileError, UnsupportedModelError
from beam_pipeline.files import ByteFile, OpenFile
from beam_pipeline.formats.files import arrays, parquet
from beam_pipeline.formats.files.parquet import ListFolder
from beam_pipeline.formats.model import Encoding, Matrix, Vocabulary
from beam_pipeline.formats.protobuf import Span

ROWS = "rows"
"""Instead of a path: the number of a row is its id."""

_MAX_HEADER = 64 << 10
_BLANKS = b" \t\r\n"
_PICKLES = (".pkl", ".pickle", ".joblib", ".pt", ".pth")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"\x28\xb5": "zstandard", b"BZ": "bzip2"}
_BOM = b"\xef\xbb\xbf"


def read_vocabulary(
    path: str, tower: str, names: tuple[str, ...], first_row: int, open_file: OpenFile, list_folder: ListFolder
) -> Vocabulary:
    """Returns where the ids in a file are, by the file's suffix; what is none of the others is text, an id a line.

    Args:
        path: the file; of Parquet a folder or a pattern, too.
        tower: whose ids they are.
        names: the columns of ids and of rows, or the array of ids; empty where the file leaves no choice.
        first_row: the row of the first id, where the ids are in row order.
        open_file: opens a file.
        list_folder: lists the names in a folder.

    Raises:
        UnsupportedModelError: the file is of a kind that is not read, or has not what is asked for.
        BadIdError: there are no ids in it.
        CorruptFileError: it contradicts its format.
    """
    if path.endswith(_PICKLES):
        raise UnsupportedModelError(
            f"{path} is a pickle, which would run code when it is read; log the ids as text, JSON, .npy, CSV or Parquet"
        )
    if path.endswith(arrays.SUFFIXES):
        return _from_array(path, tower, names, first_row, open_file)
    is_in_order = not path.endswith((".csv", ".json")) and not parquet.is_parquet(path)
    if is_in_order and names:
        raise UnsupportedModelError(f"{path} is text, an id a line, and has no columns {', '.join(names)}")
    if parquet.is_parquet(path):
        columns = _pair(path, names)
        table = parquet.find_rows(path, tower, columns, open_file, list_folder)
        _require_no_offset(path, first_row)
        return Vocabulary(
            table.files[0][0], Span(0, 0), Encoding.PARQUET, 0, table.rows, in_row_order=False, table=table
        )
    with open_file(path) as file:
        _require_plain(file)
        if path.endswith(".csv"):
            _require_no_offset(path, first_row)
            return _from_csv(file, tower, _pair(path, names))
        if path.endswith(".json"):
            return _from_json(file, names, first_row)
        start = len(_BOM) if file.read(0, min(len(_BOM), file.size)) == _BOM else 0
        if file.size == start:
            raise BadIdError(f"{path} is empty: no ids")
        return Vocabulary(path, Span(start, file.size), Encoding.LINES, first_row)


def row_numbers(matrix: Matrix, first_row: int) -> Vocabulary:
    """Returns the ids of a matrix whose rows are numbered: "0", "1" and so on."""
    span = Span(min(first_row, matrix.rows), matrix.rows)
    return Vocabulary(matrix.path, span, Encoding.ROWS, first_row, count=span.end - span.start)


def _from_array(path: str, tower: str, names: tuple[str, ...], first_row: int, open_file: OpenFile) -> Vocabulary:
    found = arrays.read_arrays(path, open_file)
    array = arrays.choose(found, names[0] if names else "", "ids", f"--ids {tower}={path}#NAME")
    return array.vocabulary(first_row)


def _pair(path: str, names: tuple[str, ...]) -> tuple[str, str] | None:
    if not names:
        return None
    if len(names) != 2:
        raise UnsupportedModelError(f"{path}#{','.join(names)}: the column of the ids and that of their rows, #ID,ROW")
    return names[0], names[1]


def _require_no_offset(path: str, first_row: int) -> None:
    if first_row:
        raise BadIdError(f"{path} has a row for each id: leave out --first_row")


def _require_plain(file: ByteFile) -> None:
    head = file.read(0, min(2, file.size))
    if head in _COMPRESSED:
        raise UnsupportedModelError(
            f"{file.path} is compressed ({_COMPRESSED[head]}), and cannot be read in parts; unpack it"
        )


def _from_json(file: ByteFile, names: tuple[str, ...], first_row: int) -> Vocabulary:
    start, end = _trimmed(file, 0, file.size)
    first, last = (file.read(start, 1), file.read(end - 1, 1)) if end - start > 1 else (b"", b"")
    if (first, last) not in ((b"[", b"]"), (b"{", b"}")):
        raise UnsupportedModelError(f"{file.path} is neither a JSON array of ids nor a JSON object of id and row")
    if names:
        raise UnsupportedModelError(f"{file.path} is JSON, and has no columns {', '.join(names)}")
    inner = Span(*_trimmed(file, start + 1, end - 1))
    if inner.start == inner.end:
        raise BadIdError(f"{file.path} is empty: no ids")
    if first == b"[":
        return Vocabulary(file.path, inner, Encoding.JSON, first_row)
    _require_no_offset(file.path, first_row)
    return Vocabulary(file.path, inner, Encoding.JSON_OBJECT, 0, in_row_order=False)


def _trimmed(file: ByteFile, start: int, end: int) -> tuple[int, int]:
    """Returns a span without the blanks at its ends."""
    while start < end:
        block = file.read(start, min(_MAX_HEADER, end - start))
        left = block.lstrip(_BLANKS)
        start += len(block) - len(left)
        if left:
            break
    while start < end:
        size = min(_MAX_HEADER, end - start)
        left = file.read(end - size, size).rstrip(_BLANKS)
        end -= size - len(left)
        if left:
            break
    return start, end


def _from_csv(file: ByteFile, tower: str, names: tuple[str, str] | None) -> Vocabulary:
    head = file.read(0, min(_MAX_HEADER, file.size))
    line, newline, _ = head.partition(b"\n")
    start = len(line) + len(newline)
    if not newline and file.size > len(head):
        raise CorruptFileError(f"{file.path}: its first line has no end: no CSV file?")
    try:
        header = next(csv.reader(io.StringIO(line.decode("utf-8-sig").strip("\r\n"))), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{file.path}: its first line is no header of CSV ({error})") from error
    remedy = f"name them with --ids {tower}=PATH#ID,ROW"
    called = [[name.format(tower=tower) for name in wanted] for wanted in (parquet.ID_COLUMNS, parquet.ROW_COLUMNS)]
    ids, rows = (
        parquet.only_column(file.path, header, wanted, "its first line names", remedy)
        for wanted in ([[name] for name in names] if names else called)
    )
    if start >= file.size:
        raise BadIdError(f"{file.path} has no lines after its header: no ids")
    return Vocabulary(file.path, Span(start, file.size), Encoding.CSV, 0, in_row_order=False, columns=(ids, rows))
