"""The HDF5 file of a `.keras` file in other layouts, and in some that mean harm."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from keras_zips import path_of, refused, rezipped
from towers import read_tower

from beam_pipeline.errors import (
    CorruptFileError,
    PipelineError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats.keras import weights
from beam_pipeline.formats.keras.reader import KerasFile


def test_metadata_that_are_too_large(keras_files, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_METADATA", 2000)
    with pytest.raises(CorruptFileError, match=r"its model.weights.h5 exceeds the limit of 2,000 bytes"):
        KerasFile(path_of(keras_files("functional")), open_file)


def test_other_layouts_of_the_weights(keras_files, tmp_path):
    """The HDF5 part written again by h5py, as another version or somebody who means harm may have it."""
    script = (
        "import h5py, io, json, sys\n"
        "source = h5py.File(sys.argv[1])\n"
        "def put(**options):\n"
        "    del target['layers/embedding/vars/0']\n"
        "    target.create_dataset('layers/embedding/vars/0', **options)\n"
        "for number, (change, options) in enumerate(json.loads(sys.argv[2])):\n"
        "    with h5py.File(f'{sys.argv[1]}.{number}', 'w', **options) as target:\n"
        "        for key in source: source.copy(key, target)\n"
        "        data = target['layers/embedding/vars/0'][:]\n"
        "        exec(change)\n"
    )
    good = [("put(data=data)", options) for options in ({}, {"libver": "latest"}, {"userblock_size": 512})]
    bad = {
        "put(data=data, chunks=(2, 2))": "stored in chunks",
        "put(data=data, compression='gzip')": "stored in chunks",
        "put(data=data.astype('>f4'))": "values of type >f4",
        "put(data=data.astype('i4'))": "values of type <i4",
        "put(data=data[:, 0])": "has shape",
        "put(shape=(0, 4), dtype='f4')": "has shape",
        "put(shape=(1 << 40, 4), dtype='f4', external=[('/etc/passwd', 0, 1 << 44)])": "which has only",
        "put(shape=(4, 4), dtype='f4')": "which has only",  # never written: nowhere in the file
        "del target['layers/embedding/vars/0']; target['layers/embedding/vars/0'] = h5py.ExternalLink('x', '/y')": "parsed",
        "target['layers/loop'] = target['layers']; put(data=data, chunks=(2, 2))": "stored in chunks",
        "target['vars'].attrs['name'] = ['x'] * 2000": "cannot be parsed .an attribute of 2,000 values",
        "target['layers/embedding/vars/0'].attrs['x'] = ['x'] * 2000": "cannot be parsed .an attribute of 2,000 values",
    }
    model, hdf5 = keras_files("sequential"), tmp_path / "weights"
    with zipfile.ZipFile(path_of(model)) as archive:
        hdf5.write_bytes(archive.read("model.weights.h5"))
    changes = json.dumps([*good, *[(change, {}) for change in bad]])
    done = subprocess.run([sys.executable, "-c", script, str(hdf5), changes], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

    def read(number):
        changed = Path(f"{hdf5}.{number}").read_bytes()
        path = rezipped(model, tmp_path / "x.keras", lambda members: {**members, "model.weights.h5": changed})
        return read_tower(KerasFile(path, open_file).tower("user", "table"))

    for number in range(len(good)):
        assert read(number) == model.rows("user")
    for number, message in enumerate(bad.values(), len(good)):
        with pytest.raises(PipelineError, match=message):
            read(number)


@pytest.mark.parametrize("name", ["x/" * 32_000 + "x", "x/" * 70 + "x", "y" * 600])
def test_a_vocabulary_that_lies_too_deep(keras_files, tmp_path, name):
    """The path of each folder around it is kept: a gigabyte, for a name of 64 KB."""
    change = lambda members: {**members, f"assets/{name}/vocabulary.txt": b""}  # noqa: E731 - as the others
    refused(keras_files("sequential"), tmp_path, change, "has an object .* of .* characters")


def test_structures_that_cost_more_than_their_bytes(keras_files, tmp_path):
    """HDF5 by h5py: groups inside of groups, links to the same thing again and again, names without end."""
    script = (
        "import h5py, json, sys\n"
        "for number, change in enumerate(json.loads(sys.argv[2])):\n"
        "    with h5py.File(f'{sys.argv[1]}.{number}', 'w', libver='latest') as target:\n"
        "        exec(change)\n"
    )
    changes = {
        "for _ in range(5000): target = target.create_group('g')": "has an object",
        "target['data'] = [[1.0]]\nfor i in range(40_000): target[f'vars/{i}'] = target['data']": "does not exist",
        "target['g/vars/0'] = [[1.0]]\nfor i in range(40_000): target[f'x/{i}'] = target['g']": "does not exist",
        "target.create_group('y' * 5000)": "has an object",
        "target.create_group('a\\nb/vars').attrs['name'] = 'n' * 60_000": "does not exist",
    }
    hdf5 = tmp_path / "weights"
    command = [sys.executable, "-c", script, str(hdf5), json.dumps([*changes])]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for number, message in enumerate(changes.values()):
        content = Path(f"{hdf5}.{number}").read_bytes()
        change = lambda members, content=content: {**members, "model.weights.h5": content}  # noqa: E731
        refused(keras_files("own"), tmp_path, change, message, ("user", "user_layer"))
