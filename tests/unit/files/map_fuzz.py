# SPDX-License-Identifier: Apache-2.0
"""Malformed map files of every form, and the CPU time and memory of reading them.

``python -m tests.unit.files.map_fuzz COUNT SEED`` makes COUNT files, damages each in one of the ways below, reads it as
a map and as loads, and prints one JSON object. A result is bad if the error is not the reader's own, if the message has
several lines, or if CPU time or memory exceed the bounds. It is a separate program, so that memory counts for the files
alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map, write_expert_map
from vllm_ascend_eplb.files.traces import TraceError, read_trace

FORMS = {
    "ascend.json": "ascend", "sglang.json": "sglang", "sglang.pt": "sglang", "rows.json": "array", "slots.npy": "array",
    "slots.npz": "array", "trtllm.yaml": "trtllm", "omni.npy": "omni", "deepseek.npz": "deepseek",
    "deepseek.pt": "deepseek",
}  # fmt: skip
MAX_SECONDS = 0.1
MAX_BYTES = 100 << 20


def originals(folder: Path) -> dict[str, bytes]:
    """A good file of every form, for 4 layers of 32 experts on 4 ranks, and two dumps of SGLang's recorder."""
    import torch

    made = Placement.initial(4, 32, 4, 4)
    for name, form in FORMS.items():
        write_expert_map(folder / name, made, form)  # type: ignore[arg-type]
    torch.save({"rank": 0, "logical_count": torch.ones(2, 4, 32, dtype=torch.int32)}, folder / "dump.pt")
    torch.save(
        {
            "records": [{"forward_pass_id": 1, "global_physical_count": torch.ones(4, 36, dtype=torch.int32)}],
            "last_physical_to_logical_map": torch.from_numpy(made.physical_to_logical.copy()),
        },
        folder / "records.pt",
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a piece left out, repeated, or inserted elsewhere."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + 400)
    at = rng.randrange(len(data))
    return rng.choice([data[:a] + data[b:], data[:b] + data[a:b] * 3 + data[b:], data[:at] + data[a:b] + data[at:]])


TOKENS = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"-1", b"1e400", b"NaN", b"null", b"true", b"99999999999", b"[" * 300,
    b"{" * 30, b"'", b"\n", b"\t", b"- ", b"&a ", b"*a", b"!!python/name:os.system ", b"? ", b"\xff", b"\0", b"0.5",
    b"<<: ", b"|", b">", b"#", b"%", b"2001-01-01", b"1_0", b"0x1F", b"-" * 50, b"[" * 20 + b"]" * 20,
]  # fmt: skip


def with_tokens(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(TOKENS) + data[at + rng.randrange(3) :]
    return data


def with_numbers(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a number replaced by a value that no map has, in text or in binary."""
    if data[:2] == b"PK" or data[:1] == b"\x93":
        at = rng.randrange(max(1, len(data) - 8))
        value = rng.choice([b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little"), (10**9).to_bytes(8, "little")])
        return data[:at] + value + data[at + 8 :]
    parts = data.split(b", ")
    parts[rng.randrange(len(parts))] = rng.choice([b"-7", b"1e9", b"4294967296", b"3.5", b'"3"', b"[3]", b"null", b""])
    return b", ".join(parts)


def noise(data: bytes, rng: random.Random) -> bytes:
    start = rng.choice([b"", data[:4], data[:100], b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"num_slots: ", b"{"])
    return start + rng.randbytes(rng.randrange(2000))


WAYS = (truncated, flipped, spliced, with_tokens, with_numbers, noise)


def fuzz(count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    outcome: dict[str, Any] = {"files": 0, "read": 0, "refused": 0, "bad": [], "slowest": 0.0, "largest": 0, "by": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = originals(folder)
        for file, data in sorted(good.items()):  # also imports torch and PyYAML before memory is measured
            (read_trace if file in ("dump.pt", "records.pt") else read_expert_map)(
                *[folder / file], **({} if file in ("dump.pt", "records.pt") else {"num_ranks": 4})
            )
            assert data
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            file = sorted(good)[number % len(good)]
            way = WAYS[number // len(good) % len(WAYS)]
            path = folder / f"bad-{file}"
            path.write_bytes(way(good[file], rng))
            _read(path, f"{way.__name__} {file} {number}", outcome, number % 7 == 0)
            key = outcome["by"].setdefault(file, 0)
            outcome["by"][file] = key + 1
    outcome["grown_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    return outcome


def _read(path: Path, case: str, outcome: dict[str, Any], trace_memory: bool) -> None:
    outcome["files"] += 1
    for read, error, options in (
        (read_expert_map, ExpertMapError, {"num_ranks": 4, "allow_duplicates": True}),
        (read_trace, TraceError, {}),
    ):
        if trace_memory:
            tracemalloc.start()
        begin = time.process_time()
        try:
            read(path, **options)  # type: ignore[operator]
            outcome["read"] += 1
        except error as said:
            outcome["refused"] += 1
            if not str(said).isprintable() or len(str(said)) > 1500 or not str(said):
                outcome["bad"].append(f"{case}: message {str(said)[:200]!r}")
        except BaseException as unexpected:
            outcome["bad"].append(f"{case}: {type(unexpected).__name__}: {unexpected}")
        seconds = time.process_time() - begin
        if not trace_memory and seconds > MAX_SECONDS:  # a busy machine, or a file that is always slow
            seconds = min(seconds, *(_seconds(read, path, options) for _ in range(3)))
        if trace_memory:
            outcome["largest"] = max(outcome["largest"], tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        else:
            outcome["slowest"] = max(outcome["slowest"], seconds)


def _seconds(read: Any, path: Path, options: dict[str, Any]) -> float:
    begin = time.process_time()
    with contextlib.suppress(ExpertMapError, TraceError):
        read(path, **options)
    return time.process_time() - begin


if __name__ == "__main__":
    np.seterr(all="raise")
    print(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
