# SPDX-License-Identifier: Apache-2.0
"""Malformed map files of every form: each gives one clear error, in bounded CPU time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.files.map_fuzz import FORMS, MAX_BYTES, MAX_SECONDS

pytest.importorskip("torch")
pytest.importorskip("yaml")
ROOT = Path(__file__).parents[3]


def run(count: int, seed: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.files.map_fuzz", str(count), str(seed)],
        capture_output=True, text=True, cwd=ROOT, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]  # torch's native reader could crash
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.parametrize(("count", "seed"), [(360, 1), pytest.param(10_000, 2, marks=pytest.mark.soak)])
def test_malformed_maps_end_in_one_clear_error(count: int, seed: int) -> None:
    """Every file is read as a map and as loads. CPU time and memory are bounded for a file of a few kB, and the memory
    of the process must not grow with the number of files."""
    outcome = run(count, seed)
    assert outcome["bad"] == []
    assert outcome["files"] == count
    assert set(outcome["by"]) == {*FORMS, "dump.pt", "records.pt"}
    assert min(outcome["by"].values()) >= count // 13
    assert outcome["refused"] > 1.5 * count  # most damage is detected; some files stay valid
    assert outcome["read"] > 0
    assert outcome["slowest"] < MAX_SECONDS
    assert outcome["largest"] < MAX_BYTES
    assert outcome["grown_mb"] < 200


def test_fuzz_finds_an_error_of_another_kind() -> None:
    """Negative control: a reader that raises an error of another class is found."""
    program = (
        "import json\nfrom tests.unit.files import map_fuzz\nfrom vllm_ascend_eplb.files import expert_map\n"
        "def broken(data, path): raise KeyError('planted')\n"
        "real = expert_map.parse_npy\n"
        "def read(path, **options):\n"
        "    expert_map.parse_npy = broken if 'bad-' in str(path) else real\n"
        "    return expert_map.read_expert_map(path, **options)\n"
        "map_fuzz.read_expert_map = read\nprint(json.dumps(map_fuzz.fuzz(60, 1)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300, check=True
    )
    assert any("planted" in line for line in json.loads(done.stdout.splitlines()[-1])["bad"])
