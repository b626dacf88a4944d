"""Workers are killed (SIGKILL) while a job runs: it ends by itself or fails in one line, a rerun publishes, and no reader
ever sees half a model.
"""

import random
import threading
import time

import pytest
from job import DESTINATION_TABLES, MARCH_1, Reader, error_of

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


@pytest.fixture
def watched(traffic):
    yield traffic
    traffic.forget()


def assert_whole(job, run_id, model, reader):
    for tower in ("user", "item"):
        assert job.rows(tower) == {("2026-03-01", run_id): model.rows(tower)}
    assert reader.seen - {(0, 0)} <= {(len(model.ids("user")), len(model.ids("item")))}
    assert job.tables() == DESTINATION_TABLES


@pytest.mark.parametrize(("step", "when"), MOMENTS)
def test_another_worker_goes_on(step, when, retrying, job, store, models, run, watched):
    """Where bundles are repeated, as on Dataflow and Flink, the job does not even fail."""
    run_id = store.log(models("plain"), "plain", MARCH_1, bucket=True)
    killed = watched.kill_at(step, when)
    with Reader(job, run_id) as reader:
        done = run(run_id, *retrying)
    assert killed() == 1, watched.steps
    assert done.returncode == 0, done.stderr[-5000:]
    assert_whole(job, run_id, models("plain"), reader)
    assert len(watched.loaded) == len({*watched.loaded})


@pytest.mark.parametrize(("step", "when"), MOMENTS)
def test_a_rerun_publishes(step, when, prism, job, store, models, run, watched):
    """Prism repeats nothing: a job whose only worker died fails, whatever was done."""
    run_id = store.log(models("plain"), "plain", MARCH_1, bucket=True)
    killed = watched.kill_at(step, when)
    with Reader(job, run_id) as reader:
        done = run(run_id, *prism)
        assert killed() == 1, watched.steps
        if done.returncode:
            error_of(done)
            watched.forget()
            done = run(run_id, *prism)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_whole(job, run_id, models("plain"), reader)


def test_every_attempt_dies(retrying, job, store, models, run, watched):
    """Four workers in a row die over one bundle: the job fails in one line."""
    run_id = store.log(models("plain"), "plain", MARCH_1, bucket=True)
    killed = watched.kill_at("audit", "before", times=4)
    line = error_of(run(run_id, *retrying))
    assert killed() == 4
    assert "died" in line
    watched.forget()
    with Reader(job, run_id) as reader:
        assert run(run_id, *retrying).returncode == 0
    assert_whole(job, run_id, models("plain"), reader)


KILLS = 40


@pytest.mark.timeout(3600)
def test_at_random_moments(retrying, job, store, models, run, watched):
    """Any of both workers, at any moment, until forty have died."""
    dice = random.Random(14)
    run_id = store.log(models("plain"), "plain", MARCH_1, bucket=True)
    kills = failed = jobs = 0
    with Reader(job, run_id) as reader:
        while kills < KILLS:
            over = threading.Event()
            deaths = []

            def killer(over=over, deaths=deaths):
                while not over.wait(dice.uniform(0.5, 15)):
                    if pids := watched.workers():
                        watched.kill(dice.choice(pids))
                        deaths.append(time.monotonic())

            thread = threading.Thread(target=killer)
            thread.start()
            try:
                done = run(run_id, *retrying, timeout=600)
            finally:
                over.set()
                thread.join()
            kills, jobs = kills + len(deaths), jobs + 1
            if done.returncode:
                failed += 1
                error_of(done)
        print(f"{kills} workers killed in {jobs} jobs, {failed} of which failed")
        assert run(run_id, *retrying).returncode == 0
    assert_whole(job, run_id, models("plain"), reader)
