# SPDX-License-Identifier: Apache-2.0
"""The command "doctor": the findings and their status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vllm_ascend_eplb.cli.doctor as doctor
from tests.unit.cli.test_cli import run, run_json
from vllm_ascend_eplb import Placement, __version__
from vllm_ascend_eplb.cli import app
from vllm_ascend_eplb.cli.doctor import export_line
from vllm_ascend_eplb.files.expert_map import write_expert_map


def test_doctor_quick_does_not_ask_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    result = CliRunner().invoke(app, ["doctor", "--quick", "--json"])
    said = json.loads(result.stdout)
    assert result.exit_code == (0 if said["works"] else 1)
    assert said["versions"]["vllm-ascend-eplb"] == __version__
    found = {finding["what"]: finding for finding in said["findings"]}
    assert found["planner (C++)"]["status"] == "ok"
    assert found["vLLM"]["status"] == "note"


def test_doctor_names_the_kernels_in_use() -> None:
    answer = {"kernels": {"cpu": "cpu", "cuda": "aten"}, "no_kernel": {"cuda": "the package was built without nvcc"}}
    cpu, cuda = doctor.kernel_findings(answer)
    assert (cpu.status, cuda.status) == ("ok", "note")
    assert "C++ kernel for cpu is in use" in cpu.text
    assert "the package was built without nvcc; servers do not need it" in cuda.text
    (slow,) = doctor.kernel_findings({"kernels": {"cpu": "aten"}, "no_kernel": {"cpu": "_ops.so is missing"}})
    assert slow.status == "note"
    assert slow.text.endswith("in use: _ops.so is missing")
    assert doctor.kernel_findings({"kernels_error": "ImportError: no"})[0].status == "wrong"


def test_doctor_says_why_balancing_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: dict[str, Any] = {
        "cuda": 0, "npu": 8, "vllm_version": "0.99.0", "checked": False, "checked_versions": ["0.32"],
        "platform": "cuda", "missing": ["vllm.x.Y (needed): no module"], "patch_points": 20,
    }  # fmt: skip
    monkeypatch.setattr(doctor, "probe", lambda *_: answer)
    monkeypatch.setenv("VLLM_PLUGINS", "ascend")
    said = run_json("doctor", status=1)
    wrong = [finding["text"] for finding in said["findings"] if finding["status"] == "wrong"]
    assert any("allow_unchecked_vllm" in text for text in wrong)
    assert any("vllm.x.Y" in text for text in wrong)
    assert said["verdict"].startswith("balancing would stay off")
    text = run("doctor", status=1)
    assert "8 NPU" in text
    assert "WRONG" in text
    monkeypatch.setattr(doctor, "probe", lambda *_: {"probe_error": "it crashed"})
    assert "it crashed" in run("doctor", status=1)


def test_doctor_notes_a_newer_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """This newer vLLM is balanced by default, because the self-test found every patch point unchanged."""
    answer: dict[str, Any] = {
        "cuda": 2, "npu": 0, "vllm_version": "0.33.0", "checked": True, "checked_versions": ["0.32"],
        "warning": "the self-test found every patch point unchanged", "platform": "cuda", "missing": [],
        "patch_points": 20,
    }  # fmt: skip
    monkeypatch.setattr(doctor, "probe", lambda *_: answer)
    found = {finding["what"]: finding for finding in run_json_of_any_status("doctor")["findings"]}
    assert found["vLLM"]["status"] == "note"
    assert "self-test" in found["vLLM"]["text"]


def run_json_of_any_status(command: str) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(app, [command, "--json"]).stdout)


def test_doctor_checks_vllm_ascend_and_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "plugin_findings", list)
    monkeypatch.delenv("DYNAMIC_EPLB", raising=False)

    def findings(**changes: object) -> dict[str, tuple[str, str]]:
        known = {"ascend_version": "0.23.0.post1", "ascend_checked_versions": ["0.23.0.post1"]}
        answer = {"npu": 8, "vllm_version": "0.23.0", "platform": "npu", "ascend_differences": [], **known, **changes}
        monkeypatch.setattr(doctor, "probe", lambda *_: answer)
        said = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
        return {finding["what"]: (finding["status"], finding["text"]) for finding in said["findings"]}

    well = findings()
    assert well["vllm-ascend"][0] == well["vllm-ascend's runner"][0] == "ok"
    status, text = findings(ascend_version="0.24.0")["vllm-ascend"]
    assert status == "wrong"
    assert text.startswith("0.24.0; checked against 0.23.0.post1: balancing stays off unless ")
    first = findings(ascend_differences=["it calls eplb_updator.turn"])["vllm-ascend's runner"]
    assert first == ("wrong", "it calls eplb_updator.turn: vllm-ascend's own EPLB stays in place")
    second = findings(ascend_missing=[])["vllm-ascend's runner"]
    assert second == ("ok", "the second one; all patch points are present")
    gone = findings(ascend_missing=["a.b (its use): gone"])["vllm-ascend's runner"]
    assert gone == ("wrong", "missing: a.b (its use): gone: start-up ends with this line")
    assert "cannot be imported: no" in findings(ascend_error="no")["vllm-ascend"][1]
    monkeypatch.setenv("DYNAMIC_EPLB", "false")
    assert findings()["DYNAMIC_EPLB"][0] == "wrong"


def test_doctor_checks_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "probe", lambda *_: {"cuda": 0, "npu": 0})
    monkeypatch.setattr(doctor, "plugin_findings", list)

    def settings(text: str, status: int = 0) -> str:
        said = run_json("doctor", "--config", text, "--experts", 64, "--ranks", 4, status=status)
        return "".join(finding["text"] for finding in said["findings"] if finding["what"] == "settings")

    assert "policy incremental, a cycle every 600 steps, 17 slots" in settings(
        '{"dynamic_eplb": true, "num_redundant_experts": 4}'
    )
    assert "nearest that works: 0 or 4" in settings('{"dynamic_eplb": true, "num_redundant_experts": 3}', 1)
    assert "nothing is switched on" in settings("{}")
    write_expert_map(tmp_path / "map.json", Placement.initial(2, 64, 4, 8))
    kept = settings(json.dumps({"expert_map_path": str(tmp_path / "map.json")}))
    assert kept.startswith("static placement from ")
    assert kept.endswith("18 slots per rank and layer")
    (tmp_path / "c.json").write_text('{"eplb_config": {"dynamic_eplb": true, "mode": "observe"}}')
    assert "observing only" in settings(str(tmp_path / "c.json"))
    assert "did you mean" in run("doctor", "--config", '{"dynamic_epbl": true}', status=2)
    assert "is not JSON" in run("doctor", "--config", "{", status=2)
    assert "neither JSON nor" in run("doctor", "--config", str(tmp_path / "none"), status=2)


def test_export_line_keeps_the_loaded_plugins() -> None:
    plugins = {
        "vllm.platform_plugins": ["ascend"],
        "vllm.general_plugins": ["ascend_kv", "eplb"],
        "vllm.stat_logger_plugins": ["eplb_metrics"],
        "vllm.endpoint_plugins": [],
    }
    assert export_line(plugins, None) is None
    assert export_line(plugins, "ascend,eplb,eplb_metrics") is None
    assert export_line(plugins, "ascend") == "export VLLM_PLUGINS=ascend,eplb,eplb_metrics"
    plugins["vllm.endpoint_plugins"] = ["eplb_page", "other_page"]
    # without VLLM_PLUGINS all plugins are loaded, so the line must name them all
    assert export_line(plugins, None) == "export VLLM_PLUGINS=ascend,ascend_kv,eplb,eplb_metrics,eplb_page"


def test_doctor_takes_the_command_line_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments may begin with ``vllm serve``. vLLM's answer is the verdict."""
    asked: list[list[str]] = []
    server: dict[str, Any] = {"said": [["info", "EPLB is on: x"], ["warning", "y"]], "balances": True, "model": "M"}

    def probe(with_vllm: bool, words: list[str]) -> dict[str, Any]:
        asked.append(words)
        return {"cuda": 0, "npu": 0, "server": server}

    monkeypatch.setattr(doctor, "probe", probe)
    monkeypatch.setattr(doctor, "plugin_findings", list)
    words = ["MODEL", "--config", "file.yaml", "--json", "-tp", "2"]
    for front in (["vllm", "serve"], ["serve"], []):
        done = CliRunner().invoke(app, ["doctor", "--json", "--", *words]) if not front else None
        if front:
            assert "would be switched on in this server" in run("doctor", "--", *front, *words)
        else:
            assert done is not None
            said = json.loads(done.stdout)
            assert said["verdict"] == "balancing would be switched on in this server"
            assert [f for f in said["findings"] if f["what"] == "server"] == [
                {"what": "server", "status": "ok", "text": "M: EPLB is on: x"},
                {"what": "server", "status": "note", "text": "y"},
            ]
    assert asked == [words] * 3
    server |= {"refused": "EplbConfigError: no"}
    text = run("doctor", "--", *words, status=1)
    assert "balancing would stay off: server: start-up ends with: EplbConfigError: no" in " ".join(text.split())


@pytest.mark.parametrize("option", [["--quick"], ["--config", "{}"], ["--model", "m"]])
def test_command_line_excludes_other_checks(option: list[str]) -> None:
    done = CliRunner().invoke(app, ["doctor", *option, "--", "MODEL"])
    assert done.exit_code == 2
    assert "leave out --config, --model and --quick" in done.stderr
