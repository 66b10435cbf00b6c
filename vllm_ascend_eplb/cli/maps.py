# SPDX-License-Identifier: Apache-2.0
"""``check`` and ``convert``: expert map files."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..files.disk import show
from ..files.expert_map import default_form, read_expert_map, write_expert_map
from ..files.traces import read_trace
from ..values.placement import Placement
from .output import CommandError, JsonOption, console, print_json, show_numbers, table, user_errors, warn


class Form(str, Enum):
    ASCEND = "ascend"
    SGLANG = "sglang"
    ARRAY = "array"
    TRTLLM = "trtllm"
    OMNI = "omni"
    DEEPSEEK = "deepseek"


MapArgument = Annotated[
    Path, typer.Argument(metavar="MAP", help="Map file: vllm-ascend's or SGLang's JSON, .npy, .npz.")
]
RanksOption = Annotated[int | None, typer.Option(min=1, help="Ranks, if the file does not name them.")]
DuplicatesOption = Annotated[bool, typer.Option(help="Accept an expert twice on one device.")]


def layer_numbers(text: str) -> int | list[int]:
    """``3``, a number of leading layers, or ``1,3,5-7``, numbers of layers; ``3,`` is layer 3 alone.

    Raises:
        CommandError: it is neither.
    """
    if text.isascii() and text.isdigit() and len(text) < 6:
        return int(text)
    numbers: list[int] = []
    for part in text.removesuffix(",").split(","):
        ends = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise CommandError(
                f"--dense-layers {show(text)}: give how many leading layers, as 3, or their numbers, as 1,3,5-7"
            )
        numbers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return numbers


DenseOption = Annotated[
    str,
    typer.Option(
        metavar="COUNT|NUMBERS",
        help="Layers without experts in SGLang's form: how many lead (DeepSeek-V3: 3), or their numbers, as 1,3,5-7.",
    ),
]


def check(
    path: MapArgument,
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers of the model.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Logical experts per layer of the model.")] = None,
    ranks: RanksOption = None,
    load: Annotated[Path | None, typer.Option(help="Loads for which to compute the PAR.")] = None,
    dense_layers: DenseOption = "0",
    allow_duplicates: DuplicatesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a map file, and show what is in it."""
    with user_errors(as_json):
        placement = read_expert_map(
            path,
            num_layers=layers,
            num_experts=experts,
            num_ranks=ranks,
            dense_layers=layer_numbers(dense_layers),
            allow_duplicates=allow_duplicates,
        )
        facts = describe(placement)
        if load is not None:
            trace = read_trace(load)
            loaded = trace.of_layers_with_load(placement)
            if (trace.num_layers, trace.num_experts) != (loaded.num_layers, loaded.num_experts):
                raise CommandError(
                    f"{load} is for {trace.num_layers} layers of {trace.num_experts} experts, {path} for "
                    f"{placement.num_layers} of {placement.num_experts}; give loads of the same model"
                )
            par = loaded.par(trace.load.sum(axis=0))
            facts |= {"par_mean": round(float(par.mean()), 4), "par_worst": round(float(par.max()), 4)}
            if trace.skipped:
                facts["layers_without_load"] = show_numbers(trace.skipped)
            warn(trace.remarks)
    if as_json:
        print_json({"path": str(path), "valid": True, **facts})
        return
    rows = table("", "")
    for name, value in facts.items():
        rows.add_row(name.replace("_", " "), str(value))
    console().print(rows)
    console().print(f"{path} is valid", style="green", markup=False)


def convert(
    source: MapArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; .npy and .npz hold an array.")],
    to: Annotated[Form | None, typer.Option(help="Form to write; default: by the ending of OUT.")] = None,
    ranks: RanksOption = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Logical experts per layer of the model.")] = None,
    dense_layers: DenseOption = "0",
    allow_duplicates: DuplicatesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert between the map files of vllm-ascend, SGLang, TensorRT-LLM, OmniPlacement, DeepSeek's EPLB and NumPy."""
    with user_errors(as_json):
        placement = read_expert_map(
            source,
            num_experts=experts,
            num_ranks=ranks,
            dense_layers=layer_numbers(dense_layers),
            allow_duplicates=allow_duplicates,
        )
        form = to.value if to else default_form(target)
        write_expert_map(target, placement, form, dense_layers=layer_numbers(dense_layers))
    if as_json:
        print_json({"path": str(target), "form": form, **describe(placement)})
    else:
        console().print(f"{target}: {placement.num_layers} layers, {placement.num_slots} slots, {form}", markup=False)


def describe(placement: Placement) -> dict[str, int | float | str]:
    """A placement in numbers."""
    count = placement.replica_count
    return {
        "layers": placement.num_layers,
        "experts": placement.num_experts,
        "ranks": placement.num_ranks,
        "slots_per_rank": placement.slots_per_rank,
        "redundant_experts": placement.num_slots - placement.num_experts,
        "most_replicas": int(count.max()),
        "experts_with_one_copy": int((count == 1).sum()),
        "duplicates_on_a_device": placement.num_duplicates,
    }
