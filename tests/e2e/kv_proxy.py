# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server at once, behind a small proxy; either may be killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from examples.demo import roles

from .audit import AUDIT, FIRST, Step, audited_steps
from .conftest import START_SECONDS, wait_until
from .private_server import run_first


class RoleServer(roles.RoleServer):
    """A server whose workers keep an account of their steps.

    Attributes:
        audit: folder with the account of each worker; see audit.py.
    """

    def __init__(self, role: str, settings: dict[str, object], folder: Path, store: Path) -> None:
        super().__init__(role, settings, folder, store)
        self.audit = folder / "audit"
        self.audit.mkdir()
        run_first(self, folder, FIRST, **{AUDIT: str(self.audit)})

    def wait(self) -> None:
        for _ in self.wait_until_ready(START_SECONDS):
            pass

    def cycles(self) -> int:
        stats = self.stats()
        return stats.cycles_done if stats else 0

    def steps(self) -> list[Step]:
        """Steps of all workers."""
        return [step for steps in audited_steps(self.audit) for step in steps]

    def kill(self) -> None:
        """Ends all processes at once, and removes what vLLM leaves in memory then."""
        mapped = self.shared_memory()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        wait_until(lambda: not self.processes(), 60, "the end of killed processes")
        for path in mapped:
            path.unlink(missing_ok=True)


class Proxy(roles.Proxy):
    """A request that a server does not answer, because it is away, is sent there again.

    Attributes:
        sent_again: how often that happened, by URL.
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self.sent_again = {prefill: 0, decode: 0}
        self._between: Callable[[], None] = lambda: None
        super().__init__(prefill, decode)

    def post(self, url: str, request: dict[str, Any]) -> Any:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return super().post(url, request)
            except httpx.HTTPError:
                if time.monotonic() > end:
                    raise
            self.sent_again[url] += 1
            time.sleep(0.5)

    def between(self) -> None:
        self._between()

    @contextlib.contextmanager
    def doing_between(self, action: Callable[[], None]) -> Iterator[None]:
        """Calls ``action`` when a prompt is computed, before the decode server is asked."""
        idle, self._between = self._between, action
        try:
            yield
        finally:
            self._between = idle


class Store(roles.Store):
    """The folder between the servers, where each layer of a prompt has a file."""

    def __init__(self, path: Path, layers: int) -> None:
        super().__init__(path)
        self._layers = layers

    def drop_parts(self) -> None:
        """Forgets prompts that a server was writing when it was killed; only its requests wait for them.

        ExampleConnector takes a folder for a whole prompt. The files of a prompt are all of one size.
        """
        for entry in self.path.iterdir():
            if not self._is_whole(entry):
                shutil.rmtree(entry)

    def _is_whole(self, entry: Path) -> bool:
        sizes = [file.stat().st_size for file in entry.iterdir()]
        return len(sizes) == self._layers and len(set(sizes)) == 1

    def damage(self) -> None:
        """Turns the signs of all that is stored."""
        from safetensors.torch import load_file, save_file

        for file in self.path.glob("*/*.safetensors"):
            save_file({name: -tensor for name, tensor in load_file(file).items()}, file)


@contextlib.contextmanager
def both_roles(
    folder: Path, prefill: dict[str, object], decode: dict[str, object]
) -> Iterator[tuple[RoleServer, RoleServer, Store, Proxy]]:
    """Starts a server of each role by its settings, and the proxy."""
    for name in ("prefill", "decode", "kv"):
        (folder / name).mkdir()
    servers = (
        RoleServer("kv_producer", prefill, folder / "prefill", folder / "kv"),
        RoleServer("kv_consumer", decode, folder / "decode", folder / "kv"),
    )
    proxy = Proxy(*(server.url for server in servers))
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield (*servers, Store(folder / "kv", layers=6), proxy)
    finally:
        proxy.close()
        for server in servers:
            server.stop(30.0)
