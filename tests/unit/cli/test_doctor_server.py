# SPDX-License-Identifier: Apache-2.0
"""``doctor -- MODEL ARGUMENTS`` gives the answer of vLLM's own start-up, for settings in every form.

Cases: plugins that are not loaded, arguments that only vLLM's parser can read (dashes, dots, files), and models that
vLLM or this package refuses. The tests do not model vLLM: a process asks it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vllm_ascend_eplb.cli.doctor as doctor
from tests.unit.cli.test_cli import run
from vllm_ascend_eplb.cli.app import app

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "tiny_moe"

ASK = """
import json, os, sys
import vllm.engine.arg_utils, vllm.entrypoints.cli.serve, vllm.usage.usage_lib
from vllm_ascend_eplb.cli.probe_server import ask_server
for name, words in json.load(open(sys.argv[1])).items():
    if os.fork() == 0:  # a separate process, without seconds of imports
        code = 1
        try:
            answer = ask_server(words)
            with open(os.path.join(os.path.dirname(sys.argv[1]), name + ".answer"), "w") as file:
                json.dump(answer, file)
            code = 0
        finally:
            os._exit(code)
    assert os.wait()[1] == 0, name
"""


def config_of(folder: Path, **changes: object) -> str:
    """Make the folder of a model: the example's configuration with changes."""
    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


EP = ("--enable-expert-parallel", "--tensor-parallel-size", "2")


def settings(**eplb_config: object) -> tuple[str, str]:
    return "--additional-config", json.dumps({"eplb_config": {"dynamic_eplb": True, **eplb_config}})


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """vLLM's answers to command lines, by name. Only those that a selected test needs are asked."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("asked")
    (folder / "serve.yaml").write_text(
        f"model: {MODEL}\nenable-expert-parallel: true\ntensor-parallel-size: 2\n"
        'additional-config: \'{"eplb_config": {"dynamic_eplb": "true", "min_gain": 1e-2}}\'\n'
    )
    cases = {
        "plain": [MODEL, *EP, *settings()],
        "underscores": [MODEL, "--enable_expert_parallel", "-tp=2", *settings(mode="observe")],
        "dots": [MODEL, *EP, "--additional-config.eplb_config.dynamic_eplb", "true"],
        "file": ["--config", folder / "serve.yaml"],
        "redundant": [MODEL, *EP, *settings(num_redundant_experts=3)],
        "nothing": [MODEL, *EP],
        "off": [MODEL, *EP, "--additional-config", '{"eplb_config": {"dynamic_eplb": "false", "x": 1}}'],
        "switch": [MODEL, *EP, "--additional-config", '{"eplb_config": {"num_redundant_experts": 2}}'],
        "no ep": [MODEL, "--tensor-parallel-size", "2", *settings()],
        "beside": [MODEL, *EP, "--additional-config", '{"Eplb-Config": {"dynamic_eplb": true}}'],
        "twins": [MODEL, *EP, "--eplb-config.num_redundant_experts", "2", *settings()],
        "option": [MODEL, "--enable-expert-paralel", *settings()],
        "value": [MODEL, "--tensor-parallel-size", "two"],
        "help": [MODEL, "--help"],
        "length": [MODEL, *EP, "--max-model-len", "100000000", *settings()],
        "dense": [
            config_of(folder / "dense", architectures=["Qwen3ForCausalLM"], model_type="qwen3", num_experts=0),
            *EP,
            *settings(),
        ],
        "refused class": [
            config_of(folder / "qwen2", architectures=["Qwen2MoeForCausalLM"], model_type="qwen2_moe"),
            *EP,
            *settings(),
        ],
        "no folder": [folder / "none", *EP, *settings()],
    }
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    cases = {name: words for name, words in cases.items() if name in wanted}
    (folder / "cases.json").write_text(
        json.dumps({name: [str(word) for word in words] for name, words in cases.items()})
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("VLLM_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder / "cases.json")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.answer").read_text()) for name in cases}


def rarely(name: str, *more: str) -> Any:
    """A case of the nightly tier."""
    return pytest.param(name, *more, marks=pytest.mark.soak)


@pytest.mark.parametrize("name", ["plain", rarely("underscores"), rarely("dots"), rarely("file")])
def test_vllm_switches_balancing_on(answers: dict[str, dict[str, Any]], name: str) -> None:
    """The control of the refusals below, too: the same model and arguments are accepted."""
    answer = answers[name]
    assert answer["balances"] is True
    assert answer["model"] == "Qwen3MoeForCausalLM"
    ((level, line),) = answer["said"]
    assert level == "info"
    assert line.startswith("EPLB is on: incremental policy")
    assert ("observing only" in line) == (name == "underscores")
    (finding,) = doctor.server_findings({"server": answer})
    assert (finding.status, finding.text) == ("ok", f"Qwen3MoeForCausalLM: {line}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", 'add --additional-config \'{"eplb_config": {"dynamic_eplb": true}}\''),
        rarely("off", "nothing in its arguments asks for it"),
        rarely("switch", "eplb_config sets num_redundant_experts, but not dynamic_eplb"),
    ],
)
def test_vllm_leaves_balancing_off(answers: dict[str, dict[str, Any]], name: str, reason: str) -> None:
    assert answers[name]["balances"] is False
    (finding,) = doctor.server_findings({"server": answers[name]})
    assert finding.status == "wrong"
    assert finding.text.startswith("Qwen3MoeForCausalLM is served without balancing: ")
    assert reason in finding.text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("redundant", "nearest that works: 2 or 4"),
        rarely("no ep", "add --enable-expert-parallel"),
        rarely("beside", "the key is eplb_config"),
        rarely("twins", "leave out --eplb-config"),
        rarely("option", "unrecognized arguments: --enable-expert-paralel"),
        rarely("value", "argument --tensor-parallel-size"),
        rarely("help", "leave that out"),
        rarely("length", "max_model_len (100000000)"),
        rarely("dense", "a model without experts"),
        ("refused class", "does not implement the MixtureOfExperts protocol"),
        rarely("no folder", "none"),
    ],
)
def test_start_up_would_end_with_one_line(answers: dict[str, dict[str, Any]], name: str, line: str) -> None:
    """The line comes from vLLM's parser, from vLLM's configuration or from this package, before any worker starts."""
    assert line in answers[name]["refused"]
    assert answers[name]["refused"].isprintable()
    (finding,) = doctor.server_findings({"server": answers[name]})
    assert finding.status == "wrong"
    assert finding.text.startswith("start-up ends with: ")


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
