# SPDX-License-Identifier: Apache-2.0
"""The hashes that the aarch64 tier compares: the inputs can be made, and different plans have different hashes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.aarch64 import plans

pytest.importorskip("torch")  # the benchmarks that make the inputs import it


def test_different_plans_have_different_hashes(tmp_path: Path) -> None:
    plans.write(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        count = sum(name.endswith(".name") for name in arrays.files)
        last = {name: arrays[name] for name in arrays.files if name.startswith(f"{count - 1}.")}
    assert count >= 10
    few = {name.replace(f"{count - 1}.", "0."): array for name, array in last.items()}
    np.savez(tmp_path / "few.npz", **few)
    first = plans.hashes(tmp_path / "few.npz")
    assert [line.split(": ")[1] for line in first] == list(plans.POLICIES)
    assert plans.hashes(tmp_path / "few.npz") == first
    few["0.load"] = few["0.load"][:, ::-1].copy()
    np.savez(tmp_path / "few.npz", **few)
    changed = plans.hashes(tmp_path / "few.npz")
    assert {a.split(": ")[1] for a, b in zip(first, changed, strict=True) if a == b} == {"random"}  # ignores the load
