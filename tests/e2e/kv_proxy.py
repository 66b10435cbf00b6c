# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server at once, behind a small proxy.

vLLM's ExampleConnector leaves the KV cache of a prompt in a folder of the store, one file for each layer. With
NixlConnector the decode server reads the cache from the prefill server's memory, by what the answer to the first
request says about it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from examples.demo.server import Server

from .audit import AUDIT, FIRST, Step, audited_steps
from .conftest import START_SECONDS, wait_until
from .private_server import run_first
from .steady_requests import ONE_EACH

BLOCK = 32
"""Tokens of a block; whole blocks of a prompt go from one server to the other."""

FOR_ANOTHER = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks NixlConnector to keep the cache of a prompt until another server has read it."""


def _two_ports() -> int:
    """A port that is free, as is the next: each data-parallel engine of NixlConnector listens at a port."""
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            second.bind(("127.0.0.1", port + 1))
            return port


class RoleServer(Server):
    """A server of two data-parallel engines that computes prompts (kv_producer) or takes them over (kv_consumer).

    A step of a prefill server has one prompt for each engine, so that prompts make many steps.

    Attributes:
        audit: folder with the account of each worker; see audit.py.
    """

    def __init__(self, role: str, settings: dict[str, object], folder: Path, store: Path | None) -> None:
        super().__init__(2, settings, folder, 1 if role == "kv_producer" else 16)
        transfer: dict[str, object] = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        if store:
            extra = {"shared_storage_path": str(store)}
            transfer = {"kv_connector": "ExampleConnector", "kv_role": role, "kv_connector_extra_config": extra}
        else:
            self.environment |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(_two_ports())}
        self.command[self.command.index("--tensor-parallel-size")] = "--data-parallel-size"
        self.command += [
            *("--kv-transfer-config", json.dumps(transfer), "--block-size", str(BLOCK)),
            # of a prompt in parts ExampleConnector keeps the first only
            *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "512"),
        ]
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


class Proxy:
    """Sends a request to the prefill server for one token, then to the decode server, whose answer it passes on. A
    request that a server does not answer, because it is away, is sent there again.

    Attributes:
        sent_again: how often that happened, by URL.
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self.sent_again = {prefill: 0, decode: 0}
        self._between: Callable[[Any], Any] = lambda handed: handed
        self._client = httpx.Client(timeout=300, limits=ONE_EACH, trust_env=False)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                first = proxy._post(prefill, {**request, "max_tokens": 1, "kv_transfer_params": FOR_ANOTHER})
                handed = proxy._between(first.get("kv_transfer_params"))
                answer = json.dumps(proxy._post(decode, {**request, "kv_transfer_params": handed})).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _post(self, url: str, request: dict[str, Any]) -> Any:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                response = self._client.post(f"{url}/v1/completions", json=request)
                response.raise_for_status()
                return response.json()
            except httpx.HTTPError:
                if time.monotonic() > end:
                    raise
            self.sent_again[url] += 1
            time.sleep(0.5)

    @contextlib.contextmanager
    def doing_between(self, action: Callable[[Any], Any]) -> Iterator[None]:
        """Calls ``action`` when a prompt is computed, before the decode server is asked, with what the prefill server
        says about the prompt's cache. The decode server is told what ``action`` returns."""
        idle, self._between = self._between, action
        try:
            yield
        finally:
            self._between = idle

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


class Store:
    """The folder between the servers."""

    def __init__(self, path: Path, layers: int) -> None:
        self.path, self._layers = path, layers

    def clear(self) -> None:
        """Forgets all prompts; no request may be under way."""
        for entry in self.path.iterdir():
            shutil.rmtree(entry)

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
    folder: Path, prefill: dict[str, object], decode: dict[str, object], nixl: bool = False
) -> Iterator[tuple[RoleServer, RoleServer, Store, Proxy]]:
    """Starts a server of each role by its settings, and the proxy."""
    for name in ("prefill", "decode", "kv"):
        (folder / name).mkdir()
    store = None if nixl else folder / "kv"
    servers = (
        RoleServer("kv_producer", prefill, folder / "prefill", store),
        RoleServer("kv_consumer", decode, folder / "decode", store),
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
