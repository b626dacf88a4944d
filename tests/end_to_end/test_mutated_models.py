"""Real models, mutated a few thousand times: minutes of work, so apart from the other tests of fuzz.py."""

from pathlib import Path

import fuzz
import pytest
from models import made_by


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_mutated_models(models, tables, keras_files):
    """What `make fuzz` does, a few thousand times less: see fuzz.py."""
    indexes = made_by("make_indexes.py", "tfrs", "own_in_the_graph", "own_long_integers")
    folders = [
        *(
            make("any").folder.parent
            for make in (models, tables, keras_files, indexes, made_by("make_keras_indexes.py"))
        ),
    ]
    summaries = fuzz.run(1500, 1, folders)
    for summary in summaries.values():
        assert summary["problems"] == []
        assert sum(summary["outcomes"].values()) == 1500
        # Neither is all noticed at once, nor does all of it hit nothing.
        assert 100 < summary["outcomes"]["same"] < 1000
        assert summary["outcomes"]["CorruptFileError"] > 100
