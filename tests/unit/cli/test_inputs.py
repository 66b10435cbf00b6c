# SPDX-License-Identifier: Apache-2.0
"""Input from users: unusual environments, files of other tools, settings with small mistakes.

Cases: the command that opens an address (``watch``), the commands that open files (all others), and ``doctor``, whose
finding about plugins must be vLLM's own.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import vllm_ascend_eplb.cli.doctor as doctor
from tests.unit.cli.test_cli import TRACE, run, run_json, server  # noqa: F401  # a fixture
from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.cli.app import app
from vllm_ascend_eplb.cli.output import show_numbers
from vllm_ascend_eplb.cli.plan import plan
from vllm_ascend_eplb.cli.simulate import simulate
from vllm_ascend_eplb.cli.watch import is_this_machine, proxy_for
from vllm_ascend_eplb.files.expert_map import read_expert_map
from vllm_ascend_eplb.planning.options import PlanOptions
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.simulate.result import Conditions
from vllm_ascend_eplb.values.defaults import EFFORT, QUICK_EFFORT


def output_of(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())  # lines are wrapped


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gappy(tmp_path: Path) -> Path:
    """The example's trace with its six layers at 1, 2, 4, 5, 6 and 8 of 10 layers."""
    load = np.load(TRACE)["loads"][:8].astype(float)
    whole = np.zeros((len(load), 10, load.shape[2]))
    whole[:, [1, 2, 4, 5, 6, 8]] = load
    np.save(tmp_path / "gappy.npy", whole)
    np.save(tmp_path / "plain.npy", load)
    return tmp_path / "gappy.npy"


def test_layers_without_load_are_named_and_keep_numbers(gappy: Path, tmp_path: Path) -> None:
    arguments = ("--ranks", 8, "--redundant", 8, "--effort", "fast")
    said = run_json("plan", gappy, *arguments, "-o", tmp_path / "a.json")
    plain = run_json("plan", tmp_path / "plain.npy", *arguments)
    assert (said["layers"], said["layers_without_load"], said["numbers_without_load"]) == (6, 4, [0, 3, 7, 9])
    assert said["par_after"] == plain["par_after"]
    assert said["par_before"] == plain["par_before"]
    assert "are left out: 0, 3, 7, 9" in output_of("plan", gappy, *arguments)
    left = read_expert_map(tmp_path / "a.json", num_layers=6)
    run("plan", gappy, *arguments, "-o", tmp_path / "b.yaml")
    lines = (tmp_path / "b.yaml").read_text().splitlines()
    assert [int(line.split(":")[0]) for line in lines if line.startswith("  ")] == [1, 2, 4, 5, 6, 8]
    run("plan", gappy, *arguments, "-o", tmp_path / "c.json", "--form", "sglang")
    rows = json.loads((tmp_path / "c.json").read_text())["physical_to_logical_map"]
    assert [rows[number] for number in (1, 2, 4, 5, 6, 8)] == left.physical_to_logical.tolist()


def test_map_keeps_all_layers_if_asked(gappy: Path, tmp_path: Path) -> None:
    arguments = ("--ranks", 8, "--redundant", 8, "--effort", "fast")
    run("plan", gappy, *arguments, "-o", tmp_path / "part.json")
    said = output_of("plan", gappy, *arguments, "--all-layers", "-o", tmp_path / "all.json")
    assert "stay as they start: 0, 3, 7, 9" in said
    part, whole = (read_expert_map(tmp_path / name) for name in ("part.json", "all.json"))
    start = Placement.initial(10, 64, 8, 8).physical_to_logical
    assert (whole.physical_to_logical[[0, 3, 7, 9]] == start[[0, 3, 7, 9]]).all()
    assert (whole.physical_to_logical[[1, 2, 4, 5, 6, 8]] == part.physical_to_logical).all()
    run("plan", gappy, *arguments, "--start", tmp_path / "all.json", "-o", tmp_path / "again.json")
    assert read_expert_map(tmp_path / "again.json").num_layers == 10
    checked = run_json("check", tmp_path / "all.json", "--load", gappy)
    assert checked["layers_without_load"] == "0, 3, 7, 9"
    assert (
        checked["par_mean"] == run_json("check", tmp_path / "part.json", "--load", tmp_path / "plain.npy")["par_mean"]
    )


def test_numbers_are_shown_as_ranges() -> None:
    assert show_numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert show_numbers([]) == ""


def test_counts_of_one_rank_are_warned_of(tmp_path: Path) -> None:
    load = np.zeros((2, 4, 64))
    load[:, :, :16] = 100
    np.save(tmp_path / "a.npy", load)
    arguments = ["plan", str(tmp_path / "a.npy"), "--ranks", "4", "--effort", "fast"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0
    assert said.stderr.count("\n") == 1
    assert said.stderr.startswith("warning: ")
    assert "only experts 0 to 15 of 64" in said.stderr
    (line,) = run_json(*arguments)["warnings"]
    assert line in said.stderr


@pytest.mark.parametrize("ending", [".yaml", ".pt", ".npz", ".npy"])
def test_convert_knows_the_forms_by_their_ending(tmp_path: Path, ending: str) -> None:
    if ending == ".pt":
        pytest.importorskip("torch")
    run("plan", TRACE, "--ranks", 4, "--redundant", 4, "-o", tmp_path / "a.json", "--effort", "fast")
    there = tmp_path / f"b{ending}"
    form = run_json("convert", tmp_path / "a.json", there)["form"]
    assert form == {".yaml": "trtllm", ".pt": "sglang"}.get(ending, "array")
    run("convert", there, tmp_path / "c.json", "--ranks", 4)
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    run("convert", tmp_path / "a.json", tmp_path / "d.npz", "--to", "deepseek")
    run("convert", tmp_path / "d.npz", tmp_path / "e.json", "--ranks", 4)
    assert (tmp_path / "e.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_sglang_maps_with_layers_between_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run("plan", TRACE, "--ranks", 4, "-o", tmp_path / "a.json", "--effort", "fast")
    run("convert", tmp_path / "a.json", tmp_path / "b.pt", "--dense-layers", "0,2-3, 7")
    # Control: the file holds 10 layers. Only 6 of them have experts.
    assert "10 layers" in run("convert", tmp_path / "b.pt", tmp_path / "x.npy", "--ranks", 4)
    run("convert", tmp_path / "b.pt", tmp_path / "c.json", "--ranks", 4, "--dense-layers", "0,2-3,7")
    assert (tmp_path / "c.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    run("convert", tmp_path / "a.json", tmp_path / "d.json", "--to", "sglang", "--dense-layers", "3,")
    assert "is valid" in run("check", tmp_path / "d.json", "--ranks", 4, "--layers", 6, "--dense-layers", "3,")
    for text in ("x", "-1", "4-2", "1;2", "1.5", ""):
        assert "give how many" in " ".join(
            run("check", tmp_path / "d.json", f"--dense-layers={text}", status=2).split()
        )


def test_paths_expand_a_tilde_and_name_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand the tilde in ``--option=~/x``, so the command must."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run("plan", TRACE, "--ranks", 4, "--effort", "fast", "--output=~/a.json")
    assert (tmp_path / "a.json").is_file()
    assert "is valid" in run("check", "~/a.json")
    said = run("check", "$HOME/a.json", status=2)
    assert f"$HOME was not replaced, write its value {tmp_path}" in said
    assert "$NOWHERE was not replaced" in run("plan", TRACE, "--ranks", 4, "-o", "$NOWHERE/a.json", status=2)
    assert "$HOME was not replaced" in run("doctor", "--quick", "--config", "$HOME/none.json", status=2)
    (tmp_path / "model").mkdir()
    assert f"{tmp_path}/model/config.json does not exist" in run("doctor", "--model=~/model", "--ranks", 4, status=2)
    for path, said in (
        ("~/none.json", f"{tmp_path}/none.json does not exist: no server"),
        ("$HOME/none.json", f"$HOME was not replaced, write its value {tmp_path}"),
    ):
        assert said in run("control", "pause", f"--stats-file={path}", status=2)


def test_commands_have_the_defaults_of_the_server() -> None:
    """The commands plan as the server does by default. Library calls default to the quick effort, whose plans do not
    depend on time."""
    config = EplbConfig()
    assert plan.__defaults__ is not None
    assert config.target_par in plan.__defaults__
    assert config.planner_effort in [getattr(value, "value", value) for value in plan.__defaults__]
    assert (PlanOptions().effort, Conditions.__dataclass_fields__["effort"].default) == (QUICK_EFFORT,) * 2
    assert config.planner_effort == EFFORT
    assert simulate.__defaults__ is not None
    assert config.target_par in simulate.__defaults__
    assert Conditions.__dataclass_fields__["target_par"].default == config.target_par


# --- addresses -------------------------------------------------------------------------------------------------------

PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that answers 403, and the requested addresses. The environment names the proxy."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    url = f"http://127.0.0.1:{made.server_port}"
    monkeypatch.setenv("http_proxy", url)
    yield url, asked
    made.shutdown()
    made.server_close()


def test_this_machine_is_asked_without_a_proxy(
    server: tuple[str, dict[str, Any]],  # noqa: F811
    proxy: tuple[str, list[str]],
) -> None:
    port = server[0].rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"):
        if host != "127.0.0.2":
            assert run_json("watch", f"http://{host}:{port}", "--once")["steps"] == 1234
        assert proxy_for(f"http://{host}:{port}") is None
    for host in (
        *("0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "127.1", "0", "2130706433", "0x7f.1"),
        *(
            socket.gethostname(),
            socket.gethostname().upper(),
            "a.localhost",
            "localhost.",
            "ip6-localhost",
            "LocalHost",
        ),
    ):
        assert proxy_for(f"http://{host}:{port}") is None, host
    assert proxy[1] == []


def test_error_names_the_proxy(proxy: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = proxy
    said = run("watch", "http://192.0.2.7:8000", "--once", status=2)  # an address reserved for documentation
    assert f"answers 403 Forbidden through the proxy {url}" in said
    assert asked == ["http://192.0.2.7:8000/metrics"]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    said = run("watch", "http://192.0.2.7:8000", "--once", status=2)
    assert "cannot be reached through the proxy http://127.0.0.1:9" in said
    monkeypatch.setenv("http_proxy", "http://somebody:secret@127.0.0.1:9")
    said = run("watch", "http://me:hidden@192.0.2.7:8000", "--once", status=2)
    assert "http://192.0.2.7:8000/metrics cannot be reached through the proxy http://127.0.0.1:9" in said
    assert not any(word in said for word in ("secret", "hidden"))
    monkeypatch.setenv("no_proxy", "192.0.2.7")
    assert proxy_for("http://192.0.2.7:8000") is None


def test_other_machines_are_not_this_one() -> None:
    """Negative control."""
    for host in (
        "192.0.2.7",
        "example.invalid",
        "8.8.8.8",
        "2001:db8::1",
        "",
        "localhost.example.invalid",
        "3221225991",
        "vm2.invalid",
    ):
        assert not is_this_machine(host), host


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"gate_eplb": true}', "a switch of older vllm-ascend releases"),
        ('{"dynamic_eplb": true, "stair_config": {}}', "leave it out"),
        ('{"additional_config": {"eplb_config": {"dynamic_eplb": true}}}', "the settings stand in it directly"),
        ('{"eplb_config": {"dynamic_eplb": true}, "num_redundant_experts": 4}', 'write it as {"eplb_config": '),
        ('{"step_interval": 100}', "write expert_heat_collection_interval instead"),
    ],
)
def test_doctor_says_where_a_setting_belongs(text: str, hint: str) -> None:
    said = run("doctor", "--quick", "--config", text, status=2)
    assert hint in said
    assert "did you mean" not in said


def test_doctor_accepts_words_for_booleans(tmp_path: Path) -> None:
    for text in ('{"dynamic_eplb": "true", "min_gain": "1e-2"}', '{"eplb_config": {"dynamic_eplb": "True"}}'):
        said = json.loads(CliRunner().invoke(app, ["doctor", "--quick", "--json", "--config", text]).stdout)
        assert {f["what"]: f["status"] for f in said["findings"]}["settings"] == "ok"


def loaded(**answer: object) -> dict[str, tuple[str, str]]:
    return {finding.what: (finding.status, finding.text) for finding in doctor.loaded_findings(answer)}


def test_doctor_reports_vllms_answer_about_plugins() -> None:
    assert loaded() == {}
    assert loaded(plugin_in_place=True)["plugin in vLLM"][0] == "ok"
    status, text = loaded(plugin_in_place=False, plugins_named=["ascend", " eplb"])["plugin in vLLM"]
    assert status == "wrong"
    assert "a space in VLLM_PLUGINS is a part of the name" in text
    assert "it loads all plugins" in loaded(plugin_in_place=False, plugins_named=None)["plugin in vLLM"][1]
    assert "KeyError: no" in loaded(plugin_in_place=False, plugin_error="KeyError: no")["plugin in vLLM"][1]


def test_probe_that_hangs_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The stand-in for torch never finishes its import. The finding names the line, and stderr has all stacks."""
    (tmp_path / "torch.py").write_text("import time\ndef wait_for_a_lock():\n    time.sleep(600)\nwait_for_a_lock()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(doctor.__file__).parents[2])]))
    said, timeout = "", 0.0
    for timeout in (1.0, 4.0, 20.0, 100.0):  # a slow machine starts Python late
        said = doctor.probe(False, timeout=timeout)["probe_error"]
        if "stood in" in said:
            break
    assert f"took more than {timeout:.0f} s; it stood in wait_for_a_lock (" in said
    assert f"{tmp_path}/torch.py:3)" in said
    assert said.isprintable()
    stacks = capfd.readouterr().err
    assert "most recent call first" in stacks
    assert "RuntimeWarning" not in stacks
