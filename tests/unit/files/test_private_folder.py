# SPDX-License-Identifier: Apache-2.0
"""A server's private folder is removed however the server ends; no other folder is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_ascend_eplb.files.run_folder import (
    has_ended,
    make_private_folder,
    remove_abandoned_folders,
    remove_orphaned_folder,
)

SERVER = """
import os, time
from vllm_ascend_eplb.observe.stats_file import provide_stats_path
path = provide_stats_path()
path.write_text("{}")
if FORKS and os.fork():
    print(path.parent, flush=True)
    os.kill(os.getpid(), 9)
if not FORKS:
    print(path.parent, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def server(folder: Path, *, forks: bool = False) -> Iterator[tuple[int, Path]]:
    """A process with a private folder; gives its session and the folder, and is killed at the end. If it forks, the
    process that made the folder is killed, and its child continues."""
    environment = {key: value for key, value in os.environ.items() if key != "EPLB_STATS_FILE"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER.replace("FORKS", str(forks))],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"TMPDIR": str(folder)},
        start_new_session=True,
    )
    try:
        yield process.pid, Path(process.stdout.readline().strip())
    finally:
        end(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def end(session: int, number: int) -> None:
    """Send a signal to all processes of a server at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def test_only_the_folder_of_a_killed_front_end_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours, living, foreign = (
        tmp_path / name for name in (f"vllm-eplb-{dead.pid}-ab_1", f"vllm-eplb-{os.getpid()}-cd", "my")
    )
    link = tmp_path / f"vllm-eplb-{dead.pid}-link"
    for folder in (ours, living, foreign):
        folder.mkdir()
        (folder / "stats.json").write_text("{}")
    link.symlink_to(foreign)
    for folder in (ours, living, foreign, link):
        remove_orphaned_folder(str(folder / "stats.json"))
    remove_orphaned_folder("")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, foreign.name, link.name])
    assert (foreign / "stats.json").exists()


def test_folder_of_an_unreaped_front_end_is_removed(tmp_path):
    """A zombie still has a process id; in a container nobody may reap it."""
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    os.kill(zombie.pid, 0)
    assert has_ended(zombie.pid)
    assert not has_ended(os.getpid())
    assert not has_ended(1)
    folder = tmp_path / f"vllm-eplb-{zombie.pid}-ab"
    folder.mkdir()
    remove_orphaned_folder(str(folder / "stats.json"))
    assert not folder.exists()
    zombie.wait()
    assert has_ended(zombie.pid)


def test_leftovers_of_a_killed_server_are_removed_at_next_start(tmp_path):
    with server(tmp_path) as (_, served), server(tmp_path, forks=True) as (_, forked):
        with server(tmp_path) as (session, left):
            end(session, signal.SIGTERM)  # without a handler
        assert left.is_dir()
        assert left.stat().st_mode & 0o077 == 0
        assert {served, forked, left} == set(tmp_path.iterdir())
        with server(tmp_path) as (_, new):
            assert {served, forked, new} == set(tmp_path.iterdir())
            assert (served / "stats.json").exists()
            assert (forked / "stats.json").exists()


def test_only_private_folders_of_the_user_are_abandoned(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = {"vllm-eplb-7", "vllm-eplb-flight-ab", "vllm-eplb-7-a.b", "my-vllm-eplb-7-ab", "elsewhere"}
    for name in (*kept, "vllm-eplb-7-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stats.json").write_text("{}")
    (tmp_path / "vllm-eplb-7-link").symlink_to("elsewhere")
    (tmp_path / "vllm-eplb-7-file").write_text("")
    kept |= {"vllm-eplb-7-link", "vllm-eplb-7-file"}
    if os.geteuid() == 0:
        (tmp_path / "vllm-eplb-7-foreign").mkdir()
        os.chown(tmp_path / "vllm-eplb-7-foreign", 12345, 12345)
        kept.add("vllm-eplb-7-foreign")
    remove_abandoned_folders()
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "elsewhere" / "stats.json").exists()


@pytest.mark.parametrize(("module", "name"), [(tempfile, "mkdtemp"), (os, "open")])
def test_folder_lost_before_its_lock_is_made_again(tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    call, made = getattr(module, name), []

    def then_lose_it(*arguments: Any, **names: Any) -> Any:
        monkeypatch.setattr(module, name, call)
        result = call(*arguments, **names)
        made.extend(tmp_path.iterdir())
        remove_abandoned_folders()
        return result

    monkeypatch.setattr(module, name, then_lose_it)
    folder = make_private_folder()
    assert len(made) == 1
    assert not made[0].exists()
    remove_abandoned_folders()
    assert list(tmp_path.iterdir()) == [folder]
