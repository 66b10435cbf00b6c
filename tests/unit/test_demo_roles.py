# SPDX-License-Identifier: Apache-2.0
"""The demo of a prefill server and a decode server: its proxy, store, commands and arguments, without an engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.demo.prefill_decode import SETTINGS, parse_arguments
from examples.demo.roles import Proxy, RoleServer, Store

Asked = list[tuple[str, dict[str, Any]]]


class _Patient(ThreadingHTTPServer):
    request_queue_size = 128


@contextmanager
def answering(name: str, asked: Asked, status: int = 200) -> Iterator[str]:
    """A server that notes requests and answers with its name."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((name, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            answer = json.dumps({"from": name}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = _Patient(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_proxy_asks_prefill_for_one_token_then_decode() -> None:
    asked: Asked = []
    with answering("prefill", asked) as prefill, answering("decode", asked) as decode:
        proxy = Proxy(prefill, decode)
        request = {"prompt": "some text", "max_tokens": 24}
        answer = httpx.post(f"{proxy.url}/v1/completions", json=request, trust_env=False).json()
        proxy.close()
    assert answer == {"from": "decode"}
    assert asked == [("prefill", {**request, "max_tokens": 1}), ("decode", request)]


def test_proxy_takes_all_prompts_of_a_round_at_once() -> None:
    asked: Asked = []
    with answering("prefill", asked) as prefill, answering("decode", asked) as decode:
        proxy = Proxy(prefill, decode)
        with ThreadPoolExecutor(24) as pool:
            posts = [
                pool.submit(httpx.post, f"{proxy.url}/v1/completions", json={"number": n}, trust_env=False)
                for n in range(24)
            ]
            answers = [post.result().json() for post in posts]
        proxy.close()
    assert answers == [{"from": "decode"}] * 24
    assert sorted(request["number"] for name, request in asked if name == "decode") == list(range(24))


def test_proxy_gives_no_answer_if_prefill_fails() -> None:
    asked: Asked = []
    with answering("prefill", asked, status=500) as prefill, answering("decode", asked) as decode:
        proxy = Proxy(prefill, decode)
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{proxy.url}/v1/completions", json={"max_tokens": 24}, trust_env=False)
        proxy.close()
    assert [name for name, _ in asked] == ["prefill"]


def test_store_forgets_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / "layer.safetensors").write_bytes(b"keys and values")
    Store(tmp_path).clear()
    assert list(tmp_path.iterdir()) == []


def test_servers_have_their_roles_and_settings(tmp_path: Path) -> None:
    for name, role, sequences in (("prefill", "kv_producer", "1"), ("decode", "kv_consumer", "16")):
        command = RoleServer(role, SETTINGS[name], tmp_path, tmp_path / "kv").command

        def value(option: str, command: list[str] = command) -> str:
            return command[command.index(option) + 1]

        transfer = json.loads(value("--kv-transfer-config"))
        assert transfer["kv_role"] == role
        assert transfer["kv_connector_extra_config"] == {"shared_storage_path": str(tmp_path / "kv")}
        assert json.loads(value("--additional-config")) == {"eplb_config": SETTINGS[name]}
        assert (value("--data-parallel-size"), value("--max-num-seqs")) == ("2", sequences)
        assert "--tensor-parallel-size" not in command
    assert SETTINGS["prefill"] != SETTINGS["decode"]


@pytest.mark.parametrize("arguments", [["--windows", "1"], ["--domains", "0"], ["--domains", "3"]])
def test_arguments_out_of_range_are_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["prefill_decode", *arguments])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert f"{arguments[0]} {arguments[1]}: " in capsys.readouterr().err
