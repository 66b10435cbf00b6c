# SPDX-License-Identifier: Apache-2.0
"""Install the package as the README says: build it in isolation from a source distribution, and install it into a new
environment that the user cannot write to. If this machine allows it, commands run as in the containers of
examples/deploy.

vLLM and torch come from the environment that runs the tests: their folder is on the new environment's path. This
checkout is not on that path, although it is installed there in editable mode.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import container

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in Path(item.path).parents:
            item.add_marker(pytest.mark.install)


@dataclass
class Installation:
    """A read-only environment that has the package.

    Attributes:
        python: the environment's interpreter. site: its own site-packages. sdist: the unpacked source distribution.
        elsewhere: a writable folder outside any checkout. In a container it is /scratch.
        why_no_container: why commands run without a container; empty if every command has its own container.
    """

    python: Path
    site: Path
    sdist: Path
    elsewhere: Path
    why_no_container: str

    @property
    def scratch(self) -> Path:
        """The path of ``elsewhere`` for commands."""
        return self.elsewhere if self.why_no_container else Path("/scratch")

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs the interpreter with ``arguments`` in ``scratch``, in a container if possible."""
        wanted = ["sh", "-c", 'cd "$1"; shift; exec "$@"', "sh", str(self.scratch), str(self.python), *arguments]
        if self.why_no_container:  # root obeys file modes only without capabilities
            drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
            return [*drop, *wanted]
        folders = [Path(sys.base_prefix), Path(sysconfig.get_path("purelib")), self.python.parents[1]]
        folders += [ROOT / "tests", ROOT / "examples"]
        return container.command(self.elsewhere.with_name("root"), self.elsewhere, folders, wanted)

    def environment(self) -> dict[str, str]:
        """The environment of commands, without variables that lead to this checkout. A container has the variables of
        the image and a long TMPDIR instead of this machine's variables."""
        if self.why_no_container:
            return users_environment()
        kept = ("PATH", "LANG", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OMP_NUM_THREADS")
        return {**{name: os.environ[name] for name in kept if name in os.environ}, **image_variables(), "TMPDIR": LONG}

    def run(self, *arguments: str) -> str:
        """Run the interpreter with ``arguments`` and return what it prints."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


LONG = "/scratch/" + "t" * 120
"""A folder whose path is too long for sockets."""


def users_environment() -> dict[str, str]:
    """This machine's environment, without variables that lead to this checkout."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def image_variables() -> dict[str, str]:
    """The variables that the image of examples/deploy sets."""
    text = (ROOT / "examples" / "deploy" / "Dockerfile.vllm").read_text(encoding="utf-8")
    return dict(pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for pair in line.split())


def skip_without_registry(folder: Path) -> None:
    """Skip the test if a build in isolation cannot fetch its build requirements."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]$", text, re.M)[1])  # type: ignore[index]
    look = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--python", sys.executable, "--target"]
    done = subprocess.run([*look, str(folder), *wanted], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no package registry gives {', '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made in isolation."""
    folder = tmp_path_factory.mktemp("sdist")
    skip_without_registry(folder / "nothing")
    source = folder / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)  # building writes into the source folder
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "build", "--quiet", "--sdist", "--out-dir", str(folder), str(source)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="session")
def installation(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "env" / "lib" / version / "site-packages"
    (site / "engine.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Leftovers of earlier builds, which must not be installed: a library of another Python, and a deleted module.
    earlier = sdist / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "vllm_ascend_eplb"
    earlier.mkdir(parents=True)
    (earlier / "module_that_is_gone.py").touch()
    (sdist / "vllm_ascend_eplb" / "_planner.cpython-39-x86_64-linux-gnu.so").touch()
    built = subprocess.run(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "."],
        cwd=sdist,
        env=users_environment(),
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    (folder / "root").mkdir()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    why_not = container.why_not(folder / "try")
    if not why_not:
        (elsewhere / Path(LONG).name).mkdir()
        for path in (elsewhere, elsewhere / Path(LONG).name):
            os.chown(path, container.USER, container.USER)
    return Installation(python, site, sdist, elsewhere, why_not)
