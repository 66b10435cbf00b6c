# SPDX-License-Identifier: Apache-2.0
"""Orders: commands of an operator to the balancer of a running server.

An order is one small JSON file beside the statistics file. ``vllm-ascend-eplb control`` writes it, and a thread of EP
rank 0 reads it. The order then travels as an agreed fact (``Facts.order``), so that it takes effect on all ranks at the
same step. A later order replaces an order that was not taken yet. The statistics show the result.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..agreement.phases import Command
from ..files.disk import write_private

logger = logging.getLogger("vllm.eplb")


MAX_ORDER_BYTES = 4096


LOOK_SECONDS = 0.25
"""Seconds between two looks of EP rank 0 for an order."""


MAX_INTERVAL = 10_000_000


Interval = Annotated[int, Field(ge=1, le=MAX_INTERVAL)]


class OrderError(ValueError):
    """An order file holds no order, or belongs to a user who may not give orders."""


class Order(BaseModel):
    """One order.

    Attributes:
        id: identifies the order; the statistics have the id of the last order that was taken.
        command: pause (begin no more cycles; one under way is completed), resume, cycle (one now, paused or not),
            restore (move every expert back to its start slots, and pause there), reapply (move experts back to where
            they were before they last went to their start slots), intervals.
        collect_steps, execution_steps: for ``intervals``: new values of ``expert_heat_collection_interval`` and
            ``algorithm_execution_interval``; None keeps a value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=64)] = Field(default_factory=lambda: secrets.token_hex(8))
    command: Literal["pause", "resume", "cycle", "restore", "reapply", "intervals"]
    collect_steps: Interval | None = None
    execution_steps: Interval | None = None

    @model_validator(mode="after")
    def _fits(self) -> Order:
        given = self.collect_steps is not None or self.execution_steps is not None
        if given != (self.command == "intervals"):
            raise ValueError("collect_steps and execution_steps belong to the command intervals, which needs one")
        return self


@dataclass(frozen=True)
class NumberedOrder:
    """An order and its number on EP rank 0, from 1."""

    number: int
    order: Order


def orders_path(stats_path: str | os.PathLike[str]) -> Path:
    """Path of the order file of the server with this statistics file."""
    path = Path(stats_path)
    return path.with_name(f"{path.name}.order")


def write_order(path: str | os.PathLike[str], order: Order) -> None:
    """Writes an order file for EP rank 0; readable by its owner only.

    Raises:
        OSError: the file cannot be written.
    """
    write_private(path, order.model_dump_json())


def read_order(path: str | os.PathLike[str]) -> Order | None:
    """Reads the order in a file; None if there is no file.

    Raises:
        OrderError: the file is not the server user's own, may be written by others, or holds no order.
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OrderError(f"{os.fspath(path)} is not a regular file")
        if status.st_uid != os.geteuid():
            raise OrderError(f"{os.fspath(path)} belongs to user {status.st_uid}; orders come from {os.geteuid()} only")
        if status.st_mode & 0o022:
            raise OrderError(f"{os.fspath(path)} may be written by other users (mode {status.st_mode & 0o777:o})")
        text = file.read(MAX_ORDER_BYTES + 1)
    if len(text) > MAX_ORDER_BYTES:
        raise OrderError(f"{os.fspath(path)} has more than {MAX_ORDER_BYTES} bytes")
    try:
        return Order.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the text"
        raise OrderError(f"{os.fspath(path)} holds no order: {where}: {first['msg']}") from None


@dataclass(frozen=True)
class OrderFacts:
    """The fields of ``Facts`` for an order; zeros without one."""

    order: int = 0
    order_command: int = 0
    order_collect_steps: int = 0
    order_execution_steps: int = 0


class PostedOrders:
    """Orders that EP rank 0 has posted, until they take effect; empty on the other ranks."""

    def __init__(self) -> None:
        self._posted: dict[int, Order] = {}

    def facts(self, newest: NumberedOrder | None, taken: int) -> OrderFacts:
        """The facts to post about the newest order.

        Args:
            newest: the newest order, or None.
            taken: number of the last order that took effect.
        """
        if newest is None or newest.number <= taken:
            return OrderFacts()
        order = self._posted[newest.number] = newest.order
        command = Command[order.command.upper()]
        return OrderFacts(newest.number, command, order.collect_steps or 0, order.execution_steps or 0)

    def take(self, number: int) -> Order | None:
        """The order with this number, which has taken effect; None on ranks that did not post it."""
        order = self._posted.get(number)
        self._posted = {posted: kept for posted, kept in self._posted.items() if posted > number}
        return order


class OrderBox:
    """Reads the order file on EP rank 0. The step thread reads a variable; a daemon thread reads the disk.

    A file from before the start is removed and never obeyed.

    Args:
        path: path of the order file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.newest: NumberedOrder | None = None
        self._seen: tuple[int, int] | None = None
        self._closing = threading.Event()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._thread = threading.Thread(target=self._run, name="eplb-orders", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Reads the file if it is new. Never raises: a bad order must not stop a server."""
        try:
            status = os.lstat(self.path)
            version = (status.st_mtime_ns, status.st_ino)
            if version == self._seen:
                return
            self._seen = version
            order = read_order(self.path)
        except FileNotFoundError:
            return
        except (OrderError, OSError) as error:
            logger.warning("EPLB order ignored: %s", error)
            return
        known = self.newest
        if order is not None and (known is None or known.order.id != order.id):
            self.newest = NumberedOrder(known.number + 1 if known else 1, order)

    def close(self) -> None:
        """Ends the thread and removes the file."""
        self._closing.set()
        self._thread.join(2.0)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _run(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            self.look()
