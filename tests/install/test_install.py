# SPDX-License-Identifier: Apache-2.0
"""The installed package: its files, its C++ parts, an engine and a server that balance with it, and its removal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from examples.demo.port import free_port
from vllm_ascend_eplb import __version__

from ..e2e.conftest import BUSY, prompts
from ..e2e.offline import environment
from .conftest import LONG, ROOT, Installation, skip_without_registry, users_environment

PACKAGE = "vllm_ascend_eplb"
BUILT = {f"{PACKAGE}/_ops.so", f"{PACKAGE}/_planner{sysconfig.get_config_var('EXT_SUFFIX')}"}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
INSTALLERS = {"INSTALLER", "REQUESTED", "direct_url.json"}
NOT_PYTHON = {
    f"{PACKAGE}/_planner.pyi",
    f"{PACKAGE}/py.typed",
    f"{PACKAGE}/report/page.css",
}


def files_below(folder: Path) -> set[str]:
    """Relative paths of the files, without compiled ones."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if "__pycache__" not in path and not path.endswith(".so")}


def test_sources_hold_what_a_build_needs_and_no_more(sdist: Path) -> None:
    wanted = {f"{PACKAGE}/{path}" for path in files_below(ROOT / PACKAGE)}
    wanted |= {f"csrc/{path}" for path in files_below(ROOT / "csrc")}
    wanted |= {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    made = {"PKG-INFO", "setup.cfg"}
    held = {path for path in files_below(sdist) if ".egg-info/" not in path and not path.startswith("build/")}
    assert held == wanted | made


def test_pip_takes_the_sources_of_a_git_address(tmp_path: Path) -> None:
    """pip fetches the sources and makes their metadata in isolation. The tests below compile them."""
    if not (ROOT / ".git").exists():
        pytest.skip("the tests do not run in a clone")
    skip_without_registry(tmp_path / "nothing")
    address = f"git+file://{ROOT}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    subprocess.run([*pip, "--dest", str(tmp_path), address], check=True, env=users_environment())
    (archive,) = tmp_path.glob("*.zip")
    committed = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"HEAD:{PACKAGE}/__init__.py"], check=True, capture_output=True, text=True
    ).stdout
    version = archive.stem.rpartition("-")[2]
    assert f'__version__ = "{version}"' in committed
    with zipfile.ZipFile(archive) as sources:
        names = {name.partition("/")[2] for name in sources.namelist()}
    assert {"setup.py", "CMakeLists.txt", f"{PACKAGE}/__init__.py", "csrc/ops/CMakeLists.txt"} <= names


def test_the_installed_files_are_those_of_the_list(installation: Installation) -> None:
    python = {f"{PACKAGE}/{path}" for path in files_below(ROOT / PACKAGE) if path.endswith(".py")}
    info = f"{PACKAGE}-{__version__}.dist-info"
    wanted = python | NOT_PYTHON | BUILT | {f"{info}/{name}" for name in METADATA | INSTALLERS}
    program = (
        "import importlib.metadata as m;"
        "print('\\n'.join(str(f) for f in m.distribution('vllm-ascend-eplb').files if '__pycache__' not in str(f)))"
    )
    held = set(installation.run("-c", program).split())
    scripts = {path for path in held if path.startswith("../")}
    assert held - scripts == wanted
    assert {Path(path).name for path in scripts} == {"vllm-ascend-eplb"}
    assert {f"{PACKAGE}/{path}" for path in files_below(ROOT / PACKAGE)} == python | NOT_PYTHON


def test_it_runs_from_its_own_files_and_cannot_write(installation: Installation) -> None:
    """The tests below prove something only if they cannot import this checkout and cannot write to the package."""
    program = (
        f"import {PACKAGE}, os; print({PACKAGE}.__file__, {PACKAGE}.__version__, "
        f"os.access(os.path.dirname({PACKAGE}.__file__), os.W_OK))"
    )
    assert installation.run("-c", program).split() == [
        str(installation.site / PACKAGE / "__init__.py"),
        __version__,
        "False",
    ]


CONTAINER = """
import json, os
def writable(path):
    try:
        os.close(os.open(path + "/tried", os.O_CREAT))
    except OSError as error:
        return error.strerror
    return True
shared = os.statvfs("/dev/shm")
print(json.dumps({
    "user": os.geteuid(), "groups": os.getgroups(), "shared memory": shared.f_frsize * shared.f_blocks >> 20,
    "root": writable("/"), "package": writable("%s"), "scratch": writable("/scratch"), "tmp": writable("/tmp"),
    "temporary files": os.environ["TMPDIR"], "checkout": os.path.exists("%s"),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd"))],
}))
"""


def test_container_is_restricted_as_in_the_examples(installation: Installation) -> None:
    """User, capabilities, file systems are as in examples/deploy/kubernetes.yaml; writable folders are the control."""
    if installation.why_no_container:
        pytest.skip(f"commands ran without a container: {installation.why_no_container}")
    program = CONTAINER % (installation.site / PACKAGE, ROOT / PACKAGE)
    assert json.loads(installation.run("-c", program)) == {
        "user": 2000,
        "groups": [],
        "shared memory": 320,
        "root": "Read-only file system",
        "package": "Read-only file system",
        "scratch": True,
        "tmp": True,
        "temporary files": LONG,
        "checkout": False,
        "capabilities": ["0" * 16] * 2,
    }


def test_doctor_says_that_the_kernels_are_in_use(installation: Installation) -> None:
    said = json.loads(installation.run("-m", f"{PACKAGE}.cli", "doctor", "--quick", "--json"))
    found = {finding["what"]: (finding["status"], finding["text"]) for finding in said["findings"]}
    assert found["recording op"] == ("ok", "the C++ kernel for cpu is in use")
    assert found["planner (C++)"][0] == "ok"
    assert said["works"]
    assert said["versions"]["vllm-ascend-eplb"] == __version__


@pytest.mark.parametrize("broken", ["missing", "of another torch"])
def test_doctor_says_why_a_kernel_is_not_in_use(installation: Installation, tmp_path: Path, broken: str) -> None:
    """The control of the test above, on a copy with a bad library: one warning and ``doctor`` name the reason."""
    shutil.copytree(installation.site / PACKAGE, tmp_path / PACKAGE)
    library = tmp_path / PACKAGE / "_ops.so"
    (tmp_path / PACKAGE).chmod(0o755)
    if broken == "missing":
        library.unlink()
        reason = "is missing"
    else:
        contents = library.read_bytes()
        library.chmod(0o644)
        assert contents.count(b"torch_get_num_threads\0") == 1
        library.write_bytes(contents.replace(b"torch_get_num_threads\0", b"torch_gone_in_torch_3\0"))
        reason = "torch has no torch_gone_in_torch_3"
    run = {"cwd": tmp_path, "env": users_environment(), "capture_output": True, "text": True, "check": True}
    doctor = [str(installation.python), "-m", f"{PACKAGE}.cli", "doctor", "--quick", "--json"]
    said = json.loads(subprocess.run(doctor, **run).stdout)
    (found,) = (finding for finding in said["findings"] if finding["what"] == "recording op")
    assert found["status"] == "note"
    assert "ATen operators on cpu" in found["text"]
    assert reason in found["text"]
    assert said["works"]
    warned = subprocess.run([str(installation.python), "-c", f"import {PACKAGE}.load.ops"], **run).stderr.splitlines()
    assert len([line for line in warned if reason in line]) == 1


def engine_variables() -> dict[str, str]:
    """The variables that vLLM needs for two ranks, without the rest of this machine's environment."""
    of_engines = ("VLLM_", "HF_", "TOKENIZERS_")
    return {name: value for name, value in environment(2).items() if name.startswith(of_engines)}


def test_an_engine_balances_with_it(installation: Installation) -> None:
    """The offline job of the end-to-end tests, on two ranks, from a folder that is no checkout."""
    job = {"ranks": 2, "eplb": BUSY, "probe": True, "prompts": prompts(2), "cycles": 3, "max_tokens": 16}
    (installation.elsewhere / "job.json").write_text(json.dumps(job))
    names = (str(installation.scratch / name) for name in ("job.json", "result.json"))
    with (installation.elsewhere / "log").open("w") as output:
        code = subprocess.run(
            installation.command(str(ROOT / "tests" / "e2e" / "offline.py"), *names),
            env={**engine_variables(), **installation.environment()},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
        ).returncode
    text = (installation.elsewhere / "log").read_text(errors="replace")
    assert code == 0, text[-4000:]
    ranks = json.loads((installation.elsewhere / "result.json").read_text())["ranks"]
    assert json.loads(ranks[0]["stats"])["cycles_done"] >= 3
    assert "ATen operators" not in text
    assert str(ROOT / PACKAGE) not in text


@pytest.mark.soak  # the engine above is the fast proof
def test_a_server_balances_and_ends_when_told(installation: Installation) -> None:
    """A server started as in the README balances, and SIGTERM ends it, as a container's runtime does."""
    port = free_port()
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "examples" / "tiny_moe")]
    command += ["--enable-expert-parallel", "--tensor-parallel-size", "2", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--shutdown-timeout", "30"]
    command += ["--additional-config", json.dumps({"eplb_config": BUSY})]
    log = installation.elsewhere / "server.log"

    def ask(path: str, body: dict[str, object] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    with log.open("w") as output:
        server = subprocess.Popen(
            installation.command(*command),
            env={**engine_variables(), **installation.environment()},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 400
        while True:
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            try:
                ask("/health")
                break
            except OSError:
                time.sleep(0.5)
        model = json.loads(ask("/v1/models"))["data"][0]["id"]
        done = r'^vllm_eplb_cycles\{[^}]*result="done"[^}]*\} ([\d.]+)$'
        while not any(float(count) >= 2 for count in re.findall(done, ask("/metrics"), re.M)):
            assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            for batch in prompts(1):
                ask("/v1/completions", {"model": model, "prompt": batch, "max_tokens": 16})
        pid = str(server.pid)
        if not installation.why_no_container:  # the container's first process is a child of unshare
            (pid,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(pid), signal.SIGTERM)
        server.wait(120)
    finally:
        server.kill()
        server.wait()
    text = log.read_text(errors="replace")
    assert "EPLB cycle 1" in text
    assert "ATen operators" not in text
    assert list(installation.elsewhere.rglob("vllm-eplb-*")) == []


def test_uninstalled_it_leaves_nothing(installation: Installation) -> None:
    for path in [installation.site, *installation.site.rglob("*"), installation.python.parent]:
        path.chmod(path.stat().st_mode | 0o200)
    pip = [str(installation.python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "-y", "vllm-ascend-eplb"], check=True, env=users_environment())
    assert not list(installation.site.glob("vllm_ascend_eplb*"))
    assert not list(installation.python.parent.glob("vllm-ascend-eplb*"))
