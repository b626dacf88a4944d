"""metadata_compare.json says what the command line takes."""

import json
import re
from pathlib import Path

import pytest
from google.cloud.dataflow_v1beta3.types import TemplateMetadata

from beam_pipeline.comparison.command import parse, parser

ROOT = Path(__file__).parents[2]
METADATA = json.loads((ROOT / "metadata_compare.json").read_text(encoding="utf-8"))
PARAMETERS = {parameter["name"]: parameter for parameter in METADATA["parameters"]}
NOT_IN_A_TEMPLATE = {
    "help": "prints and ends",
    "version": "prints and ends",
    "warehouse": "a folder of the machine that launches",
    "plan": "prints on the machine that launches, and stops",
    "report": "a template's launcher does not wait for the job",
    "log_run": "a template's launcher does not wait for the job",
    "tracking_uri": "for --log_run",
    "tracking_audience": "for --log_run",
    "runner": "Beam's; the template launcher sets it",
    "project": "Beam's; the template launcher sets it",
}
OPTIONS = {action.option_strings[-1].removeprefix("--"): action for action in parser()._actions}


def test_every_option_is_a_parameter_and_the_other_way_round():
    TemplateMetadata.from_json(json.dumps(METADATA))
    assert {*PARAMETERS} == {*OPTIONS} - {*NOT_IN_A_TEMPLATE}
    assert {*NOT_IN_A_TEMPLATE} <= {*OPTIONS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_says_what_its_option_says(name):
    parameter, action = dict(PARAMETERS[name]), OPTIONS[name]
    assert parameter["label"]
    assert parameter["helpText"] == parser()._get_formatter()._expand_help(action)
    (regex,) = parameter["regexes"]
    values = [option["value"] for option in parameter.get("enumOptions", [])]
    assert values == [*(action.choices or [])]
    default = "false" if action.nargs == 0 else None if action.default is None else str(action.default)
    assert parameter.get("defaultValue") == default
    for value in [*values, *([default] if default else [])]:
        assert re.match(regex, value)
        parse([f"--{name}={value}"])
    assert not re.match(regex, "two\nlines")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("from", ["2026-03-01", "0123456789abcdef" * 2], ["", "a b", "-a"]),
        ("towers", ["user,item", "item"], ["", "User", "a,b,c", "a,"]),
        ("k", ["1", "100"], ["", "0", "-1", "1.5"]),
        ("labels", ["item=SELECT id, label, group_name FROM d.songs"], ["", "SELECT 1"]),
    ],
)
def test_a_regex_takes_what_the_command_line_takes(name, good, bad):
    (regex,) = PARAMETERS[name]["regexes"]
    for value in good:
        assert re.match(regex, value)
        parse([f"--{name}={value}"])
    for value in bad:
        assert not re.match(regex, value)


def test_the_image_holds_what_a_template_runs():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "COPY beam_pipeline/compare.py /template_compare/main.py" in lines
    assert "FLEX_TEMPLATE_PYTHON_PY_FILE=/template_compare/main.py" in (ROOT / "docs/comparison.md").read_text()
