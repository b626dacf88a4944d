"""Real models, mutated a few thousand times: minutes of work, so apart from the other tests of fuzz.py."""

from pathlib import Path

import fuzz
import pytest


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_mutated_models(models, tables, keras_files):
    """What `make fuzz` does, a few thousand times less: see fuzz.py."""
    folders = [models("plain").folder.parent, tables("mutable").folder.parent, keras_files("own").folder.parent]
    summaries = fuzz.run(1500, 1, folders)
    for summary in summaries.values():
        assert summary["problems"] == []
        assert sum(summary["outcomes"].values()) == 1500
        # Neither is all noticed at once, nor does all of it hit nothing.
        assert 100 < summary["outcomes"]["same"] < 1000
        assert summary["outcomes"]["CorruptFileError"] > 100
