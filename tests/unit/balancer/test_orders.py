# SPDX-License-Identifier: Apache-2.0
"""Orders to a running balancer: the file, its permissions, and the command that writes it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from vllm_ascend_eplb.balancer.orders import Order, OrderBox, OrderError, orders_path, read_order, write_order
from vllm_ascend_eplb.cli import app
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile


def test_written_order_is_read_and_private(tmp_path: Path) -> None:
    path = orders_path(tmp_path / "stats.json")
    assert read_order(path) is None
    order = Order(command="intervals", collect_steps=7)
    write_order(path, order)
    assert read_order(path) == order
    assert path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json.order"]


@pytest.mark.parametrize(
    "fields",
    [
        {"command": "stop"},
        {"command": "intervals"},
        {"command": "pause", "collect_steps": 3},
        {"command": "intervals", "collect_steps": 0},
        {"command": "intervals", "execution_steps": 10_000_001},
        {"command": "intervals", "collect_steps": 3.0},
        {"command": "pause", "id": ""},
        {"command": "pause", "more": 1},
    ],
)
def test_invalid_order_is_refused(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Order(**fields)  # type: ignore[arg-type]
    path = tmp_path / "order"
    path.write_text(json.dumps({"id": "a", **fields}))
    with pytest.raises(OrderError, match="holds no order"):
        read_order(path)


def test_order_file_of_other_users_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "order"
    write_order(path, Order(command="pause"))
    path.chmod(0o620)
    with pytest.raises(OrderError, match="may be written by other users"):
        read_order(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match=r"symbolic links|Too many levels"):
        read_order(link)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(OrderError, match="belongs to user 12345"):
            read_order(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OrderError, match="not a regular file"):
        read_order(path)
    path.unlink()
    path.write_text("{" + " " * 5000)
    path.chmod(0o600)
    with pytest.raises(OrderError, match="more than 4096 bytes"):
        read_order(path)


def test_box_numbers_orders_and_ignores_earlier_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "order"
    write_order(path, Order(command="pause"))
    box = OrderBox(path)
    try:
        box.look()
        assert box.newest is None
        assert not path.exists()
        for number, command in enumerate(("pause", "resume"), start=1):
            write_order(path, Order(command=command))
            box.look()
            box.look()
            assert box.newest is not None
            assert (box.newest.number, box.newest.order.command) == (number, command)
        path.write_text("{}")
        box.look()
        assert box.newest.number == 2
        assert "EPLB order ignored" in caplog.text
    finally:
        box.close()
    assert not path.exists()


def control(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["control", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


class Obedient(threading.Thread):
    """A server that takes every order."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.orders, self.closing = path, list[Order](), threading.Event()

    def run(self) -> None:
        while not self.closing.wait(0.02):
            order = read_order(orders_path(self.path))
            if order is not None and order not in self.orders:
                self.orders.append(order)
                stats = EplbStats(order=order.id, order_step=9, paused=order.command == "pause", collect_steps=5)
                StatsFile(self.path).write(stats)


def test_control_waits_for_the_effect(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    StatsFile(path).write(EplbStats())
    server = Obedient(path)
    server.start()
    try:
        assert "pause took effect on all ranks at step 9; paused" in control("pause", "--stats-file", path)
        said = json.loads(
            control("intervals", "--collect-steps", 5, "--execution-steps", 2, "--stats-file", path, "--json")
        )
        assert (said["taken"], said["order_step"], said["paused"]) == (True, 9, False)
        assert (server.orders[1].collect_steps, server.orders[1].execution_steps) == (5, 2)
    finally:
        server.closing.set()
        server.join()
    assert "is pending" in control("cycle", "--stats-file", path, "--timeout", 0.1, status=1)


def test_every_balancer_of_a_server_gets_the_order(tmp_path: Path) -> None:
    servers = [Obedient(tmp_path / name) for name in ("stats-pp0.json", "stats-pp1.json")]
    for server in servers:
        StatsFile(server.path).write(EplbStats())
        server.start()
    try:
        said = control("pause", "--stats-file", tmp_path / "stats.json")
        assert "stats-pp0: pause took effect" in said
        assert "stats-pp1: pause took effect" in said
    finally:
        for server in servers:
            server.closing.set()
            server.join()
    said = control("resume", "--stats-file", tmp_path / "stats.json", "--timeout", 0.1, "--json", status=1)
    assert json.loads(said)["taken"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["intervals"], "needs one of them"),
        (["pause", "--collect-steps", "5"], "go with intervals"),
        (["intervals", "--collect-steps", "0"], "--collect-steps"),
        (["stop"], "stop"),
    ],
)
def test_control_refuses_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    StatsFile(tmp_path / "stats.json").write(EplbStats())
    assert message in control(*arguments, "--stats-file", tmp_path / "stats.json", status=2)
    assert not orders_path(tmp_path / "stats.json").exists()


def test_control_finds_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPLB_STATS_FILE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "no server of this user found" in control("pause", status=2)
    for name in "ab":
        (tmp_path / f"vllm-eplb-{name}").mkdir()
        StatsFile(tmp_path / f"vllm-eplb-{name}" / "stats.json").write(EplbStats())
        if name == "a":
            control("pause", "--timeout", 0, status=1)
            assert read_order(orders_path(tmp_path / "vllm-eplb-a" / "stats.json")) is not None
    assert "2 servers found" in control("pause", status=2)
    off = tmp_path / "off.json"
    assert "does not exist" in control("pause", "--stats-file", off, status=2)
    StatsFile(off).write(EplbStats(phase="off", off_reason="planted"))
    assert "off in this server (planted)" in control("pause", "--stats-file", off, status=2)
