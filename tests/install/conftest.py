# SPDX-License-Identifier: Apache-2.0
"""The package, installed as the README says: built in isolation from what a source distribution holds, into an
environment of its own that its user cannot write to.

vLLM and torch are those of the environment that runs the tests: their folder is on the new environment's path, without
this checkout, which is installed there in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in Path(item.path).parents:
            item.add_marker(pytest.mark.install)


@dataclass
class Installation:
    """An environment with the package in it.

    Attributes:
        python: the environment's interpreter. site: its own site-packages. sdist: the unpacked source distribution.
        elsewhere: a folder that is no checkout.
    """

    python: Path
    site: Path
    sdist: Path
    elsewhere: Path

    def command(self, *arguments: str) -> list[str]:
        """``arguments`` for the interpreter, without the right to write where the file's mode says no."""
        drop = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
        return [*drop, str(self.python), *arguments]

    def environment(self) -> dict[str, str]:
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        return {name: value for name, value in os.environ.items() if name not in dropped}

    def run(self, *arguments: str, status: int = 0) -> str:
        """Standard output of the interpreter with ``arguments``, in a folder that is no checkout."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.elsewhere, env=self.environment(), capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made in isolation."""
    folder = tmp_path_factory.mktemp("sdist")
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
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    made = Installation(python, site, sdist, elsewhere)
    built = subprocess.run(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "."],
        cwd=sdist,
        env=made.environment(),
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    return made
