"""Arrays of `.npy`, `.npz` and `.safetensors` files, compared with what NumPy and safetensors read themselves."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beam_pipeline.errors import (
    BadVectorError,
    CorruptFileError,
    NotAModelError,
    TruncatedFileError,
    UnsupportedModelError,
)
from beam_pipeline.files import open_file
from beam_pipeline.formats import encodings
from beam_pipeline.formats.files import arrays


def matrix_of(array):
    matrix = array.matrix()
    with open_file(matrix.path) as file:
        return matrix.decode(file.read(matrix.offset, matrix.size))


def ids_of(array, rows=3):
    vocabulary = array.vocabulary(0)
    found, at = [], vocabulary.span.start
    with open_file(vocabulary.path) as file:
        for count, end in encodings.cuts(file, vocabulary, rows):
            found += encodings.decode(vocabulary.encoding, file.read(at, end - at), count).to_pylist()
            at = end
    assert at == vocabulary.span.end
    return [name.decode() for name in found]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_npy(tmp_path, dtype):
    path = str(tmp_path / "a.npy")
    values = np.random.default_rng(1).normal(size=(7, 3)).astype(dtype)
    np.save(path, values)
    (array,) = arrays.read_arrays(path, open_file).values()
    assert np.array_equal(matrix_of(array), np.load(path))
    assert array.matrix().checksum is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(-3, 7), [str(n) for n in range(-3, 7)]),
        (np.arange(5, dtype="i4") - 2, ["-2", "-1", "0", "1", "2"]),
        (np.array(["u1", "é日本", "a b", "😀"]), ["u1", "é日本", "a b", "😀"]),
        (np.array([b"u1", b"longer"]), ["u1", "longer"]),
    ],
)
def test_npy_of_ids(tmp_path, values, expected):
    path = str(tmp_path / "ids.npy")
    np.save(path, values)
    assert ids_of(arrays.read_arrays(path, open_file)[""]) == expected


def test_npz_with_checksums(tmp_path):
    path = str(tmp_path / "a.npz")
    vectors = np.random.default_rng(1).normal(size=(5, 4)).astype("f4")
    np.savez(path, vectors=vectors, ids=np.array(["a", "bb", "c", "d", "e"]), other=np.zeros(3))
    found = arrays.read_arrays(path, open_file)
    with np.load(path) as oracle:
        assert np.array_equal(matrix_of(found["vectors"]), oracle["vectors"])
        assert ids_of(found["ids"]) == oracle["ids"].tolist()
    checksum = found["vectors"].matrix().checksum
    assert checksum.algorithm == "crc32"
    assert checksum.span.end == found["vectors"].span.end
    assert arrays.choose(found, "", "vectors", "x").name == "vectors"
    with pytest.raises(UnsupportedModelError, match="has no array 'x', and these: 'vectors'"):
        arrays.choose(found, "x", "vectors", "--vectors")


def test_safetensors(tmp_path):
    path = str(tmp_path / "a.safetensors")
    rng = np.random.default_rng(1)
    save_file(
        {"item": rng.normal(size=(5, 4)).astype("f4"), "user": rng.normal(size=(3, 4)).astype("f8"),
         "ids": np.arange(5), "mask": np.zeros(3, bool)}, path,
    )  # fmt: skip
    found = arrays.read_arrays(path, open_file)
    oracle = load_file(path)
    assert set(found) == {"item", "user", "ids"}
    for name in ("item", "user"):
        assert np.array_equal(matrix_of(found[name]), oracle[name])
    assert ids_of(found["ids"]) == ["0", "1", "2", "3", "4"]
    with pytest.raises(
        UnsupportedModelError, match=r"2 arrays that may be the vectors.*name one with --vectors item=x#NAME"
    ):
        arrays.choose(found, "", "vectors", "--vectors item=x#NAME")


def test_bfloat16(tmp_path):
    path = tmp_path / "a.safetensors"
    values = np.array([[1.5, -2.0], [0.25, 3.0]], "f4")
    raw = (values.view("u4") >> 16).astype("u2").tobytes()
    header = json.dumps({"v": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    assert np.array_equal(matrix_of(arrays.read_arrays(str(path), open_file)["v"]), values)


def test_the_checksum_of_ids(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, ids=np.arange(5))
    array = arrays.read_arrays(str(path), open_file)["ids"]
    vocabulary = array.vocabulary(0)
    with open_file(str(path)) as file:
        encodings.verify(file, vocabulary)
    data = bytearray(path.read_bytes())
    data[vocabulary.span.start] ^= 1
    path.write_bytes(data)
    with open_file(str(path)) as file, pytest.raises(CorruptFileError, match="do not match their crc32"):
        encodings.verify(file, vocabulary)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["a", None], object), "holds pickled objects"),
        (np.asfortranarray(np.zeros((3, 2), "f4")), "Fortran order"),
        (np.zeros((3, 2), ">f4"), "little-endian"),
        (np.zeros((3, 2), [("a", "f4")]), "save floats, integers or strings"),
    ],
)
def test_npy_that_is_not_read(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(UnsupportedModelError, match=message):
        arrays.read_arrays(str(tmp_path / "a.npy"), open_file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3, "f4"), r"shape \[3\] and type f4, and vectors are a matrix"),
        (np.zeros((3, 2), "i1"), r"shape \[3, 2\] and type i1"),
        (np.zeros((3, 0), "f4"), "no vectors in it"),
    ],
)
def test_an_array_that_is_no_matrix(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    (array,) = arrays.read_arrays(str(tmp_path / "a.npy"), open_file).values()
    with pytest.raises(BadVectorError, match=message):
        array.matrix()
    with pytest.raises(UnsupportedModelError, match="ids are a list"):
        array.vocabulary(0)


def test_npz_that_is_not_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, vectors=np.zeros((3, 2), "f4"))
    with pytest.raises(
        UnsupportedModelError, match=r"vectors.npy is compressed.*use numpy.savez, not savez_compressed"
    ):
        arrays.read_arrays(str(path), open_file)
    path.write_bytes(b"no zip at all")
    with pytest.raises(NotAModelError, match=r"is not a \.npz file"):
        arrays.read_arrays(str(path), open_file)


def test_truncated(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((30, 20), "f4"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match=r"has 2,396 bytes of values, and 2,400 are \[30, 20\] of float32"):
        arrays.read_arrays(str(path), open_file)
    path.write_bytes(b"no array")
    with pytest.raises(CorruptFileError, match=r"is no \.npy file"):
        arrays.read_arrays(str(path), open_file)


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ('{"v":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]}}', CorruptFileError, r"12 bytes, which are not \[2"),
        ('{"v":{"dtype":"F32","shape":[2,2],"data_offsets":[90,106]}}', TruncatedFileError, "truncated"),
        ('{"v":{"dtype":"F32","shape":[-2,2],"data_offsets":[0,16]}}', CorruptFileError, "no sensible shape"),
        ('{"v":{"dtype":"F32","shape":[2,2],"data_offsets":[16,0]}}', CorruptFileError, "ends before it starts"),
        ('{"v":{"dtype":"F32","shape":[2,2]}}', CorruptFileError, "no data_offsets"),
        ('{"v":{"shape":[2,2],"data_offsets":[0,16]}}', CorruptFileError, "no dtype"),
        ('{"v":3}', CorruptFileError, "no dtype"),
        ('{"v":{"dtype":"I8","shape":[16],"data_offsets":[0,16]}}', UnsupportedModelError, "no tensor of floats"),
        ("[]", CorruptFileError, "not a JSON object"),
        ("{]", CorruptFileError, "its header is not JSON"),
        ("", CorruptFileError, "its header has 0 bytes"),
    ],
)  # fmt: skip
def test_safetensors_that_lie(tmp_path, header, error, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    with pytest.raises(error, match=message):
        arrays.read_arrays(str(path), open_file)
    path.write_bytes(struct.pack("<Q", 1 << 60) + header.encode())
    with pytest.raises(CorruptFileError, match="its header has 1,152,921,504,606,846,976 bytes"):
        arrays.read_arrays(str(path), open_file)
