"""The command line as a whole: subcommands, the console script, --help."""

import os
import subprocess
import sys

import pytest

from beam_pipeline.__main__ import main
from beam_pipeline.launch.options import parser


@pytest.mark.parametrize("script", ["beam-pipeline", "python -m beam_pipeline"])
@pytest.mark.parametrize("name", ["", "compare", "emulators", "report", "rollback", "search", "tag"])
def test_help_of_each_command(name, script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/beam-pipeline" if script == "beam-pipeline" else "/x/__main__.py"])
    with pytest.raises(SystemExit) as stopped:
        main([*([name] if name else []), "--help"])
    assert stopped.value.code == 0
    program = f"{script} {name}".rstrip() if script == "beam-pipeline" else f"{script}.{name}".rstrip(".")
    assert capsys.readouterr().out.startswith(f"usage: {program} ")


def test_a_subcommand_gets_its_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tag", "--run_id=1", "--env=prod", "--dataset=d"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "python -m beam_pipeline.tag: --env=prod is dataset raw_prod and --dataset=d another; leave out one; "
        "see python -m beam_pipeline.tag --help\n"
    )


def test_help_says_which_model_and_groups_flags(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = parser().format_help()
    usage, _, rest = text.partition("\n\n")
    assert "(--run_id ID | --experiment_name NAME | --model_uri URI)" in " ".join(usage.split())
    titles = [line[:-1] for line in rest.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:7] == ["options", "model", "towers", "destination", "safety", "modes", "Beam"]
    assert "--project PROJECT" in text
    assert "--runner RUNNER" in text


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    before_examples = parser().format_help().partition("\nexamples:")[0]
    widths = [len(line) for line in before_examples.splitlines()]
    assert max(widths) <= columns
    assert max(widths) > columns - 20


def test_help_imports_nothing_that_takes_seconds():
    """About half a second; what it imports says so more reliably than a clock on a busy machine."""
    script = (
        "import sys\nfrom beam_pipeline.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'apache_beam', 'numpy', 'pyarrow', 'mlflow', 'tensorflow', 'google.cloud.bigquery'}\n"
        "sys.exit(str(sorted(heavy & {*sys.modules})) if heavy & {*sys.modules} else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs(tmp_path):
    command = [sys.executable, "-m", "beam_pipeline", "emulators", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: no warehouse at ")
