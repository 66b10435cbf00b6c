# SPDX-License-Identifier: Apache-2.0
"""Primaries: the only slots that a step of few tokens would use, so that it reads no redundant slot.

Every rank has the same number of primaries. The primaries are balanced first, and then the redundant slots are filled.
Choosing the primaries afterwards, in a placement that was made without them, does not work: nearly all copies are
needed to give every rank E/R primaries, so nothing is left to choose. PAR of the primaries alone was then 1.5 at EP32
and 2.0 at EP64, and the copies that had to be added were 38 % and 32 % of the plan's moves.

``python -m benchmarks.primaries FOLDER`` prints the gain for a decode step, from the CSVs of ``virtual_ep`` (cases made
with ``--primaries``) and ``decode_step``. A step has all layers of a model, with the expert products of the slowest
rank in each layer, and the work beside the experts. It has no collectives. Gains are relative to this package's
placement with all slots and without primaries. The error is that of the mean over layers.

Words as in the package: L layers, E logical experts, R ranks, S slots per rank, P = R * S.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def with_redundant(primaries: IntArray, ranks: int, load: FloatArray, more: int) -> IntArray:
    """int64 [L, P + R * more]: a placement whose ranks hold their slots of ``primaries`` [L, P] first, then ``more``
    redundant slots. Each copy is the one that leaves the least sum of squared rank loads.

    Args:
        load: [L, E].
    """
    return np.stack(
        [_fill(row.reshape(ranks, -1), weights, more) for row, weights in zip(primaries, load, strict=True)]
    )


def _fill(slots: IntArray, load: FloatArray, more: int) -> IntArray:
    ranks, experts = len(slots), len(load)
    holds = np.zeros((ranks, experts), dtype=bool)
    holds[np.arange(ranks)[:, None], slots] = True
    count = holds.sum(axis=0)
    added: list[list[int]] = [[] for _ in range(ranks)]
    free = np.full(ranks, more)
    while free.any():
        share = load / count
        weight = holds @ share
        # A copy of e on q takes share/(count+1) from every holder of e and gives q that much times count.
        less = share / (count + 1)
        gain = less * (2.0 * (weight @ holds) - count * less)  # [E]: off the squares of those that hold it
        given = less * count
        cost = given[None, :] * (2.0 * weight[:, None] + given[None, :])
        score = np.where(holds | (free == 0)[:, None], -np.inf, gain[None, :] - cost)
        rank, expert = np.unravel_index(int(np.argmax(score)), score.shape)
        holds[rank, expert] = True
        count[expert] += 1
        free[rank] -= 1
        added[rank].append(int(expert))
    return np.concatenate([slots, np.array(added, dtype=np.int64)], axis=1).ravel()


def report(folder: Path) -> None:
    """Prints, by scenario and tokens per rank, ms of a layer in each way, and the gain in a decode step.

    Raises:
        OSError, KeyError: a file is missing, or is another one.
    """
    from benchmarks.decode_step import MODELS

    layers_of = {model.model: model.layers for model in MODELS}
    by_way: dict[tuple[str, int], dict[str, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
    active: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    with (folder / "virtual_ep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    least = {row["scenario"]: min(int(r["slots"]) for r in rows if r["scenario"] == row["scenario"]) for row in rows}
    for row in rows:
        way = row["mode"] if row["mode"] != "ours" or int(row["slots"]) > least[row["scenario"]] else "no redundant"
        key, steps = (row["scenario"], int(row["tokens"])), by_way[row["scenario"], int(row["tokens"])][way]
        steps[int(row["layer"]), sum(layer == int(row["layer"]) for layer, _ in steps)] = float(row["ms"])
        active[(*key, way)].append(int(row["active"]))
    with (folder / "decode_step.csv").open(newline="") as file:
        beside = {(row["model"], int(row["tokens"]), int(row["context"])): row for row in csv.DictReader(file)}
    contexts = sorted({context for _, _, context in beside})
    head = ["scenario", "tokens", "no redundant", "ours, all slots", "with primaries, all slots", "alone", "slots read"]
    head += ["off MoE time of ours", *(f"off a step of ours, context {context:,}" for context in contexts)]
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for (scenario, tokens), ways in sorted(by_way.items()):
        if not {"no redundant", "ours", "all slots", "primaries alone"} <= ways.keys():
            continue
        layers: dict[int, list[float]] = defaultdict(list)  # draws of a layer have its load in common
        for key in ways["ours"].keys() & ways["primaries alone"].keys():
            layers[key[0]].append(ways["ours"][key] - ways["primaries alone"][key])
        off = [statistics.fmean(draws) for draws in layers.values()]
        mean = {way: statistics.fmean(ms.values()) for way, ms in ways.items()}
        spread = statistics.stdev(off) / len(off) ** 0.5 / mean["ours"] if len(off) > 1 else float("nan")
        saved = statistics.fmean(off) / mean["ours"]
        model = scenario.rsplit(" ", 1)[0]
        cells = []
        for context in contexts:
            found = beside.get((model, tokens, context))
            if found is None:
                cells.append("")
                continue
            rest = layers_of[model] * (float(found["layer_ms"]) + float(found["attention_ms"]))
            experts = layers_of[model] * mean["ours"]
            share = experts / (experts + rest + float(found["once_ms"]))
            cells.append(f"{saved * share:+.1%} (MoE {share:.0%})")
        read = " / ".join(
            f"{statistics.fmean(active[scenario, tokens, way]):.1f}" for way in ("ours", "primaries alone")
        )
        ms = " | ".join(f"{mean[way]:.3f}" for way in ("no redundant", "ours", "all slots", "primaries alone"))
        print(f"| {scenario} | {tokens} | {ms} | {read} | {saved:+.1%} ± {spread:.1%} | " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    report(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
