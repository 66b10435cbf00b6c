# SPDX-License-Identifier: Apache-2.0
"""Errors of the cost model of ``simulate`` and ``doctor`` against measured layers.

``python -m benchmarks.cost_model CASES FOLDER``: CASES is the .npz of one run of ``virtual_ep time``, FOLDER has its
output. The model gets the expected pairs of each slot, which a planner also knows. Its time is compared with the mean
of the drawn steps. The measured times have no collectives, so the model's links have infinite bandwidth.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.virtual_ep import read_rows
from benchmarks.virtual_ep_cases import read_cases
from vllm_ascend_eplb.simulate.cost import MACHINES, CostModel, MoeShape


def errors(cases_path: Path, folder: Path, machine: str) -> dict[str, list[float]]:
    """Relative errors of the cases of each scenario; of the first of them where the run was cut off.

    Raises:
        ValueError: the two are not of one run.
    """
    scenarios, cases = read_cases(cases_path)
    rows = iter(read_rows(folder / "virtual_ep.csv"))
    endless = replace(MACHINES[machine], link=1e30, link_between=1e30)
    models = {}
    for scenario in scenarios:
        shape = MoeShape(
            scenario["shape"]["model"],
            1,
            *(scenario["shape"][name] for name in ("experts", "top_k", "hidden", "width")),
        )
        name = f"{shape.name} EP{scenario['ranks']}"
        models[name] = CostModel(endless, shape, scenario["ranks"], 1, 1.0, 2.0)
    found: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        steps = [row for row in (next(rows, None) for _ in case.counts[1:]) if row is not None]
        if not steps:
            break
        if any(
            (row["scenario"], row["tokens"], row["mode"]) != (case.scenario, case.tokens, case.mode) for row in steps
        ):
            raise ValueError(f"{folder} and {cases_path} are not of one run: rows and cases differ")
        if case.mode in ("grid", "perfect"):
            continue
        model = replace(models[case.scenario], batch=float(case.tokens))
        predicted = 1e3 * float(model.layer_seconds(case.counts[0].reshape(1, -1))[0])
        found[case.scenario].append(predicted / float(np.mean([row["ms"] for row in steps])) - 1.0)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", default="h200", choices=MACHINES)
    arguments = parser.parse_args()
    found = errors(arguments.cases, arguments.folder, arguments.machine)
    found["all"] = [error for errors_of_scenario in found.values() for error in errors_of_scenario]
    for name, values in found.items():
        off = np.abs(values)
        print(f"{name}, {len(off)} cases: median error {np.median(off):.1%}, nine in ten within "
              f"{np.quantile(off, 0.9):.1%}, worst {off.max():.1%}, mean {np.mean(values):+.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
