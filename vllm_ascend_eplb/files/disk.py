# SPDX-License-Identifier: Apache-2.0
"""Bounded reading of foreign files, and atomic writing of this package's files.

Expert maps and traces are passed between machines and edited by hand. So every size is checked before memory is
allocated: the size of the file, the depth and number of values of a JSON text, the shape in an array's header. Every
failure is one :class:`FileError` with one line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .json_cause import json_cause

MAX_JSON_DEPTH = 16


MAX_JSON_CONTAINERS = 1 << 22
"""Most lists and objects in a JSON text; an empty one takes 64 bytes in memory for 3 in the file."""


MAX_JSON_VALUES = 1 << 25


_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})|%[A-Za-z_]\w*%|\$\([^)]*\)|`[^`]*`", re.ASCII)


_READ_HEADER: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class FileError(ValueError):
    """A file that cannot be used. The message is one line: which file, what is wrong, the way out."""


def expand_user(path: str | os.PathLike[str]) -> str:
    """The path with ``~`` replaced by a home folder: inside JSON no shell expands it."""
    name = os.fspath(path)
    return os.path.expanduser(name) if name.startswith("~") else name


def unexpanded(path: str | os.PathLike[str]) -> str:
    """A sentence about a variable or command in a path that no shell replaced, such as ``$HOME`` or ``$(pwd)``; empty
    where there is none."""
    found = _VARIABLE.search(os.fspath(path))
    if found is None:
        return ""
    name = found.group(0)
    value = os.environ.get(name.strip("${}%"))
    return f": {show(name)} was not replaced, write {'its value ' + show(value) if value else 'the path itself'}"


def read_bounded(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """The contents of a regular file. Symbolic links are followed.

    Args:
        path: of the file.
        limit: most bytes that such a file may have.
        what: what the file should be, for messages: "expert map".

    Raises:
        FileError: it is missing, unreadable, no regular file, empty or too large.
    """
    path = expand_user(path)
    try:
        # O_NONBLOCK: a FIFO must not block; it is refused below
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        if os.path.islink(path):
            raise FileError(f"{show(path)} is a symbolic link to nothing; give the path of the {what}") from None
        raise FileError(f"{show(path)} does not exist{unexpanded(path)}; give the path of the {what}") from None
    except PermissionError:
        raise FileError(f"{show(path)} may not be read by this user; change its permissions (chmod +r)") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(f"{show(path)} cannot be read ({reason}); give the path of the {what}") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise FileError(f"{show(path)} is {kind}; give the path of the {what}")
    with os.fdopen(handle, "rb") as file:
        if status.st_size == 0:
            raise FileError(f"{show(path)} is empty; check that the {what} was written to its end")
        if status.st_size > limit:
            raise FileError(
                f"{show(path)} has {status.st_size} bytes; a file of this kind has at most {limit}: check that it is "
                f"the right one"
            )
        try:
            data = file.read(status.st_size + 1)  # not the limit, which Python would set aside at once
            if len(data) > status.st_size:
                data += file.read(limit + 1 - len(data))
        except OSError as error:
            raise FileError(f"{show(path)} cannot be read ({error.strerror}); copy it again") from None
    if len(data) > limit:
        raise FileError(f"{show(path)} grew beyond {limit} bytes while it was read; check that it is the right one")
    return data


def check_place(path: str | os.PathLike[str]) -> None:
    """Checks that a result can be written, before the long computation that makes it.

    Raises:
        FileError: the folder is missing or may not be written, or the path is a directory, a symbolic link or no file
            at all.
    """
    path = expand_user(path)
    target = Path(path)
    if "\0" in path:
        raise FileError(f"{show(path)} is not a path: it has a null byte; give the path of a file to write")
    if target.is_symlink():
        raise FileError(f"{show(path)} is a symbolic link, which would be replaced; give the path of the file itself")
    if target.is_dir():
        raise FileError(f"{show(path)} is a directory; give the path of a file to write")
    if target.exists() and not target.is_file():
        raise FileError(f"{show(path)} is not a regular file; give the path of a file to write")
    if not target.parent.is_dir():
        raise FileError(f"the folder of {show(path)} does not exist{unexpanded(path)}; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileError(f"the folder of {show(path)} may not be written by this user; choose another place")


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces a file so that readers see either the old contents or all of ``data``, also after a crash.

    Raises:
        FileError: as for :func:`check_place`, or the disk refuses.
    """
    check_place(path)
    target = Path(expand_user(path))
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        _replace(target, data, mode, to_disk=True)
    except OSError as error:
        raise FileError(f"{show(path)} cannot be written ({error.strerror}); choose another place") from None


def write_private(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file that only its owner may read, so that readers see all or nothing. Does not wait for the disk,
    because nothing reads the file after a crash.

    Raises:
        OSError: the file cannot be written.
    """
    _replace(Path(path), text.encode(), 0o600, to_disk=False)


def _replace(target: Path, data: bytes, mode: int, to_disk: bool) -> None:
    """The file has no name while it is written, so a process that is killed leaves nothing. Where that is not possible,
    it has a hidden one."""
    name = str(target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}")
    for named in (False, True):
        try:
            path, flags = (name, os.O_CREAT | os.O_EXCL) if named else (str(target.parent), os.O_TMPFILE)
            handle = os.open(path, flags | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                if to_disk:
                    os.fsync(handle)
                os.fchmod(handle, mode)
                if not named:
                    # without a folder's descriptor Python's link does not follow the symbolic link in /proc
                    os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=handle)
            os.replace(name, target)
            return
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(name)
            if named or not isinstance(error, OSError):
                raise


_OTHER_KINDS = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"BZh", "is compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it first"),
    (b"\x89HDF", "is HDF5, which is not read; save the array with numpy.save"),
    (b"PAR1", "is Parquet, which is not read; save the array with numpy.save"),
    (b"\x80", "is a pickle or torch.save's form of old, which can run code; save it with torch.save as of torch 1.6, "
    "or with numpy.save"),
)  # fmt: skip
"""First bytes of file kinds that are given in place of JSON, and the way out."""

_TABLE = re.compile(rb"[^{}\[\]:\s][^{}\[\]:]*[,;\t][^{}\[\]:]*")


def refuse_other_kinds(data: bytes, path: str | os.PathLike[str]) -> None:
    """Refuses a file of another kind than JSON, by its first bytes.

    Raises:
        FileError: the file is of another kind, which the message names.
    """
    for begin, said in _OTHER_KINDS:
        if data.startswith(begin):
            raise FileError(f"{show(path)} {said}")
    if os.fspath(path).lower().endswith((".csv", ".tsv")) or _TABLE.fullmatch(data[:200].partition(b"\n")[0]):
        raise FileError(f"{show(path)} is a table of text (CSV), which is not read; save the array with numpy.save")


def parse_json(data: bytes, path: str | os.PathLike[str]) -> Any:
    """The value of a JSON text; NaN, infinities and repeated keys are refused.

    Raises:
        FileError: the text is not JSON, truncated, nested too deeply or has too many values.
    """
    refuse_other_kinds(data, path)
    codes = np.frombuffer(data, dtype=np.uint8)
    opening = (codes == ord("[")) | (codes == ord("{"))
    closing = (codes == ord("]")) | (codes == ord("}"))
    depth = int(np.cumsum(opening.astype(np.int8) - closing.astype(np.int8), dtype=np.int64).max(initial=0))
    if depth > MAX_JSON_DEPTH:
        raise FileError(f"{show(path)} is nested {depth} levels deep; allowed are {MAX_JSON_DEPTH}")
    values = int(np.count_nonzero(codes == ord(",")))
    if int(opening.sum()) > MAX_JSON_CONTAINERS or values > MAX_JSON_VALUES:
        raise FileError(
            f"{show(path)} has {values} values; allowed are {MAX_JSON_VALUES}: check that it is the right file"
        )
    try:
        return json.loads(data, parse_constant=_no_constant, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            place = f"line {error.lineno}, column {error.colno}"
            raise FileError(f"{show(path)} is not JSON: {json_cause(error.doc, error)} ({place})") from None
        reason = str(error) or "nested too deeply"
        raise FileError(f"{show(path)} is not JSON ({show(reason)}); copy or write it again") from None


def parse_npy(data: bytes, path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """The array of numbers in the contents of a .npy file.

    Raises:
        FileError: the contents are not such an array, are truncated or hold no numbers.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        if version not in _READ_HEADER:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = _READ_HEADER[version](stream)
    except Exception as error:  # NumPy parses the header as Python, and its tokenizer has errors of its own
        raise FileError(f"{show(path)} is not a NumPy array ({show(str(error))}); save it with numpy.save") from None
    if dtype.hasobject or dtype.kind not in "iufb":
        raise FileError(f"{show(path)} holds {dtype}; give an array of numbers")
    count, begin = 1, stream.tell()
    for length in shape:
        count *= int(length)
    if count * dtype.itemsize != len(data) - begin:
        raise FileError(
            f"{show(path)} claims shape {shape} of {dtype}, {count * dtype.itemsize} bytes, but holds "
            f"{len(data) - begin}; copy or write it again"
        )
    flat = np.frombuffer(data, dtype=dtype, offset=begin)
    return np.ascontiguousarray(flat.reshape(shape, order="F" if fortran else "C"))


def parse_npz(
    data: bytes, path: str | os.PathLike[str], limit: int, names: tuple[str, ...]
) -> dict[str, npt.NDArray[Any]]:
    """Some arrays of a .npz archive by name.

    Args:
        data: contents of the archive.
        path: for messages.
        limit: most bytes that an array may have when unpacked.
        names: arrays to read; missing ones are left out. From an archive with a single array that array is read,
            whatever its name.

    Raises:
        FileError: the contents are not an archive of arrays, or an array is too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = names if len(members) != 1 else tuple(members)
            arrays = {}
            for name in wanted:
                if name not in members:
                    continue
                if members[name].file_size > limit:
                    raise FileError(
                        f"{show(path)}: {show(name)} has {members[name].file_size} bytes; allowed are {limit}"
                    )
                with archive.open(members[name]) as file:
                    contents = file.read(limit + 1)
                try:
                    arrays[name] = parse_npy(contents, f"{os.fspath(path)}:{name}")
                except FileError:
                    if name in names[:1] or len(members) == 1:
                        raise
            return arrays
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{show(path)} is not an .npz archive ({show(str(error))}); copy or write it again") from None
    except Exception as error:  # zlib.error and whatever a damaged archive makes zipfile raise
        raise FileError(f"{show(path)} is damaged ({show(str(error))}); copy or write it again") from None


def show(text: str | os.PathLike[str]) -> str:
    """A path or text on one line and of bounded length."""
    line = "".join(c if c.isprintable() else "?" for c in os.fspath(text))
    return line if len(line) <= 300 else line[:297] + "..."


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, for ``object_pairs_hook``.

    Raises:
        ValueError: a key stands twice.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            seen.add(key)
    return table


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
