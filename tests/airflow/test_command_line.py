"""What the operator makes of its options, as this package reads it: a real operator, a real parser, no job."""

import json
import os
from types import SimpleNamespace

import pytest
from airflow.providers.apache.beam.operators.beam import BeamRunPythonPipelineOperator
from airflow.version import version

PYTHON = os.environ["BEAM_PIPELINE_PYTHON"]
VERSION = f"v{version.replace('.', '-')}"

# Takes the place of the module in the operator's command line.
PARSE = """
import dataclasses, json, sys
from pathlib import Path
from apache_beam.options.pipeline_options import PipelineOptions
from beam_pipeline.launch.options import parse
config = parse(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps({
    **dataclasses.asdict(config), "argv": sys.argv[2:], "beam": PipelineOptions(list(config.beam_args)).get_all_options(),
}))
"""


@pytest.fixture
def parsed(tmp_path):
    """A function from pipeline options to what the launcher would understand."""

    def run(options, **arguments):
        operator = BeamRunPythonPipelineOperator(
            task_id="historize",
            py_interpreter=PYTHON,
            py_options=["-c", PARSE],
            py_file=str(tmp_path / "parsed"),
            pipeline_options=options,
            deferrable=False,
            **arguments,
        )
        operator.execute({"ti": None})
        return SimpleNamespace(**json.loads((tmp_path / "parsed").read_text()))

    return run


def test_every_kind_of_value(parsed):
    config = parsed(
        {
            "run_id": "4e6f",
            "include_oov": True,
            "allow_dimension_change": False,
            "partition_expiration_days": 30,
            "run_name": None,
            "tower": ["film=films", "user=towers.user"],
            "experiments": ["a", "b=c"],
            "labels": {"team": "recommender"},
            "transform_name_mapping": {"old": "new"},
            "use_public_ips": False,
        }
    )
    assert (config.run_id, config.run_name, config.partition_expiration_days) == ("4e6f", None, 30)
    # True is a bare flag; False is not sent at all, and means what it says because every flag of ours is off by default.
    assert (config.include_oov, config.allow_dimension_change) == (True, False)
    assert [arg for arg in config.argv if "oov" in arg or "dimension" in arg] == ["--include_oov"]
    # A list repeats the flag.
    assert config.towers == {"film": "films", "user": "towers.user"}
    assert config.beam["experiments"] == ["a", "b=c"]
    # A dict becomes JSON, but labels become a list.
    assert config.beam["transform_name_mapping"] == {"old": "new"}
    assert config.beam["labels"] == ["team=recommender", f"airflow-version={VERSION}"]
    # The one False that the provider turns into a flag of Beam's.
    assert config.beam["use_public_ips"] is False


def test_labels_are_sent_without_being_asked_for(parsed):
    config = parsed({"run_id": "4e6f"})
    assert config.argv == ["--runner=DirectRunner", "--run_id=4e6f", f"--labels=airflow-version={VERSION}"]
    assert config.runner == "DirectRunner"


def test_camel_case_becomes_snake_case(parsed):
    config = parsed({"runId": "4e6f", "ifPartitionTaken": "keep", "tempLocation": "gs://b/t"})
    assert (config.run_id, config.if_partition_taken, config.beam["temp_location"]) == ("4e6f", "keep", "gs://b/t")


def test_a_templated_switch_is_a_string_and_means_what_it_says(parsed, capfd):
    assert parsed({"run_id": "4e6f", "include_oov": "False"}).include_oov is False
    assert parsed({"run_id": "4e6f", "include_oov": "True"}).include_oov is True
    with pytest.raises(Exception, match="return code 2"):
        parsed({"run_id": "4e6f", "include_oov": "None"})
    assert "argument --include_oov: ignored explicit argument 'None'" in "".join(capfd.readouterr())
