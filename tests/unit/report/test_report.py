# SPDX-License-Identifier: Apache-2.0
"""The report: a page that loads nothing, made from real data, partial runs and hostile text."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.images import pixels
from tests.windows import rank_window
from vllm_ascend_eplb import Placement, plan
from vllm_ascend_eplb.cli import app
from vllm_ascend_eplb.files.map_recorder import MapRecorder, load_path
from vllm_ascend_eplb.files.traces import read_trace
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile
from vllm_ascend_eplb.report import make_page
from vllm_ascend_eplb.report.charts import SEQUENTIAL
from vllm_ascend_eplb.simulate.cost import MACHINES, CostModel, model_of_shape
from vllm_ascend_eplb.simulate.replay import grid, simulate
from vllm_ascend_eplb.simulate.result import Conditions, Simulation

TRACE = Path(__file__).resolve().parents[3] / "examples" / "tiny_moe" / "load_trace.npz"
HOSTILE = "</title><script>alert(1)</script>&\"'<img src=http://example.com/x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "img"}


class Reader(html.parser.HTMLParser):
    """Checks that tags close, and keeps the addresses that the page loads and the text that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(address.startswith("data:") for address in reader.loads)
    assert "url(" not in page
    assert "@import" not in page
    return reader


def run_statistics(cycles: int = 6) -> EplbStats:
    """The statistics of a server over the first windows of the recorded trace."""
    trace = read_trace(TRACE).load
    keeper = StatsKeeper("0.1.0", "incremental", "balance")
    placement = start = Placement.initial(6, 64, 8, 8)
    for t in range(cycles):
        keeper.step += 600
        keeper.window_ended(rank_window(placement.rank_load(trace[t]), start.rank_load(trace[t])))
        made = plan(trace[t], placement, 8)
        keeper.planned(made.par_after, made.seconds)
        keeper.waited_for_control(2e-4)
        keeper.committed(3e-4)
        keeper.step_took(11e-4)
        if t == 2:
            keeper.cycle_ended("failed", reason=f"planner died {HOSTILE}")
        elif t == 3:
            keeper.cycle_ended("skipped", reason="gains less than 1.0%")
        else:
            keeper.cycle_ended("done", moved=made.num_moves)
            placement = Placement(made.physical_to_logical, 64, 8)
    return keeper.stats()


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    shape = model_of_shape(6, 64)
    assert shape is not None
    cost = CostModel(MACHINES["a3"], shape, 8, 1, 128.0, 1.0)
    chosen = grid(("none", "incremental", "default"), (1, 4), (8,))
    return simulate(read_trace(TRACE).load[:40], chosen, Conditions(cost), trace="load_trace.npz", version="0.1.0")


def test_page_of_a_run() -> None:
    stats = run_statistics()
    reader = read(make_page(stats, None))
    assert stats.window is not None
    for expected in (
        f"{stats.window.par.mean:.3f}",
        f"{stats.window.par_start.mean:.3f}",
        "4cycles done; 1 skipped, 1 failed",
        "PAR over time",
        "Experts moved per cycle",
        "Rank load, with the placement in force",
        "Stalls",
        "1.10 ms",
        "gains less than 1.0%",
        "planner died </title><script>",  # as text
    ):
        assert expected in reader.text
    assert reader.tags.count("svg") == 3
    assert reader.tags.count("img") == 4  # two heat maps, two scales


def test_page_of_an_observed_run() -> None:
    trace = read_trace(TRACE).load
    keeper = StatsKeeper("0.1.0", "incremental", "observe")
    start = Placement.initial(6, 64, 8, 8)
    planned, would, was = None, [], []
    for t in range(4):
        keeper.window_ended(
            rank_window(
                start.rank_load(trace[t]), start.rank_load(trace[t]), planned.rank_load(trace[t]) if planned else None
            )
        )
        if planned is not None:
            would.append(planned.par(trace[t]).mean())
            was.append(start.par(trace[t]).mean())
        made = plan(trace[t], start, 8)
        planned = Placement(made.physical_to_logical, 64, 8)
        keeper.planned(made.par_after, made.seconds, made.num_moves)
        keeper.cycle_ended("skipped", reason="observing only")
    stats = keeper.stats()
    assert [cycle.par_observed is not None for cycle in stats.cycles] == [True, True, True, False]
    reader = read(make_page(stats, None))
    for expected in (
        f"{np.mean(would):.3f}PAR, mean of layers, with each plan in the window after it",
        f"{np.mean(was):.3f} as it was",
        f"{1 - np.mean(would) / np.mean(was):.1%}of the experts' time would be saved",
        "no expert was moved",
        "Rank load, with the plan of the window before",
    ):
        assert expected in reader.text
    stats = StatsKeeper("0.1.0", "incremental", "observe").stats()
    assert "No plan has been measured yet" in read(make_page(stats, None)).text


def test_page_of_a_run_tells_the_95th_percentile() -> None:
    """Only a page with plans from several windows has the column."""
    for percentiles in ((), ([1.5, 1.7], [1.2, 1.0])):
        keeper = StatsKeeper("0.1.0", "incremental", "balance")
        keeper.window_ended(rank_window([[30.0, 10.0], [20.0, 20.0]], [[30.0, 10.0], [20.0, 20.0]]))
        keeper.planned([1.1, 1.0], 0.25, 3, *percentiles)
        keeper.cycle_ended("done", moved=3)
        text = read(make_page(keeper.stats(), None)).text
        for expected in ("95th percentile before", "1.600 (1.70)", "1.100 (1.20)"):
            assert (expected in text) is bool(percentiles)


def test_page_of_a_simulation(simulation: Simulation) -> None:
    reader = read(make_page(None, simulation))
    best = simulation.best
    assert best is not None
    for expected in (
        best.setting.describe(),
        f"{best.mean_par:.3f}",
        "Load per layer and expert",
        "Replicas per expert",
        "Net saving by setting",
        "A model, not a measurement",
        "arXiv 2506.12708",
        json.dumps({"eplb_config": simulation.eplb_config()}),
    ):
        assert expected in reader.text
    assert reader.tags.count("svg") == 4
    assert reader.tags.count("img") == 8


def test_cells_of_tables_know_the_head_of_their_column(simulation: Simulation) -> None:
    """A phone shows each row as a card, with the head before every cell."""
    wide = "".join(re.findall(r'<div class="wide">.*?</div>', make_page(run_statistics(), simulation), re.DOTALL))
    cells, labelled = wide.count("<td"), re.findall(r'<td(?: class=words)? data-head="([^"]*)">', wide)
    assert len(labelled) == cells > 50
    assert {"setting", "PAR", "cycle", "reason"} <= set(labelled)


def test_page_of_both_names_both(simulation: Simulation) -> None:
    reader = read(make_page(run_statistics(), simulation, HOSTILE))
    assert reader.text.count(HOSTILE) == 3  # title, heading, reason of the failed cycle
    assert "The run" in reader.text
    assert "The simulation" in reader.text


def test_page_of_an_interrupted_run(simulation: Simulation) -> None:
    nothing_yet = read(make_page(StatsKeeper("", "", "").stats(), None))
    assert "No collection window has ended yet" in nothing_yet.text
    keeper = StatsKeeper("0.1.0", "default", "observe")
    keeper.window_ended(rank_window([[0.0, 0.0]], [[0.0, 0.0]]))
    keeper.cycle_ended("failed", reason="cut off")
    keeper.switched_off("too many failures " + HOSTILE)
    off = read(make_page(keeper.stats(), None))
    assert "Balancing was switched off: too many failures" in off.text
    assert "no expert was moved" in off.text
    nothing_tried = simulation.model_copy(update={"outcomes": (), "interrupted": True, "replicas": ()})
    assert "not all settings were tried" in read(make_page(None, nothing_tried)).text
    one_window = simulation.model_copy(update={"baseline_par_mean": (), "expert_load": (), "rank_load_before": ()})
    read(make_page(None, one_window))


def test_tables_of_ragged_rows_are_left_out(simulation: Simulation) -> None:
    ragged = simulation.model_copy(update={"expert_load": ((1.0, 2.0), (1.0,))})
    assert "Load per layer and expert" not in read(make_page(None, ragged)).text


def test_page_of_a_recorded_map(tmp_path: Path) -> None:
    """The page shows the map and the load of the last windows, as MapRecorder wrote them."""
    trace = read_trace(TRACE).load[:5].astype(np.int64)
    placement = Placement(plan(trace[-1], Placement.initial(6, 64, 8, 8), 8).physical_to_logical, 64, 8)
    recorder = MapRecorder(tmp_path / "map.json")
    for window in trace:
        recorder.record(placement, window)
    recorder.close()
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "map.json"), "-o", str(page), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["map"]
    text = page.read_text()
    reader = read(text)
    assert "6 MoE layers of 64 experts on 8 ranks, 8 redundant experts per layer" in reader.text
    assert f"this placement, window 4: {placement.par(trace[4]).mean():.3f}" in text
    assert "Replicas per expert" in reader.text
    image = pixels(re.findall(r'src="(data:[^"]*)" alt="load', text)[0])
    assert image.shape == (6, 64, 3)
    hottest = np.unravel_index(np.argmax(trace.sum(axis=0) / trace.sum(axis=(0, 2))[:, None]), (6, 64))
    assert tuple(image[hottest]) == SEQUENTIAL[-1][1]
    load_path(tmp_path / "map.json").unlink()
    again = CliRunner().invoke(app, ["report", str(tmp_path / "map.json"), "-o", str(page)])
    assert again.exit_code == 0
    assert "There is no load of this map beside it" in read(page.read_text()).text
    twice = CliRunner().invoke(app, ["report", *[str(tmp_path / "map.json")] * 2, "-o", str(page)])
    assert "is a second map; give one of each kind" in twice.stderr


def test_report_command_writes_a_page_or_one_error_line(tmp_path: Path, simulation: Simulation) -> None:
    run, sim, page = tmp_path / "run.json", tmp_path / "sim.json", tmp_path / "page.html"
    StatsFile(run).write(run_statistics())
    sim.write_text(simulation.to_json())
    call = CliRunner().invoke
    result = call(app, ["report", str(run), str(sim), "-o", str(page), "--json"])
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["run"]
    assert said["simulation"]
    assert said["bytes"] == page.stat().st_size
    read(page.read_text())
    (tmp_path / "other.json").write_text('{"hello": 1}')
    (tmp_path / "cut.json").write_text(simulation.to_json()[:500])
    for arguments, message in (
        ([run, run], "second statistics file"),
        ([sim, sim], "second simulation"),
        ([tmp_path / "none"], "does not exist"),
        ([tmp_path], "is a directory"),
        ([tmp_path / "other.json"], "neither statistics of a run nor a map nor a simulation"),
        ([tmp_path / "cut.json"], "not a simulation: "),
        ([run, "-o", tmp_path], "is a directory"),
        ([run, "-o", tmp_path / "no" / "page.html"], "create it first"),
    ):
        result = call(app, ["report", *map(str, arguments)])
        assert result.exit_code == 2, arguments
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


# --- a real browser --------------------------------------------------------------------------------------------------


def console_of(page: Path, tmp_path: Path) -> tuple[list[str], str]:
    """(lines on the console, the document as rendered) of a page in headless Chromium."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0"]
    command += ["--window-size=390,4000", f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package chromium)")
def test_report_in_chromium_writes_nothing_to_the_console(tmp_path: Path, simulation: Simulation) -> None:
    page = tmp_path / "page.html"
    page.write_text(make_page(run_statistics(), simulation, HOSTILE), encoding="utf-8")
    console, document = console_of(page, tmp_path)
    assert console == []
    assert "Load per layer and expert" in document
    # the control: the console shows a request that the page's policy forbids
    bad = page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x"></body>')
    page.write_text(bad)
    console, _ = console_of(page, tmp_path)
    assert any("Content Security Policy" in line for line in console)
