"""Where the files of ids and vectors may be, for the workers to read them."""

from contextlib import ExitStack
from datetime import date

import pytest

from beam_pipeline.errors import ConfigError
from beam_pipeline.launch.options import parse
from beam_pipeline.launch.sources import find_sources
from beam_pipeline.training import Run

SHARING = "artifacts are on gs://, --shared_files if the workers can read it, or --runner=DirectRunner"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "item.parquet").touch()
    return Run("r1", "first", "1", "e", date(2026, 3, 1), tmp_path.as_uri())


def found(run, *flags):
    config = parse(["--run_id=r1", "--vectors=item=item.parquet", *flags])
    with ExitStack() as copies:
        return find_sources(config, run, "gs://b/tmp", copies, lambda *_: None).vectors["item"].path


@pytest.mark.parametrize(
    ("runner", "remedy"),
    [
        ("DataflowRunner", "artifacts are on gs://, or --runner=DirectRunner"),
        ("PrismRunner", SHARING),
        ("FlinkRunner", SHARING),
        ("PortableRunner", SHARING),
    ],
)
def test_a_file_of_this_machine_is_not_for_workers_elsewhere(run, runner, remedy):
    with pytest.raises(ConfigError, match=f"{runner} cannot read .*item.parquet of run r1 on this machine") as raised:
        found(run, f"--runner={runner}")
    assert str(raised.value).endswith(remedy)


@pytest.mark.parametrize("flags", [[], ["--runner=PrismRunner", "--shared_files"]])
def test_a_file_of_this_machine_that_the_workers_read(run, tmp_path, flags):
    assert found(run, *flags) == str(tmp_path / "item.parquet")
