# SPDX-License-Identifier: Apache-2.0
"""A server exports weights in the order of the checkpoint, or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from .conftest import BUSY, prompts, run_forked
from .nursery import Nursery
from .offline import environment


def saved_by(nursery: Nursery, mode: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run weights_out.py; returns its result, and the saved tensors by file and name."""
    folder.mkdir()
    result = folder / "result.json"
    eplb = {**BUSY, "mode": mode}
    job = {"eplb": eplb, "folder": str(folder), "result": str(result), "prompts": prompts(4)}
    (folder / "job.json").write_text(json.dumps(job))
    run = run_forked(nursery, "weights_out:main", [str(folder / "job.json")], folder / "log", environment(2))
    assert run.code == 0, run.log[-4000:]
    tensors = {
        f"{path.name} {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return json.loads(result.read_text()), tensors


def test_sharded_state_is_saved_in_checkpoint_order(nursery: Nursery, tmp_path: Path) -> None:
    """The files equal those of a server that moves no expert. Negative control: files with rotated experts differ."""
    expected, wanted = saved_by(nursery, "observe", tmp_path / "observe")
    assert expected["saved"] == ""
    said, tensors = saved_by(nursery, "balance", tmp_path / "balance")
    assert "save_sharded_state reads weights by slot" in said["refused"]
    assert "control restore" in said["refused"]
    assert "state_dict of the model reads weights by slot" in said["refused on one rank"]
    assert said["ranks"] == [0, 1]  # the answers to this call, not to the refused call before
    assert said["files"] == 0
    assert all("named_parameters of the model reads weights by slot" in answer for answer in said["read"])
    assert said["saved"] == ""
    assert said["read_at_last"] == expected["read_at_last"]
    assert tensors.keys() == wanted.keys()
    experts = [name for name in wanted if "w13_weight" in name]
    assert len(experts) == 2 * 6  # ranks, layers
    assert all(tensors[name].equal(wanted[name]) for name in wanted)
    assert not any(tensors[name].roll(1, 0).equal(wanted[name]) for name in experts)
