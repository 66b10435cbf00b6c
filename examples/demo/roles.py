# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server behind a small proxy.

vLLM's ExampleConnector leaves the KV cache of a prompt in a folder, where the decode server finds it.
"""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from .server import Server
from .traffic import ONE_EACH

BLOCK = 32
"""Tokens of a block; whole blocks of a prompt go from one server to the other."""


class RoleServer(Server):
    """A server of two data-parallel engines that computes prompts (kv_producer) or takes them over (kv_consumer).

    A step of a prefill server has one prompt for each engine, so that prompts make many steps.

    Args:
        role: kv_producer or kv_consumer.
        settings: the balancer's.
        folder: for its log and statistics.
        store: the folder between the servers.
    """

    def __init__(self, role: str, settings: dict[str, object], folder: Path, store: Path) -> None:
        super().__init__(2, settings, folder, 1 if role == "kv_producer" else 16)
        transfer = {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(store)},
        }
        # ExampleConnector names files by prompt and layer: tensor-parallel ranks would overwrite each other's heads.
        self.command[self.command.index("--tensor-parallel-size")] = "--data-parallel-size"
        self.command += [
            *("--kv-transfer-config", json.dumps(transfer), "--block-size", str(BLOCK)),
            # of a prompt in parts ExampleConnector keeps the first only
            *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "512"),
        ]


class _Listener(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that may wait; all prompts of a round arrive at once."""

    def handle_error(self, *_: Any) -> None:
        """Says nothing: the client and the servers' logs have the error."""


class Proxy:
    """Sends a request to the prefill server for one token, then to the decode server, whose answer it passes on. If a
    server fails, the proxy closes the connection without an answer.

    Args:
        prefill, decode: URLs of the servers.

    Attributes:
        url: of the proxy.
    """

    def __init__(self, prefill: str, decode: str) -> None:
        self._client = httpx.Client(timeout=300, limits=ONE_EACH, trust_env=False)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                proxy.post(prefill, {**request, "max_tokens": 1})
                proxy.between()
                answer = json.dumps(proxy.post(decode, request)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def post(self, url: str, request: dict[str, Any]) -> Any:
        """The answer of a server.

        Raises:
            httpx.HTTPError: it does not answer, or answers with an error.
        """
        response = self._client.post(f"{url}/v1/completions", json=request)
        response.raise_for_status()
        return response.json()

    def between(self) -> None:
        """Called when a prompt is computed, before the decode server is asked."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._client.close()


class Store:
    """The folder between the servers, with a folder for each prompt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Forgets all prompts; no request may be under way."""
        for entry in self.path.iterdir():
            shutil.rmtree(entry)
