"""Workers and engines are killed (SIGKILL) while a job runs: it ends by itself or fails in one line, a rerun publishes,
and no reader ever sees half a model.
"""

import random
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.cloud import storage
from job import DESTINATION_TABLES, MARCH_1, Reader, error_of
from models import Model, made_by

# Where a worker is killed: as it sends a request, or when that was carried out and before it is told so.
MOMENTS = [
    ("prepare", "after"),
    ("read", "before"),
    ("write", "before"),
    ("write", "after"),
    ("load", "before"),
    ("load", "after"),
    ("wait", "before"),
    ("audit", "after"),
    ("shape", "after"),
    ("publish", "before"),
    ("publish", "after"),
    ("clean", "before"),
    ("clean", "after"),
]
# The same of jobs that read Parquet or compute. What a worker does between two requests shows only in what the model does.
OTHER_MOMENTS = [
    ("vectors", "read", "before"),
    ("vectors", "read", "after"),
    ("vectors", "write", "after"),
    ("computed", "features", "before"),
    ("computed", "features", "after"),
    ("computed", "read", "before"),  # the model
    ("computed", "compute", "before"),
    ("computed", "write", "before"),
    ("computed", "wait", "before"),
    ("computed", "publish", "after"),
]


@dataclass(frozen=True)
class Asked:
    """A job.

    Attributes:
        run_id, day: what it publishes.
        flags: of the command line.
        model: what its rows have to be.
        tolerance: of their vectors.
        mark: the file that its model writes while it computes.
    """

    run_id: str
    day: str
    flags: tuple[str, ...]
    model: Model
    tolerance: float = 0
    mark: Path | None = None


@pytest.fixture
def asked(request, job, store, warehouse, tmp_path):
    """Returns a job of a kind; each kind is of another day."""

    def asked(kind):
        model = request.getfixturevalue("models")("plain")
        if kind == "plain":
            return Asked(store.log(model, kind, MARCH_1, bucket=True), "2026-03-01", (), model)
        if kind == "vectors":
            folder = tmp_path / kind
            folder.mkdir()
            for tower in ("user", "item"):
                columns = {f"{tower}_id": model.ids(tower), "vector": [*model.vectors(tower)]}
                pq.write_table(pa.table(columns), folder / f"{tower}.parquet", row_group_size=500)
            run_id = store.log({"": Model(folder)}, kind, MARCH_1 + timedelta(days=1), bucket=True)
            return Asked(run_id, "2026-03-02", ("--vectors=user=user.parquet,item=item.parquet",), model)
        model, mark = made_by("make_slow_towers.py")("slow"), tmp_path / "mark"
        features = pa.table({"user_id": model.ids("user"), "mark": [str(mark)] * len(model.ids("user"))})
        pq.write_table(features, tmp_path / "users.parquet")
        place = f"features-{job.dataset}/users.parquet"
        storage.Client().bucket(warehouse.bucket).blob(place).upload_from_filename(tmp_path / "users.parquet")
        run_id = store.log(model, kind, MARCH_1 + timedelta(days=2), bucket=True)
        flags = ("--tower=user=user_tower,item=item_tower", "--compute=user,item")
        # Its vectors have another length than those of the other kinds.
        flags = (*flags, f"--features=user=gs://{warehouse.bucket}/{place}", "--allow_dimension_change")
        return Asked(run_id, "2026-03-03", flags, model, 1e-6, mark)

    return asked


@pytest.fixture
def watched(traffic):
    yield traffic
    traffic.forget()


def assert_whole(job, asked, reader):
    assert_rows(job, asked)
    assert job.rows("user").keys() == job.rows("item").keys() == {(asked.day, asked.run_id)}
    assert_never_half(asked, reader)
    assert_nothing_stays(job)


def assert_never_half(asked, reader):
    assert reader.seen - {(0, 0)} <= {(len(asked.model.ids("user")), len(asked.model.ids("item")))}


def assert_nothing_stays(job):
    """A table whose creation was under way when its worker died may come after the launcher has cleaned up: it expires."""
    left = job.tables()
    assert left >= DESTINATION_TABLES
    for name in left - DESTINATION_TABLES:
        assert "_staging_" in name
        assert job.client.get_table(f"{job.dataset}.{name}").expires


def assert_rows(job, asked):
    for tower in ("user", "item"):
        found, rows = job.rows(tower)[asked.day, asked.run_id], asked.model.rows(tower)
        assert found.keys() == rows.keys()
        vectors = [found[name] for name in rows]
        np.testing.assert_allclose(vectors, [*rows.values()], rtol=0, atol=asked.tolerance)


def kill_at(watched, asked, step, when):
    """Kills one worker at a moment of a job; returns a function that tells how many were killed."""
    if step != "compute":
        return watched.kill_at(step, when)
    killed = []

    def watch():
        deadline = time.monotonic() + 120
        while not asked.mark.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if asked.mark.exists():
            killed.append(watched.last["features"])
            watched.kill(killed[0])

    threading.Thread(target=watch, daemon=True).start()
    return lambda: len(killed)


MOMENTS = [*(("plain", *moment) for moment in MOMENTS), *OTHER_MOMENTS]


@pytest.mark.parametrize(("kind", "step", "when"), MOMENTS)
def test_another_worker_goes_on(kind, step, when, retrying, job, asked, run, watched):
    """Where bundles are repeated, as on Dataflow and Flink, the job does not even fail."""
    given = asked(kind)
    killed = kill_at(watched, given, step, when)
    with Reader(job, given.run_id) as reader:
        done = run(given.run_id, *retrying, *given.flags)
    assert killed() == 1, watched.steps
    assert done.returncode == 0, done.stderr[-5000:]
    assert_whole(job, given, reader)
    assert job.tables() == DESTINATION_TABLES
    assert len(watched.loaded) == len({*watched.loaded})


@pytest.mark.parametrize(("kind", "step", "when"), MOMENTS)
def test_a_rerun_publishes(kind, step, when, prism, job, asked, run, watched):
    """Prism repeats nothing: a job whose only worker died fails, whatever was done."""
    given = asked(kind)
    killed = kill_at(watched, given, step, when)
    with Reader(job, given.run_id) as reader:
        done = run(given.run_id, *prism, *given.flags)
        assert killed() == 1, watched.steps
        if done.returncode:
            error_of(done)
            watched.forget()
            done = run(given.run_id, *prism, *given.flags)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_whole(job, given, reader)


def test_every_attempt_dies(retrying, job, asked, run, watched):
    """Four workers in a row die over one bundle: the job fails in one line."""
    given = asked("plain")
    killed = watched.kill_at("audit", "before", times=4)
    line = error_of(run(given.run_id, *retrying))
    assert killed() == 4
    assert "died" in line
    watched.forget()
    with Reader(job, given.run_id) as reader:
        assert run(given.run_id, *retrying).returncode == 0
    assert_whole(job, given, reader)


@pytest.mark.parametrize(
    ("step", "when"), [("read", "before"), ("wait", "before"), ("publish", "before"), ("publish", "after")]
)
@pytest.mark.parametrize("dies", ["prism", "job service", "worker pool"])
def test_an_engine_dies(dies, step, when, mortal, prism, job, asked, run, watched):
    """The engine itself, or what runs all of a machine's bundles, as a task manager: the job fails in one line."""
    given, engine = asked("plain"), mortal(dies)
    died = []

    def kill(found, pid):
        if found == step and not died:
            died.append(pid)
            engine.kill()

    setattr(watched, when, kill)
    with Reader(job, given.run_id) as reader:
        done = run(given.run_id, *engine.flags)
        assert died, watched.steps
        assert len(error_of(done)) < 400
        watched.forget()
        assert run(given.run_id, *prism).returncode == 0
    assert_whole(job, given, reader)


# Seconds between two deaths: about as long as a worker takes to start here, and three times as long.
PAUSES = (15, 40)
KILLS = 40


@pytest.mark.timeout(3600)
def test_at_random_moments(retrying, job, asked, run, watched):
    """Any of both workers, at any moment, until forty have died in jobs of all kinds."""
    dice = random.Random(14)
    jobs = [asked(kind) for kind in ("plain", "vectors", "computed")]
    outcomes, kills = [], 0
    while kills < KILLS:
        given, longest = jobs[len(outcomes) % len(jobs)], PAUSES[len(outcomes) // len(jobs) % len(PAUSES)]
        over = threading.Event()
        deaths = []

        def killer(over=over, deaths=deaths, longest=longest):
            while not over.wait(dice.uniform(0.5, longest)):
                if pids := watched.workers():
                    watched.kill(dice.choice(pids))
                    deaths.append(time.monotonic())

        thread = threading.Thread(target=killer)
        with Reader(job, given.run_id) as reader:
            thread.start()
            try:
                done = run(given.run_id, *retrying, *given.flags, timeout=600)
            finally:
                over.set()
                thread.join()
        assert_never_half(given, reader)
        kills += len(deaths)
        outcomes.append((given.flags[:1], longest, len(deaths), done.returncode))
        print(
            f"{given.day}: a death every {longest / 2:g} s, {len(deaths)} deaths, exit code {done.returncode}",
            flush=True,
        )
        if done.returncode:
            error_of(done)
        else:
            assert_rows(job, given)
    for given in jobs:
        assert run(given.run_id, *retrying, *given.flags, timeout=600).returncode == 0
        assert_rows(job, given)
    assert_nothing_stays(job)
