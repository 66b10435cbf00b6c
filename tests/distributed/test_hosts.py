# SPDX-License-Identifier: Apache-2.0
"""Ranks on two hosts (network namespaces with their own host names): the hosts are told apart, differences are named at
start-up, and cycles continue after the link between the hosts was cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend_eplb import __version__

from ..hosts import ADDRESSES, Hosts, two_hosts, why_not
from .host_rank import CUT_AT

REASON = why_not()
pytestmark = [pytest.mark.distributed, pytest.mark.skipif(bool(REASON), reason=REASON)]

ROOT = Path(__file__).parents[2]
RANKS, PORT, STEPS = 3, 29600, 300
SETTINGS = {"expert_heat_collection_interval": 10, "algorithm_execution_interval": 1}
SECONDS_WITHOUT_LINK = 2


def run_on_two_hosts(
    folder: Path,
    settings: list[list[dict[str, Any]]],
    meanwhile: Callable[[Hosts], None] = lambda hosts: None,
    other_package: Path = ROOT,
) -> list[dict[str, Any]]:
    """Run three ranks and return their observations: two on the first host, the last on the second host, which has
    ``other_package``."""
    with two_hosts() as hosts:
        processes = []
        for rank in range(RANKS):
            (folder / f"settings{rank}.json").write_text(json.dumps(settings[rank]))
            command = [sys.executable, "-m", "tests.distributed.host_rank"]
            command += [str(argument) for argument in (rank, RANKS, ADDRESSES[0], PORT, folder, STEPS)]
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lan"}
            environment.pop("EPLB_STATS_FILE", None)
            with open(folder / f"log{rank}", "wb") as log:
                processes.append(
                    subprocess.Popen(
                        hosts.command(2 * rank // RANKS, command),
                        cwd=other_package if rank == RANKS - 1 else ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            meanwhile(hosts)
            for rank, process in enumerate(processes):
                assert process.wait(180) == 0, (folder / f"log{rank}").read_text()[-3000:]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(RANKS)]


@dataclass
class CutOff:
    """Observations of a run whose link was cut: of each rank, the step at the cut, and the steps without a link."""

    all_seen: list[dict[str, Any]]
    cut_at: int = 0
    steps_without_link: int = 0


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> CutOff:
    """The second host first has other settings. Then it starts again with equal settings, and the link is cut."""
    folder = tmp_path_factory.mktemp("hosts")
    seen = CutOff([])

    def step() -> int:
        return int((folder / "step0").read_text())

    def cut(hosts: Hosts) -> None:
        end = time.monotonic() + 120
        while not (folder / "held").exists():
            assert time.monotonic() < end, (folder / "log0").read_text()[-3000:]
            time.sleep(0.02)
        hosts.link(1, up=False)
        seen.cut_at = step()
        (folder / "cut").touch()
        time.sleep(SECONDS_WITHOUT_LINK)
        seen.steps_without_link = step() - seen.cut_at
        hosts.link(1, up=True)

    different = {**SETTINGS, "control_lag": 2}
    settings = [[SETTINGS, SETTINGS]] * (RANKS - 1) + [[different, SETTINGS]]
    seen.all_seen = run_on_two_hosts(folder, settings, cut)
    return seen


def test_cycles_continue_after_a_link_was_cut(cut_off: CutOff) -> None:
    """The link is cut while experts are on their way."""
    assert CUT_AT / 2 < cut_off.cut_at < 2 * CUT_AT
    assert cut_off.steps_without_link <= 1  # the link was really cut
    all_seen = cut_off.all_seen
    for seen in all_seen:
        assert seen["nodes"] == [0, 0, 2]
        assert seen["wrong"] == ""
        assert seen["history"] == all_seen[0]["history"]
        assert seen["cycles_failed"] == 0
    digests = [digest for _, digest in all_seen[0]["history"]]
    assert len(set(digests[:100])) > 1
    assert len(set(digests[200:])) > 5  # cycles after the cut
    assert all_seen[0]["cycles_done"] >= 5


def test_host_with_other_settings_is_named(cut_off: CutOff) -> None:
    for seen in cut_off.all_seen:
        (error,) = seen["errors"]
        assert "expert-parallel rank 2 differs from rank 0 in eplb_config.control_lag: 2 against 1" in error


def test_host_with_another_version_is_named(tmp_path: Path) -> None:
    """The second host runs a copy of the package that has another version."""
    copy = tmp_path / "copy"
    for name in ("vllm_ascend_eplb", "tests"):
        shutil.copytree(ROOT / name, copy / name)
    start = copy / "vllm_ascend_eplb" / "__init__.py"
    text = start.read_text(encoding="utf-8")
    assert f'__version__ = "{__version__}"' in text
    start.write_text(text.replace(f'__version__ = "{__version__}"', '__version__ = "9.8.7"'), encoding="utf-8")
    for seen in run_on_two_hosts(tmp_path, [[SETTINGS]] * RANKS, other_package=copy):
        (error,) = seen["errors"]
        assert f"expert-parallel rank 2 differs from rank 0 in package version: 9.8.7 against {__version__}" in error
