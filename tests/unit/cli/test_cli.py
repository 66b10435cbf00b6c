# SPDX-License-Identifier: Apache-2.0
"""The commands on recorded data and on bad input: exit status, output, and one line per error."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from typer.testing import CliRunner

from tests.windows import rank_window
from vllm_ascend_eplb import Placement, __version__
from vllm_ascend_eplb.cli import app
from vllm_ascend_eplb.cli.output import CommandError
from vllm_ascend_eplb.cli.watch import metrics_url, parse, sparkline
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.prometheus import EplbGauges
from vllm_ascend_eplb.simulate.result import Simulation

TRACE = str(Path(__file__).resolve().parents[3] / "examples" / "tiny_moe" / "load_trace.npz")


def run(*arguments: object, status: int = 0) -> str:
    """Run a command that must end with ``status`` and return standard output; for an error, its one line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    if status == 2 and "--json" not in arguments:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr
    return result.stdout


def run_json(*arguments: object, status: int = 0) -> Any:
    out = run(*arguments, "--json", status=status)
    assert out.count("\n") == 1
    return json.loads(out)


def test_help_names_every_command() -> None:
    out = run("--help")
    for command in ("doctor", "plan", "simulate", "report", "watch", "control", "convert", "check"):
        assert command in out
        assert "--json" in run(command, "--help")
    assert run("--version").strip() == __version__


# --- plan, check, convert --------------------------------------------------------------------------------------------


def test_plan_writes_a_map_that_balances(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    said = run_json("plan", TRACE, "--ranks", 8, "--nodes", 2, "--redundant", 8, "-o", path, "--effort", "fast")
    load = np.load(TRACE)["loads"].sum(axis=0)
    before, after = Placement.initial(6, 64, 8, 8), read_expert_map(path, num_layers=6, num_experts=64, num_ranks=8)
    assert said["par_before"]["mean"] == pytest.approx(before.par(load).mean())
    assert said["par_after"]["mean"] == pytest.approx(after.par(load).mean())
    assert after.par(load).mean() < 1.03 < before.par(load).mean()
    assert "1.0" in run("plan", TRACE, "--ranks", 8, "--redundant", 8, "--effort", "fast")


def test_plan_from_the_last_windows_and_from_a_map(tmp_path: Path) -> None:
    cold, two = tmp_path / "one.json", tmp_path / "two.json"
    run("plan", TRACE, "--ranks", 8, "--redundant", 8, "-o", cold, "--effort", "fast", "--last", 1)
    last = np.load(TRACE)["loads"][-1]
    assert read_expert_map(cold).par(last).max() < 1.05
    again = run_json(
        "plan", TRACE, "--ranks", 8, "--redundant", 8, "-o", two, "--effort", "fast", "--last", 1, "--start", cold
    )
    assert again["moves"] == 0
    assert cold.read_bytes() == two.read_bytes()
    message = run("plan", TRACE, "--ranks", 8, "--redundant", 16, "--start", cold, status=2)
    assert "8 redundant experts, --redundant is 16" in message


def test_plan_with_deepseeks_algorithm(tmp_path: Path) -> None:
    said = run_json("plan", TRACE, "--ranks", 8, "--redundant", 8, "--policy", "default", "-o", tmp_path / "m.npz")
    assert said["par_after"]["mean"] < 1.05
    read_expert_map(tmp_path / "m.npz", num_layers=6, num_experts=64, num_ranks=8, allow_duplicates=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.npz", "--ranks", 8], "does not exist"),
        ([TRACE, "--ranks", 7], "cannot be shared evenly by 7 ranks"),
        ([TRACE, "--ranks", 8, "--redundant", 10**6], "allowed are 0..448"),
        ([TRACE, "--ranks", 8, "--nodes", 3], "num_nodes is 3"),
        ([TRACE, "--ranks", 8, "-o", "no/such/folder/map.json"], "does not exist; create it"),
    ],
)
def test_plan_refuses_bad_arguments(arguments: list[object], message: str) -> None:
    assert message in run("plan", *arguments, status=2)
    assert message in run_json("plan", *arguments, status=2)["error"]


def test_check_and_convert_keep_the_placement(tmp_path: Path) -> None:
    maps = {name: tmp_path / name for name in ("a.json", "b.json", "c.npy", "d.npz", "e.json")}
    run("plan", TRACE, "--ranks", 4, "--redundant", 4, "-o", maps["a.json"], "--effort", "fast")
    facts = run_json("check", maps["a.json"], "--load", TRACE, "--layers", 6, "--experts", 64, "--ranks", 4)
    assert facts["valid"]
    assert (facts["layers"], facts["experts"], facts["ranks"], facts["slots_per_rank"]) == (6, 64, 4, 17)
    assert facts["par_mean"] < 1.05
    assert "is valid" in run("check", maps["a.json"])
    run("convert", maps["a.json"], maps["b.json"], "--to", "sglang", "--dense-layers", 1)
    assert len(json.loads(maps["b.json"].read_text())["physical_to_logical_map"]) == 7
    run("convert", maps["b.json"], maps["c.npy"], "--ranks", 4, "--dense-layers", 1)
    run("convert", maps["c.npy"], maps["d.npz"], "--ranks", 4)
    said = run_json("convert", maps["d.npz"], maps["e.json"])
    assert said["form"] == "ascend"
    assert maps["e.json"].read_bytes() == maps["a.json"].read_bytes()


def test_check_names_the_fault(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps([[0, 1, 1, 2], [0, 0, 1, 2]]))
    assert "layer 1, device 0 holds expert 0 twice" in run("check", path, "--ranks", 2, status=2)
    assert run_json("check", path, "--ranks", 2, "--allow-duplicates")["duplicates_on_a_device"] == 1
    path.write_text('{"moe_layer_count": 1, "layer_list": [')
    assert "is not JSON" in run_json("check", path, status=2)["error"]
    assert "for 2 of 3; give loads of the same model" in (
        path.write_text("[[0, 1, 1, 2], [0, 2, 1, 2]]") and run("check", path, "--ranks", 2, "--load", TRACE, status=2)
    )


# --- simulate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_trace(tmp_path: Path) -> Path:
    np.savez_compressed(tmp_path / "trace.npz", loads=np.load(TRACE)["loads"][:16])
    return tmp_path / "trace.npz"


def test_simulate_compares_settings(short_trace: Path, tmp_path: Path) -> None:
    kept = tmp_path / "sim.json"
    arguments = ("simulate", short_trace, "--ranks", 8, "--intervals", "1,4", "--redundant", "0,8", "-o", kept)
    said = run_json(*arguments)
    assert len(said["outcomes"]) == 2 + 2 * 2 * 2
    assert said["eplb_config"]["dynamic_eplb"] is True
    assert said["refused"] is None
    assert Simulation.from_json(kept.read_bytes()).num_windows == 16
    text = run(*arguments)
    assert "best (fewest bytes" in text
    assert "arXiv 2506.12708" in text
    assert "not measurement" in " ".join(text.split())


def test_simulate_asks_for_the_shape_of_an_unknown_model(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).poisson(100, (4, 3, 8)))
    assert "give --hidden, --width" in run("simulate", tmp_path / "t.npy", "--ranks", 4, status=2)
    shape = ("--hidden", 64, "--width", 32, "--top-k", 2)
    said = run_json("simulate", tmp_path / "t.npy", "--ranks", 4, "--intervals", 1, *shape, "--weight-bytes", 2)
    assert said["expert_bytes"] == 3 * 64 * 32 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "abacus"], "allowed are a2, a3, cloudmatrix384, h200"),
        (["--policies", "magic"], "allowed are none, incremental"),
        (["--intervals", "0"], "whole numbers from 1"),
        (["--intervals", ""], "--intervals is empty"),
        (["--intervals", "16"], "allows 1..15"),
        (["--redundant", "-8"], "whole numbers from 0"),
        (["--redundant", "7"], "7 redundant experts on 8 ranks"),
        (["--shares", "maybe"], "allowed are off, on"),
        (["--nodes", "3"], "give a divisor of 8"),
        (["--max-moves", "few"], "whole numbers"),
    ],
)
def test_simulate_refuses_bad_arguments(short_trace: Path, arguments: list[str], message: str) -> None:
    assert message in run("simulate", short_trace, "--ranks", 8, *arguments, status=2)


def test_simulate_can_be_interrupted(short_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C, the file and the output have the settings that were replayed to the end."""
    import vllm_ascend_eplb.cli.simulate as module

    @contextlib.contextmanager
    def interrupted_in_the_second(total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
        def tick(done: int, total: int) -> None:
            if done == 20:
                signal.raise_signal(signal.SIGINT)

        yield tick

    monkeypatch.setattr(module, "progress", interrupted_in_the_second)
    kept = tmp_path / "sim.json"
    arguments = ("simulate", short_trace, "--ranks", 8, "--policies", "none,default", "--intervals", 1, "-o", kept)
    text = run(*arguments, status=130)
    assert "interrupted" in text
    assert "does not pay" not in text  # not all settings were tried
    simulation = Simulation.from_json(kept.read_bytes())
    assert simulation.interrupted
    assert [outcome.policy for outcome in simulation.outcomes] == ["none"]
    assert run_json(*arguments, status=130)["interrupted"] is True
    run("report", kept, "-o", tmp_path / "report.html")
    assert "The simulation was interrupted" in (tmp_path / "report.html").read_text()


# --- watch -----------------------------------------------------------------------------------------------------------


def metrics_page() -> bytes:
    registry = CollectorRegistry()
    keeper = StatsKeeper("1.2", "incremental", "balance")
    keeper.step = 1234
    keeper.window_ended(rank_window([[3, 1], [2, 2]], [[4, 0], [1, 3]]))
    keeper.planned([1.01, 1.0], 0.02)
    keeper.cycle_ended("done", moved=7)
    keeper.step_took(0.0021)
    EplbGauges(registry).show(keeper.stats())
    return b'vllm:num_requests_running{engine="0"} 3.0\n' + generate_latest(registry)


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    answer: dict[str, Any] = {"page": metrics_page(), "status": 200, "headers": {}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"] if self.path == "/metrics" else 404)
            for key, value in answer["headers"].items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(answer["page"])

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", answer
    made.shutdown()
    made.server_close()


def test_watch_once_shows_the_metrics(server: tuple[str, dict[str, Any]]) -> None:
    url, _ = server
    said = run_json("watch", url, "--once")
    assert said["phase"] == "collect"
    assert (said["steps"], said["experts_moved"], said["cycles.done"]) == (1234, 7, 1)
    assert said["par_window.mean"] == pytest.approx(1.25)
    assert said["policy"] == "incremental"
    text = run("watch", url + "/", "--once")
    for expected in ("1,234", "1.250", "1.500", "2.10 ms", "incremental", "1 / 0 / 0"):
        assert expected in text


def test_watch_names_the_reason_of_a_failure(server: tuple[str, dict[str, Any]]) -> None:
    url, answer = server
    answer["page"] = b"vllm:num_requests_running 3.0\n"
    assert "has no metrics vllm_eplb_" in run("watch", url, "--once", status=2)
    answer["page"] = b"vllm_eplb_steps{ 3\n"
    assert "not a metrics page" in run("watch", url, "--once", status=2)
    answer["page"] = os.urandom(1000)
    assert "has no metrics" in run("watch", url, "--once", status=2)
    answer["status"] = 503
    assert "answers 503" in run("watch", url, "--once", status=2)
    answer |= {"status": 302, "headers": {"Location": "file:///etc/passwd"}}
    assert "answers 302" in run("watch", url, "--once", status=2)
    assert "cannot be reached" in run("watch", "http://127.0.0.1:9", "--once", "--timeout", "2", status=2)
    for bad in ("ftp://host", "http://", "http://host:port", "http://[::1"):
        assert "not an address" in run("watch", bad, "--once", status=2)


def test_watch_completes_addresses() -> None:
    assert metrics_url("localhost:8000") == "http://localhost:8000/metrics"
    assert metrics_url("https://h/base/") == "https://h/base/metrics"
    assert metrics_url("http://h:1/metrics") == "http://h:1/metrics"


def test_watch_continues_through_a_restart(server: tuple[str, dict[str, Any]]) -> None:
    """The server fails for a while and comes back; ``watch`` continues, and Ctrl-C ends it with status 130."""
    url, answer = server
    command = [sys.executable, "-m", "vllm_ascend_eplb.cli", "watch", url, "--json", "--interval", "0.1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert "steps" in json.loads(process.stdout.readline())
        answer["status"] = 500
        line = {"steps": 1}
        while "error" not in line:
            line = json.loads(process.stdout.readline())
        answer["status"] = 200
        while "error" in line:
            line = json.loads(process.stdout.readline())
        assert line["steps"] == 1234
        os.kill(process.pid, signal.SIGINT)
        process.wait(timeout=30)
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()


def test_watch_parses_metrics_and_draws_a_line() -> None:
    assert parse("") == {}
    assert parse("vllm_eplb_steps NaN\nvllm_eplb_cycles +Inf\n") == {}
    with pytest.raises(CommandError, match="not a metrics page"):
        parse('vllm_eplb_steps{a="b} 1')
    line = sparkline([1.0, 1.5, 2.0])
    assert len(line) == 3
    assert line[0] < line[1] < line[2]


def test_commands_start_without_torch_and_vllm() -> None:
    code = "import sys, vllm_ascend_eplb.cli; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
