# SPDX-License-Identifier: Apache-2.0
"""``doctor`` gives the answers of vLLM's own start-up, for settings and lists of plugins in every form.

Cases: plugins that are not loaded, arguments that only vLLM's parser can read (dashes, dots, files), and models that
vLLM or this package refuses. The tests do not model vLLM: one process imports it, and forks one for every answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vllm_ascend_eplb.cli.doctor as doctor
from vllm_ascend_eplb.adaptors.vllm.versions import is_checked
from vllm_ascend_eplb.cli.finding import MARK

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_moe"

ASK = """
import json, os, runpy, sys
import vllm.engine.arg_utils, vllm.entrypoints.cli.serve, vllm.plugins, vllm.usage.usage_lib
from vllm_ascend_eplb.cli.finding import MARK
from vllm_ascend_eplb.cli.probe_server import ask_server

def write(name, ask):
    if os.fork() == 0:  # a separate process, without seconds of imports
        code = 1
        try:
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
            ask()
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)
    assert os.wait()[1] == 0, name

def ask_probe():
    sys.argv[1:] = ["--vllm"]
    os.environ["VLLM_PLUGINS"] = value
    runpy.run_module("vllm_ascend_eplb.cli.probe", run_name="__main__")  # as python -m

os.chdir(sys.argv[1])
servers, plugins = json.load(open("cases.json"))
for name, words in servers.items():
    write(name, lambda: print(MARK + json.dumps(ask_server(words))))
for value in plugins:
    write(value, ask_probe)
"""


def config_of(folder: Path, **changes: object) -> str:
    """Make the folder of a model: the example's configuration with changes."""
    folder.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


PLUGINS = {"eplb": True, "ascend, eplb": False}
"""Values of VLLM_PLUGINS, and whether vLLM then loads the plugin: it does not strip spaces from the names."""

EP = ("--enable-expert-parallel", "--tensor-parallel-size", "2")


def settings(**eplb_config: object) -> tuple[str, str]:
    return "--additional-config", json.dumps({"eplb_config": {"dynamic_eplb": True, **eplb_config}})


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """vLLM's answers to command lines by name, and the probe's output by value of VLLM_PLUGINS. Only what a selected
    test needs is asked."""
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
    words = {name: [str(word) for word in words] for name, words in cases.items() if name in wanted}
    plugins = [named for named in PLUGINS if named in wanted]
    (folder / "cases.json").write_text(json.dumps([words, plugins]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("VLLM_PLUGINS", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RuntimeWarning" not in done.stderr
    return {name: json.loads((folder / name).read_text().rpartition(MARK)[2]) for name in (*words, *plugins)}


def rarely(name: str, *more: str) -> Any:
    """A case of the nightly tier."""
    return pytest.param(name, *more, marks=pytest.mark.soak)


@pytest.mark.parametrize("name", ["plain", rarely("underscores"), rarely("dots"), rarely("file")])
def test_vllm_switches_balancing_on(answers: dict[str, dict[str, Any]], name: str) -> None:
    """The control of the refusals below, too: the same model and arguments are accepted."""
    answer = answers[name]
    assert answer["balances"] is True
    assert answer["model"] == "Qwen3MoeForCausalLM"
    (line,) = [line for level, line in answer["said"] if level == "info"]
    assert line.startswith("EPLB is on: incremental policy")
    assert ("observing only" in line) == (name == "underscores")
    warnings = [line for level, line in answer["said"] if level != "info"]
    newer = not is_checked(pytest.importorskip("vllm").__version__)
    assert bool(warnings) is newer  # which is balanced with a warning
    first, *notes = doctor.server_findings({"server": answer})
    assert (first.status, first.text) == ("ok", f"Qwen3MoeForCausalLM: {line}")
    assert [(note.status, note.text) for note in notes] == [("note", line) for line in warnings]


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


@pytest.mark.parametrize("name", PLUGINS)
def test_vllm_is_asked_if_it_loads_the_plugin(answers: dict[str, dict[str, Any]], name: str) -> None:
    """A separate process asks vLLM's own plugin loading."""
    assert answers[name]["plugin_in_place"] is PLUGINS[name]
    assert answers[name]["plugins_named"] == name.split(",")
