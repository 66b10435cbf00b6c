# SPDX-License-Identifier: Apache-2.0
"""Decode images that the package makes, for tests."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


def pixels(uri: str) -> np.ndarray:
    """uint8 [rows, columns, 3]: the pixels of a PNG as a data URI, decoded by the format's definition."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, found = 8, {}
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(kind + body)
        found[kind] = body
        place += 12 + length
    columns, rows, depth, colour = struct.unpack_from(">IIBB", found[b"IHDR"])
    assert (depth, colour) == (8, 2)
    lines = np.frombuffer(zlib.decompress(found[b"IDAT"]), dtype=np.uint8).reshape(rows, 1 + 3 * columns)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)
