"""Vectors and ids that the trainer logged as files: every row compared with what the library itself reads."""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job import MARCH_1, refused
from mlflow.tracking import MlflowClient
from models import made_by
from safetensors.numpy import load_file, save_file
from tracking import tracking_server

from beam_pipeline.launch.options import parse
from beam_pipeline.reading import pieces, unordered

ROWS = {"user": 70, "item": 90}
DAY = "2026-03-01"


@dataclass(frozen=True)
class Files:
    """A folder of files to log."""

    folder: Path

    def rows(self, tower):
        """Returns id → vector as the trainer had them."""
        return dict(zip(ids_of(tower), vectors_of(tower).astype(float).tolist(), strict=True))


def ids_of(tower):
    return [f"{tower[0]}{n}é" for n in range(ROWS[tower])]


def vectors_of(tower, dtype="f4"):
    return np.random.default_rng(ROWS[tower]).normal(size=(ROWS[tower], 6)).astype(dtype)


def table_of(tower, rows=slice(None), names=("id", "vector")):
    values = pa.array(vectors_of(tower)[rows].tolist(), pa.list_(pa.float32()))
    return pa.table({names[0]: ids_of(tower)[rows], names[1]: values})


@pytest.fixture
def files(tmp_path):
    """All of the kinds of files, as the libraries write them."""
    folder = tmp_path / "files"
    folder.mkdir()
    for tower in ROWS:
        ids, vectors = ids_of(tower), vectors_of(tower)
        pq.write_table(table_of(tower), folder / f"{tower}.parquet", row_group_size=40, write_page_checksum=True)
        (folder / f"{tower}_parts").mkdir()
        for part in range(3):
            some = table_of(tower, slice(30 * part, 30 * part + 30), ("sku", "emb"))
            pq.write_table(some, folder / f"{tower}_parts" / f"part-{part}.zstd.parquet", compression="zstd")
        np.savez(folder / f"{tower}.npz", ids=np.array(ids), vectors=vectors)
        np.save(folder / f"{tower}.npy", vectors)
        np.save(folder / f"{tower}_ids.npy", np.array(ids))
        (folder / f"{tower}_ids.txt").write_text("\n".join(ids))
        (folder / f"{tower}_ids.json").write_text(json.dumps(ids))
        order = np.random.default_rng(1).permutation(len(ids)).tolist()
        (folder / f"{tower}_rows.json").write_text(json.dumps({ids[row]: row for row in order}))
        (folder / f"{tower}_rows.csv").write_text("row,id\n" + "".join(f'{row},"{ids[row]}"\n' for row in order))
        rows = pa.table({"id": [ids[row] for row in order], "row": order})
        pq.write_table(rows, folder / f"{tower}_rows.parquet", row_group_size=33)
    save_file({tower: vectors_of(tower) for tower in ROWS}, folder / "model.safetensors")
    oracle = load_file(folder / "model.safetensors")
    assert all(np.array_equal(oracle[tower], vectors_of(tower)) for tower in ROWS)
    return Files(folder)


def flags(vectors, ids=None):
    """Returns --vectors and --ids of both towers, with the tower's name for a *."""
    named = [f"--vectors={tower}={vectors.replace('*', tower, 1)}" for tower in ROWS]
    return named + ([f"--ids={tower}={ids.replace('*', tower, 1)}" for tower in ROWS] if ids else [])


@pytest.mark.parametrize(
    ("vectors", "ids"),
    [
        ("*.parquet", None),
        ("*_parts#sku,emb", None),
        ("*_parts/part-*.parquet#sku,emb", None),
        ("*.npz", None),
        ("*.npz#vectors", "*_rows.csv"),
        ("*.npy", "*_ids.npy"),
        ("*.npy", "*_ids.txt"),
        ("*.npy", "*_rows.json"),
        ("model.safetensors#*", "*_ids.json"),
        ("model.safetensors#*", "*_rows.parquet"),
    ],
)
def test_every_row_is_what_was_logged(job, store, files, monkeypatch, vectors, ids):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr(unordered, "PIECE_ENTRIES", 32)
    run = store.log({"": files}, "files", MARCH_1)
    assert job.run(run, *flags(vectors, ids)) == 0
    for tower in ROWS:
        assert job.rows(tower) == {(DAY, run): files.rows(tower)}
    log = job.query("SELECT tower, row_count, bytes_read, checksum, vector_source FROM {log} ORDER BY tower")
    assert [row[:3] for row in log] == [(tower, ROWS[tower], log[0][2] if tower == "item" else log[1][2]) for tower in ("item", "user")]  # fmt: skip
    assert all(row[2] >= ROWS[row[0]] * 24 for row in log)
    assert {row[4] for row in log} == {"file"}
    assert all((row[3] or "").startswith("crc32:") is vectors.startswith("*.npz") for row in log)


def test_row_numbers_are_ids(job, store, files):
    run = store.log({"": files}, "files", MARCH_1)
    assert job.run(run, *flags("*.npy", "rows")) == 0
    for tower in ROWS:
        assert job.rows(tower)[DAY, run] == {
            str(n): row for n, row in enumerate(vectors_of(tower).astype(float).tolist())
        }


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("writer", ["columnar", "rows"])
def test_on_a_bucket_and_with_either_writer(job, store, files, bucket, writer):
    run = store.log({"": files}, f"files {bucket} {writer}", MARCH_1, bucket=bucket)
    assert job.run(run, *flags("*_parts#sku,emb"), f"--writer={writer}") == 0
    assert job.rows("item") == {(DAY, run): files.rows("item")}


def test_a_tower_of_the_model_beside_one_of_a_file(job, store, models, files):
    (files.folder / "model").mkdir()
    for path in models("plain").folder.rglob("*"):
        target = files.folder / "model" / path.relative_to(models("plain").folder)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    run = store.log({"": files}, "both", MARCH_1)
    assert job.run(run, "--tower=user=user_layer", "--vectors=item=item.parquet") == 0
    assert job.rows("user") == {(DAY, run): models("plain").rows("user")}
    assert job.rows("item") == {(DAY, run): files.rows("item")}
    assert job.query("SELECT tower, vector_source FROM {log} ORDER BY tower") == [
        ("item", "file"),
        ("user", "embedding"),
    ]


LABEL_ENCODED = ["keras3_functional", "keras2_functional", "exported_functional", "saved_functional", "saved_subclassed", "module"]  # fmt: skip
LAYERS = {"saved_subclassed": ("user_embedding", "item_tower"), "module": ("user", "item")}


@pytest.mark.parametrize("name", LABEL_ENCODED)
def test_every_row_of_a_model_whose_ids_are_beside_it(job, store, tmp_path, capsys, name):
    model = made_by("make_label_encoded.py")(name)
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    for path in model.folder.rglob("*"):
        target = folder / "model" / path.relative_to(model.folder)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    for tower in ROWS:
        order = range(len(model.ids(tower)))[::-1]
        (folder / f"{tower}.json").write_text(json.dumps({model.ids(tower)[row]: row for row in order}))
    run = store.log({"": Files(folder)}, name, MARCH_1)
    layers = LAYERS.get(name, ("user_embedding", "item_embedding"))
    towers = [f"--tower={tower}={layer}" for tower, layer in zip(ROWS, layers, strict=True)]
    line = refused(job, capsys, run, *towers)
    assert "ids" in line
    assert "--ids " in line
    # Two embeddings whose names say which is which need not be named.
    named = towers if name in LAYERS else []
    assert job.run(run, *named, "--ids=user=user.json", "--ids=item=item.json") == 0
    for tower in ROWS:
        assert job.rows(tower) == {(DAY, run): model.rows(tower)}


def test_a_tower_that_goes_on_is_refused_as_others_are(job, store, tmp_path, capsys):
    model = made_by("make_label_encoded.py")("keras3_deep")
    run = store.log(model, "deep", MARCH_1)
    line = refused(job, capsys, run, "--ids=user=rows,item=rows")
    assert "continues after the embedding of 'user_embedding': user_dense (Dense)" in line


def without_vectors(tmp_path):
    """Returns artifacts of a run that logged something else."""
    folder = tmp_path / "nothing"
    folder.mkdir()
    (folder / "notes.txt").write_text("no vectors")
    return Files(folder)


def test_all_runs(job, store, files, tmp_path):
    name = "files, all runs"
    first = store.log({"": files}, "a", MARCH_1, experiment=name)
    store.log({"": without_vectors(tmp_path)}, "none", MARCH_1 + timedelta(days=1), experiment=name)
    second = store.log({"": files}, "b", MARCH_1 + timedelta(days=2), experiment=name)
    assert job.run(None, f"--experiment_name={name}", "--all_runs", *flags("*.parquet")) == 0
    assert job.rows("item") == {(DAY, first): files.rows("item"), ("2026-03-03", second): files.rows("item")}


def test_the_latest_run_is_one_that_has_the_file(job, store, files, tmp_path):
    name = "files, latest run"
    run = store.log({"": files}, "a", MARCH_1, experiment=name)
    store.log({"": without_vectors(tmp_path)}, "none", MARCH_1 + timedelta(days=1), experiment=name)
    assert job.run(None, f"--experiment_name={name}", *flags("*_parts/part-*.parquet#sku,emb")) == 0
    assert job.rows("item") == {(DAY, run): files.rows("item")}


def test_plan_and_inspect(job, store, files, capsys):
    run = store.log({"": files}, "files", MARCH_1)
    assert job.run(run, "--vectors=user=user.npy,item=item_parts#sku,emb", "--ids=user=user_ids.txt", "--plan") == 0
    plan = capsys.readouterr().out
    assert "70 rows × 6 float32 of user.npy → " in plan
    assert "90 rows × 6 float32 of item_parts#sku,emb → " in plan
    assert "user.npy has none: its 1,680 bytes are counted, damage would not be noticed" in plan
    assert "logged by the trainer" in plan
    assert "'file'" in plan
    assert job.tables() == set()
    assert job.run(run, "--vectors=user=user.npy,item=item_parts#sku,emb", "--ids=user=user_ids.txt", "--inspect") == 0
    shown = capsys.readouterr().out
    assert "vectors     user.npy" in shown
    assert "ids       70, " in shown
    assert "ids       90, in column 'sku' beside the vectors in 'emb'" in shown
    assert "'i0é', 'i1é', 'i2é', …" in shown


def test_a_model_without_ids_is_shown(job, store, capsys):
    run = store.log(made_by("make_label_encoded.py")("keras3_functional"), "label", MARCH_1)
    assert job.run(run, "--inspect") == 0
    shown = capsys.readouterr().out
    assert "layer       item_embedding" in shown
    assert "ids       not in the model: name them with --ids NAME=PATH" in shown
    assert job.run(run, "--inspect", "--ids=user=rows,item=rows") == 0
    shown = capsys.readouterr().out
    assert "ids       70, the numbers of the rows" in shown
    assert "then      ends at the embedding" in shown


def bad(table=None, **columns):
    return lambda path: pq.write_table(table or pa.table(columns), path)


VECTOR = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.parquet", bad(id=["a", "b"], vector=pa.array([[1.0, 2], [1]], VECTOR)), "id 'b' has a vector of 1 values, and others have 2"),
        ("a.parquet", bad(id=["a", "b"], vector=pa.array([[1.0, 2], None], VECTOR)), "id 'b' has NULL instead of a vector"),
        ("a.parquet", bad(id=["a", "b"], vector=pa.array([[1.0, 2], [1, None]], VECTOR)), "id 'b' (row 1 of row group 0) has a vector with NULL in it"),
        ("a.parquet", bad(id=["a", "b"], vector=pa.array([[1.0, 2], [1, np.nan]], VECTOR)), "the vector of id 'b' (row 1) holds NaN or infinity"),
        ("a.parquet", bad(id=["a", None], vector=pa.array([[1.0, 2], [1, 1]], VECTOR)), "the id of row 1 in row group 0 is NULL"),
        ("a.parquet", bad(id=["a", ""], vector=pa.array([[1.0, 2], [1, 1]], VECTOR)), "the id of row 1 is empty"),
        ("a.parquet", bad(id=["a", "b", "a"], vector=pa.array([[1.0, 2]] * 3, VECTOR)), "id 'a' appears 2 times"),
        ("a.parquet", bad(id=[b"a", b"\xff"], vector=pa.array([[1.0, 2]] * 2, VECTOR)), "is not UTF-8"),
        ("a.parquet", bad(id=["a"], vector=["x"]), "column 'vector' has type string, and a vector is a list of floats"),
        ("a.parquet", bad(name=["a"], vector=["x"]), "0 columns named id or item_id; its columns are 'name', 'vector'"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1 no parquet"), "is not a Parquet file, or truncated"),
        ("a.npy", lambda path: np.save(path, np.zeros((3, 2), "f4")), "a.npy has no ids: name them with --ids item=PATH"),
        ("a.npz", lambda path: np.savez_compressed(path, v=np.zeros((3, 2), "f4")), "is compressed or encrypted"),
        ("a.pt", lambda path: path.write_bytes(b"x"), "is of a kind that is not read"),
        ("other.parquet", lambda path: None, "other.parquet does not exist"),
    ],
)  # fmt: skip
def test_bad_vectors_are_one_line_and_nothing_is_published(job, store, tmp_path, capsys, name, write, expected):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "notes.txt").write_text("a run is never empty")
    write(folder / name)
    run = store.log({"": Files(folder)}, "bad", MARCH_1)
    assert expected in refused(job, capsys, run, f"--vectors=item={name}")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("ids.txt", "a\nb\n", "ids.txt has 2 ids for rows 0 to 89 of the vectors, which are 90; name the row of the first id with --first_row item=ROW"),
        ("ids.txt", "x\n" * 95, "ids.txt has 95 ids for rows 0 to 89"),
        ("ids.txt", "x\n" * 90, "id 'x' appears 90 times"),
        ("ids.json", '{"a": 0, "b": 90}', "id 'b' has row 90, but the matrix has only rows 0 to 89"),
        ("ids.json", '{"a": 0, "a": 1}', "id 'a' appears 2 times"),
        ("ids.json", '{"0": "a"}', "the row of id '0' is not an integer"),
        ("ids.csv", "id,row\na,\n", "id 'a' has no row"),
        ("ids.csv", "id;row\na;1\n", "0 columns named id or item_id; its first line names 'id;row'"),
        ("ids.pkl", "x", "is a pickle, which would run code"),
    ],
)  # fmt: skip
def test_bad_ids_are_one_line_and_nothing_is_published(job, store, tmp_path, capsys, name, text, expected):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_text(text)
    np.save(folder / "item.npy", vectors_of("item"))
    run = store.log({"": Files(folder)}, "bad", MARCH_1)
    assert expected in refused(job, capsys, run, "--vectors=item=item.npy", f"--ids=item={name}")


def test_damage_is_found_by_the_zips_checksum(job, store, files, capsys):
    path = files.folder / "item.npz"
    data = bytearray(path.read_bytes())
    at = data.find(vectors_of("item").tobytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    run = store.log({"": files}, "damaged", MARCH_1)
    assert "do not match" in refused(job, capsys, run, "--vectors=item=item.npz")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--tower=item=item_layer", "--vectors=item=x.parquet"],
            "tower 'item' is named twice; a tower has one source",
        ),
        (["--vectors=item=/tmp/x.parquet"], "a path inside the run's artifacts, or gs://BUCKET/PATH"),
        (["--vectors=item=../x.parquet"], "a path inside the run's artifacts"),
        (["--vectors=item=s3://x/y.parquet"], "a path inside the run's artifacts"),
        (["--ids=shop=x.txt"], "NAME=PATH of one of the towers, which are user, item"),
        (["--ids=user=x.txt", "--ids=user=y.txt"], "tower 'user' is named twice"),
        (["--first_row=user=1"], "needs --ids of the same tower, and there are none for 'user'"),
        (["--ids=user=x.txt", "--first_row=user=-1"], "the number of a row, 0 or more"),
    ],
)
def test_flags_that_contradict_each_other(capsys, given, expected):
    with pytest.raises(SystemExit) as ended:
        parse(["--run_id=x", *given])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_file_on_a_bucket_cannot_be_that_of_all_runs(capsys):
    with pytest.raises(SystemExit):
        parse(["--experiment_name=x", "--all_runs", "--vectors=item=gs://b/x.parquet"])
    assert "each of --all_runs has a file of its own" in capsys.readouterr().err


def logged_to_a_server(url, files):
    client = MlflowClient(url)
    experiment = client.create_experiment("served files")
    run = client.create_run(experiment, start_time=int(MARCH_1.timestamp() * 1000)).info.run_id
    client.log_artifacts(run, str(files.folder))
    client.set_terminated(run)
    return run


def test_files_behind_a_server_are_copied_and_removed(job, store, files, tmp_path):
    (tmp_path / "server").mkdir()
    with tracking_server(tmp_path / "server") as url:
        run = logged_to_a_server(url, files)
        vectors = "--vectors=user=user.npy,item=item_parts/part-*.parquet#sku,emb"
        assert job.run(run, f"--tracking_uri={url}", vectors, "--ids=user=user_rows.csv") == 0
    for tower in ROWS:
        assert job.rows(tower) == {(DAY, run): files.rows(tower)}
    assert store.load_files(job.dataset) == []


def test_the_graph_for_dataflow(job, store, files):
    run = store.log({"": files}, "files for dataflow", MARCH_1, bucket=True)
    graph = job.dataflow_graph(run, "--vectors=user=user.npy,item=item_parts#sku,emb", "--ids=user=user_rows.csv")
    assert b"Cut item/ReadGroups" in graph
    assert b"Cut user/Sort" in graph
    assert b"Cut user/ReadGroups" not in graph
