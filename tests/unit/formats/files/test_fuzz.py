"""Files of vectors and ids that are damaged or mean harm: rows or a named error, in little time and memory."""

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from models import ROOT, SUPPORT

from beam_pipeline.errors import CorruptFileError
from beam_pipeline.formats.files import footer


def test_mutated_files():
    """In a process of its own, which a damaged Parquet file must not end."""
    command = [sys.executable, str(SUPPORT / "fuzz_files.py"), "--number=1500", "--seed=7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "1,500 mutations" in done.stdout


@given(st.binary(max_size=300))
def test_any_bytes_as_a_footer(data):
    try:
        groups = footer.read_groups("x.parquet", data)
    except CorruptFileError as error:
        assert "x.parquet cannot be read as Parquet" in str(error)  # noqa: PT017 - most of it is none
    else:
        assert len(groups) <= len(data)
