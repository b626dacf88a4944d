"""Damage to copies of the model `plain` and of `.keras` files: single bytes, vectors and ids."""

import numpy as np


def data_file(model):
    return next((model.folder / "variables").glob("*.data-*"))


def flip(model, at):
    """Flips a bit of the data file."""
    data = bytearray(data_file(model).read_bytes())
    data[at] ^= 1
    data_file(model).write_bytes(data)


def overwrite_vector(model, row, value):
    """Writes a value into the item matrix, the second of the file, checksum and all left as they are."""
    data = bytearray(data_file(model).read_bytes())
    start = 3016 * 8 * 4 + row * 8 * 4 + 12
    data[start : start + 4] = np.float32(value).tobytes()
    data_file(model).write_bytes(data)


def rewrite_items(model, change):
    """Applies a function to the list of item ids in the vocabulary file."""
    path = model.folder / "assets" / "items.txt"
    path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n")[:-1])) + b"\n")


def flip_keras(path, towers, where):
    """Flips a bit of a tower's matrix, of the ids of the items, or beside the matrices."""
    at = {
        "user": towers["user"].matrix.offset + 5000,
        "item": towers["item"].matrix.span.end - 2,
        # The optimizer's state, which lies behind the matrices.
        "beside": towers["user"].matrix.checksum.span.end - 100,
        "vocabulary": towers["item"].vocabulary.span.start + 3,
    }[where]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
