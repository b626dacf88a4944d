"""Models that the tests create are created once: not by a second run, nor by two workers at a time."""

import subprocess
import sys

import pytest
from models import SUPPORT, made_by

SCRIPT = """
import sys, time
from pathlib import Path
with Path(__file__).with_name("log").open("a") as log:
    log.write("created\\n")
time.sleep(1)
Path(sys.argv[1], "model").mkdir()
Path(sys.argv[1], "model", "names").write_text(" ".join(sys.argv[2:]))
"""
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from models import made_by
print(made_by(sys.argv[2], cache=Path(sys.argv[3]))("model").folder)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "make_some.py"
    path.write_text(SCRIPT)
    return path


def created(script):
    return len(script.with_name("log").read_text().splitlines())


def test_parallel_workers_and_later_runs_share_them(script, tmp_path):
    command = [sys.executable, "-c", WORKER, str(SUPPORT), str(script), str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {worker.communicate(timeout=60)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert folders == {f"{made_by(str(script), cache=tmp_path / 'cache')('model').folder}\n"}
    assert created(script) == 1


def test_another_script_or_other_names_are_other_models(script, tmp_path):
    folders = {made_by(str(script), *names, cache=tmp_path)("model").folder for names in ((), ("a",), ("a", "b"))}
    script.write_text(SCRIPT + "# changed")
    folders.add(made_by(str(script), cache=tmp_path)("model").folder)
    assert len(folders) == created(script) == 4
    assert {(folder / "names").read_text() for folder in folders} == {"", "a", "a b"}


def test_a_script_that_is_imported_counts(script, tmp_path, monkeypatch):
    monkeypatch.setattr("models.SUPPORT", tmp_path)
    helper = tmp_path / "make_other.py"
    helper.write_text("")
    script.write_text("from make_other import *\n" + SCRIPT)
    before = made_by(script.name, cache=tmp_path / "cache")("model").folder
    helper.write_text("N = 1\n")
    assert made_by(script.name, cache=tmp_path / "cache")("model").folder != before


def test_what_failed_is_created_again(script, tmp_path):
    script.write_text(SCRIPT + "(Path(sys.argv[1]).parents[1] / 'flag').touch(exist_ok=False)")
    (tmp_path / "flag").touch()
    with pytest.raises(AssertionError, match="FileExistsError"):
        made_by(str(script), cache=tmp_path / "cache")
    (tmp_path / "flag").unlink()
    assert made_by(str(script), cache=tmp_path / "cache")("model").folder.exists()
    assert created(script) == 2
