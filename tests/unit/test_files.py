"""What is fetched is what is needed, from a small Cloud Storage that counts; and what becomes of replaced files."""

import os
import random
from collections import Counter
from contextlib import closing
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import storage_server

import beam_pipeline as bp
from beam_pipeline import files
from beam_pipeline.errors import ArtifactMissingError, FileReplacedError, TruncatedFileError
from beam_pipeline.files import open_file
from beam_pipeline.formats import open_artifact
from beam_pipeline.reading import pieces
from beam_pipeline.reading.rows import read_piece

ROOM = 1.1
"""Bytes fetched for each byte that is needed."""


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A Cloud Storage whose bucket `bucket` is a folder."""
    (tmp_path / "bucket").mkdir()
    with storage_server.serve(tmp_path) as running:
        # As emulators report themselves, without a scheme.
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url.removeprefix("http://"))
        yield running


@pytest.fixture
def megabytes(storage):
    """A file of 5 MB of noise in the bucket: its bytes."""
    data = random.Random(0).randbytes(5_000_000)
    (storage.folder / "bucket/a file").write_bytes(data)
    return data


def distinct(spans):
    """Returns the bytes that spans cover, each once."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def test_reads_are_exact(storage, megabytes):
    with open_file("gs://bucket/a file") as file:
        assert file.size == len(megabytes)
        for offset, length in ((0, 2_000_000), (3_000_000, 400_000), (4_000_000, 100), (100, 20_000), (4_999_990, 10)):
            assert file.read(offset, length) == megabytes[offset : offset + length]
        assert file.read(17, 0) == b""
        assert [*file.blocks(1_000_000, 1_000_100, 60)] == [
            (1_000_000, megabytes[1_000_000:1_000_060]),
            (1_000_060, megabytes[1_000_060:1_000_100]),
        ]
    assert storage.lookups == {"a file": 1}
    assert storage.fetched["a file"] <= 2_420_110 + 2 * (16 << 10)


@pytest.mark.parametrize(("start", "step", "requests"), [(0, 20, 12), (2_000_000, 1000, 10)])
def test_small_neighbours_share_requests(storage, megabytes, start, step, requests):
    with open_file("gs://bucket/a file") as file:
        for offset in range(start, len(megabytes) - step, step):
            assert file.read(offset, step) == megabytes[offset : offset + step]
    assert storage.ranges["a file"] <= requests
    assert storage.fetched["a file"] <= (len(megabytes) - start) * 1.02


def test_a_reader_that_goes_back_and_forth_fetches_nothing_twice(storage, megabytes):
    numbers = random.Random(1)
    with open_file("gs://bucket/a file") as file:
        assert file.read(0, 10) + file.read(10, 10) == megabytes[:20]
        for _ in range(3000):
            offset, length = numbers.randrange(0, 2_000_000), numbers.randrange(1, 9000)
            assert file.read(offset, length) == megabytes[offset : offset + length]
    assert storage.fetched["a file"] <= 2_009_000 + (64 << 10)


def test_a_large_scan_keeps_little(storage):
    path = storage.folder / "bucket/sparse"
    with path.open("wb") as sparse:
        sparse.truncate(30_000_000)
    with open_file("gs://bucket/sparse") as file:
        for offset in range(0, file.size, 10_000):
            file.read(offset, 9)
        assert sum(map(len, file._pages.values())) <= 4 << 20


def test_the_process_has_one_client(storage, megabytes):
    for _ in range(20):
        with open_file("gs://bucket/a file") as file:
            file.read(0, 100_000)
    assert files._client() is files._client()
    assert storage.connections <= 2
    assert storage.requests == 40


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_file_that_changes_under_a_reader_is_an_error(storage, megabytes, change):
    path = storage.folder / "bucket/a file"
    with open_file("gs://bucket/a file") as file:
        file.read(0, 100_000)
        if change == "replaced":
            path.write_bytes(bytes(len(megabytes)))
            os.utime(path, ns=(1, 1))
        else:
            path.unlink()
        with pytest.raises(FileReplacedError, match="gs://bucket/a file was replaced or deleted while it was read"):
            file.read(100_000, 100_000)


def test_the_client_retries(storage, megabytes):
    with open_file("gs://bucket/a file") as file:
        storage.refusals = [503]
        assert file.read(7, 100_000) == megabytes[7:100_007]
    assert storage.ranges["a file"] == 2


def test_what_is_refused_for_good_is_no_damage(storage, megabytes):
    """It is raised as it came, so that the runner tries again: a PipelineError would end the job."""
    with open_file("gs://bucket/a file") as file:
        storage.refusals = [403]
        with pytest.raises(Exception, match="403") as refused:
            file.read(7, 100_000)
    assert not isinstance(refused.value, bp.PipelineError)


def test_missing_and_short_files(storage, megabytes, tmp_path):
    (tmp_path / "short").write_bytes(b"12")
    for path in ("gs://bucket/nothing", "gs://nothing/at all", str(tmp_path / "nothing")):
        with pytest.raises(ArtifactMissingError, match=f"{path} does not exist"):
            open_file(path)
    with pytest.raises(ArtifactMissingError, match=r"cannot be read: .*directory"):
        open_file(str(tmp_path))
    for path in ("gs://bucket/a file", str(tmp_path / "short")):
        with open_file(path) as file, pytest.raises(TruncatedFileError, match="are needed"):
            file.read(file.size - 1, 2)


def test_a_stream_for_libraries(storage):
    rows = pa.table({"id": [f"{n}" for n in range(200_000)], "n": range(200_000)})
    path = storage.folder / "bucket/table.parquet"
    pq.write_table(rows, path, row_group_size=50_000)
    with open_file("gs://bucket/table.parquet") as file:
        with pq.ParquetFile(file.stream()) as table:
            group = table.metadata.row_group(2)
            needed = sum(group.column(n).total_compressed_size for n in range(2))
            storage.forget()
            assert table.read_row_group(2).equals(rows.slice(100_000, 50_000))
        assert storage.fetched["table.parquet"] <= ROOM * needed
        stream = file.stream()
        assert (stream.seek(-4, os.SEEK_END), stream.read(), stream.read()) == (file.size - 4, b"PAR1", b"")
        buffer = bytearray(8)
        assert (stream.seek(0), stream.readinto(buffer), buffer[:4]) == (0, 8, b"PAR1")


@pytest.mark.parametrize(
    ("fixture", "name", "kind"),
    [("models", "plain", "layer"), ("keras_files", "functional", "embedding")],
)
def test_models_are_read_by_what_is_needed(storage, request, fixture, name, kind):
    """Graphs, ids and vectors of real models: no byte twice within a step, and next to none that nobody needs."""
    model = request.getfixturevalue(fixture)(name)
    (storage.folder / "bucket/model").symlink_to(model.folder)
    layers = {tower: f"{tower}_{kind}" for tower in ("user", "item")}
    found = {}
    with closing(open_artifact("gs://bucket/model", open_file, layers.values())) as artifact:
        towers = pieces.cover([artifact.tower(tower, layer) for tower, layer in layers.items()])
    sizes = {str(path.relative_to(model.folder)): path.stat().st_size for path in model.folder.rglob("*")}
    for path, count in storage.fetched.items():
        assert count <= ROOM * sizes[path.removeprefix("model/")] + 300
    assert storage.requests <= 30
    storage.forget()

    needed = Counter()
    for tower in towers:
        path, size = tower.matrix.path, tower.matrix.span.end - tower.matrix.span.start
        needed[path.removeprefix("gs://bucket/")] += size + sum(rest.end - rest.start for rest in tower.rest)
        vocabulary = tower.vocabulary
        covered = vocabulary.checksum.span if vocabulary.checksum else vocabulary.span
        for span in filter(None, (covered, vocabulary.span, vocabulary.row_numbers)):  # Ids are cut and read.
            needed[vocabulary.path.removeprefix("gs://bucket/")] += span.end - span.start
        found[tower.name] = {}
        cut = [*pieces.cut(tower, open_file, 50_000)]
        for piece in cut:
            batch, _ = read_piece("run", piece, tower, open_file)
            if batch:
                found[tower.name] |= dict(zip(batch.ids.to_pylist(), batch.vectors.tolist(), strict=True))
    assert found == {tower: model.rows(tower) for tower in layers}
    for path, count in needed.items():
        assert storage.fetched[path] <= ROOM * count, path
    assert storage.fetched.total() <= ROOM * needed.total()


def test_pages_never_overlap(storage, megabytes):
    """What small reads fetch begins and ends at pages, so that the next ones add to it."""
    fetched = []

    class Noting(files.ByteFile):
        def _fetch(self, offset, length):
            fetched.append((offset, offset + length))
            return super()._fetch(offset, length)

    with open_file("gs://bucket/a file") as opened:
        file = Noting(opened.path, opened._stream, opened.size)
        for offset in (0, 10, 500_000, 100_000, 480_000, 16_300, 16_390):
            file.read(offset, 10)
    pages = sorted(fetched[1:])
    assert all(end <= start for (_, end), (start, _) in pairwise(pages))
    assert distinct(pages) == sum(end - start for start, end in pages)
