# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, as SGLang's recorder and scripts around DeepSeek's EPLB write them.

torch is imported only here, and only when such a file is read or written. Nothing in a file is executed: torch reads
it with ``weights_only=True``, which accepts tensors, numbers, text and containers.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from typing import Any

import numpy as np

from .disk import FileError, show

_CODES = re.compile(r"\x1b\[[0-9;]*m")
"""Escape codes that make text bold in a terminal."""

MAX_DEPTH = 6


MAX_VALUES = 1 << 20
"""Most tensors and other values in a file; a record of 10,000 forward passes has 60,000."""


def is_torch_file(data: bytes) -> bool:
    """Whether the contents of a file are an archive of ``torch.save``."""
    if not data.startswith(b"PK"):
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except Exception:  # whatever a damaged archive makes zipfile raise
        return b"/data.pkl" in data[:4096]


def read_torch(data: bytes, path: str | os.PathLike[str], limit: int) -> Any:
    """The contents of a file of ``torch.save``, with NumPy arrays in place of tensors.

    Args:
        data: contents of the file.
        path: for messages.
        limit: most bytes that the file may have when unpacked, and a tensor as float64.

    Raises:
        FileError: torch is not installed, or the contents are damaged, too large or hold other objects.
    """
    name = show(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > limit:
                raise FileError(f"{name} has {unpacked} bytes unpacked; allowed are {limit}")
            damaged = archive.testzip()  # torch's own reader takes any bytes for numbers
    except FileError:
        raise
    except Exception as error:  # whatever a damaged archive makes zipfile raise
        raise FileError(f"{name} is damaged ({show(str(error))}); copy or write it again") from None
    if damaged is not None:
        raise FileError(f"{name} is damaged (in {show(damaged)}); copy or write it again")
    try:
        import torch
    except ImportError:
        raise FileError(f"{name} is a file of torch.save, for which torch is needed; pip install torch") from None
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many types
        reason = _CODES.sub("", str(error)).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"{name} cannot be read by torch.load with weights_only=True ({show(reason[0])[:160]}); save tensors, "
            "numbers and text alone"
        ) from None
    return _Plain(name, limit).of(value, 0)


def write_torch(value: Any) -> bytes:
    """The bytes of a file of ``torch.save``, with tensors in place of NumPy arrays.

    Raises:
        FileError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise FileError("a file of torch.save needs torch; pip install torch, or choose another form") from None
    stream = io.BytesIO()
    tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in value.items()}
    torch.save(tensors, stream)
    return stream.getvalue()


class _Plain:
    """Turns tensors into arrays, within bounds."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._values = 0
        self._numbers = 0

    def of(self, value: Any, depth: int) -> Any:
        import torch

        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise FileError(f"{self._name} has more values than a file of loads or of a map; is it the right file?")
        if isinstance(value, torch.Tensor):
            return self._array(value)
        if isinstance(value, dict):
            return {key: self.of(entry, depth + 1) for key, entry in value.items() if isinstance(key, (str, int))}
        if isinstance(value, (list, tuple)):
            return [self.of(entry, depth + 1) for entry in value]
        return value if isinstance(value, (bool, int, float, str)) else None

    def _array(self, tensor: Any) -> Any:
        import torch

        self._numbers += tensor.numel()  # a view of one number can claim any shape
        if self._numbers * 8 > self._limit:
            raise FileError(f"{self._name} has tensors of {self._numbers} numbers; allowed are {self._limit // 8}")
        try:
            plain = tensor.detach()
            if plain.layout != torch.strided or plain.is_quantized or plain.is_complex():
                raise TypeError(f"a tensor of {plain.dtype}, {plain.layout}")
            if plain.dtype.is_floating_point and plain.dtype != torch.float64:
                plain = plain.to(torch.float32)
            return np.ascontiguousarray(plain.numpy())
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise FileError(f"{self._name} holds {show(str(error))}; save tensors of numbers") from None
