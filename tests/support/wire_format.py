"""The protobuf wire format, written and taken apart the plain way, to make files that test the reader."""

import numpy as np


def varint(number):
    """A number, seven bits to a byte."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number, content):
    """A field of bytes, or of a varint."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def fields(message):
    """Yields (number, content, raw bytes) of each field of a message; content is None unless it is bytes."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        content = None
        if tag & 7 == 0:
            _, at = _read_varint(message, at)
        elif tag & 7 == 2:
            length, at = _read_varint(message, at)
            content = message[at : at + length]
            at += length
        else:
            at += 8 if tag & 7 == 1 else 4
        yield tag >> 3, content, message[start:at]


def rewrite(message, path, change):
    """Returns a message in which `change` was applied to the content of every field at a path of numbers."""
    if not path:
        return change(message)
    return b"".join(
        field(number, rewrite(content, path[1:], change)) if number == path[0] and content is not None else raw
        for number, content, raw in fields(message)
    )


def blown_up(saved_model, ids, count):
    """Returns a saved_model.pb whose vocabulary of that many ids is another of `count`: user-000000000 and so on."""

    def shape(size):
        return field(2, field(2, field(1, size)))

    def blow_up(tensor):
        dtype = tensor[:2]
        if not tensor.startswith(dtype + shape(ids)):
            return tensor
        if dtype == field(1, 7):  # DT_STRING
            return dtype + shape(count) + b"".join(b"\x42\x0euser-%09d" % i for i in range(count))
        return dtype + shape(count) + field(4, np.arange(1, count + 1, dtype="<i8").tobytes())

    # SavedModel.meta_graphs, MetaGraphDef.graph_def, GraphDef.node, NodeDef.attr, its value, AttrValue.tensor
    return rewrite(saved_model, [2, 2, 1, 5, 2, 8], blow_up)


def _read_varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at
