"""The page about comparisons that a job has written before."""

import worlds
from pages import NASTY, checked

from beam_pipeline.comparison import results


def test_from_the_tables_alone(history, tmp_path, capsys):
    """What the job writes at its end, a command writes later."""
    for number in range(3):
        made = {t: v + 0.1 * number for t, v in worlds.towers(users=90, items=80).items()}
        ids = {"item": [f"{NASTY} {n}" for n in range(80)]}
        history.publish(f"2026-03-0{number + 1}", f"r{number}", made, ids=ids)
    assert history.report(f"--output={tmp_path}/none.html") == 1
    assert "there is no comparison up to" in capsys.readouterr().err
    assert history.compare("--all", f"--report={tmp_path}/job.html") == 0
    assert history.report(f"--output={tmp_path}/later.html") == 0
    assert (tmp_path / "job.html").read_text() == (tmp_path / "later.html").read_text()
    assert history.report("--to=r1", f"--output={tmp_path}/first.html") == 0
    assert "runs <code>r0</code> → <code>r1</code> · 1 pair in" in (tmp_path / "first.html").read_text()
    assert history.report("--to=r9", f"--output={tmp_path}/none.html") == 1
    assert "--to=r9: there is no comparison of that run" in capsys.readouterr().err
    checked((tmp_path / "job.html").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"job.html", "later.html", "first.html"}
    assert results.find_results(history.client, history.destination)[-1].values["mlflow_run_id"] == "r2"
