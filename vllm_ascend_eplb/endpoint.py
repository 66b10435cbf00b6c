# SPDX-License-Identifier: Apache-2.0
"""The live page: ``/eplb`` on vLLM's API server, and ``/eplb/stats``, the same as JSON. Both only read.

An entry point of ``vllm.endpoint_plugins``, which vLLM loads only where ``VLLM_PLUGINS`` names it. The routes read the
statistics file that EP rank 0 writes, as ``/metrics`` does: no request reaches the engine, and with several API servers
each shows the same. A page is drawn once for each new file, in a thread of its own, however many watch it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from .report.live import live_body, live_page
from .stats import EplbStats, StatsError, read_stats, stats_path

PATH = "/eplb"
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class NoStatsError(Exception):
    """There are no statistics; the message says why."""


class StatsReader:
    """The statistics file as it is now, read and drawn once per change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple[str, int, int] | None = None
        self._stats: EplbStats | None = None
        self._body: str | None = None

    def json(self) -> tuple[str, str]:
        """The statistics as JSON, and a tag that changes with them.

        Raises:
            NoStatsError: there are none, or they cannot be read.
        """
        with self._lock:
            stats, tag = self._read()
            return stats.to_json(), tag

    def body(self) -> tuple[str, str]:
        """What the page shows, as HTML, and a tag that changes with it.

        Raises:
            NoStatsError: there are no statistics, or they cannot be read.
        """
        with self._lock:
            stats, tag = self._read()
            if self._body is None:
                self._body = live_body(stats)
            return self._body, tag

    def _read(self) -> tuple[EplbStats, str]:
        path = stats_path()
        if path is None:
            raise NoStatsError("balancing is off in this server: eplb_config does not set dynamic_eplb")
        try:
            status = os.stat(path)
            seen = (os.fspath(path), status.st_mtime_ns, status.st_ino)
            if seen != self._seen or self._stats is None:
                stats = read_stats(path)
                if stats is None:
                    raise FileNotFoundError
                self._seen, self._stats, self._body = seen, stats, None
        except FileNotFoundError:
            raise NoStatsError(
                "the balancer has not reported yet: its first report comes with its first steps"
            ) from None
        except (StatsError, OSError) as error:
            raise NoStatsError(f"the statistics cannot be read: {error}") from None
        return self._stats, f'"{self._seen[1]:x}-{self._seen[2]:x}"'


class EplbPage:
    """vLLM's endpoint plugin (``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``)."""

    name = "eplb_page"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Registers the routes."""
        reader = StatsReader()

        # These are no coroutines: FastAPI runs them in threads, so that reading and drawing hold up no request.
        def page() -> Response:
            return Response(live_page(), media_type="text/html", headers=HEADERS)

        def part(request: Request) -> Response:
            return _answer(request, reader.body, "text/html")

        def stats(request: Request) -> Response:
            return _answer(request, reader.json, "application/json")

        app.add_api_route(PATH, page, methods=["GET"], include_in_schema=False)
        app.add_api_route(f"{PATH}/part", part, methods=["GET"], include_in_schema=False)
        app.add_api_route(f"{PATH}/stats", stats, methods=["GET"], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing: the routes ask nothing of the engine."""


def _answer(request: Request, read: Callable[[], tuple[str, str]], kind: str) -> Response:
    try:
        content, tag = read()
    except NoStatsError as error:
        return Response(str(error), status_code=503, media_type="text/plain", headers=HEADERS)
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={**HEADERS, "ETag": tag})
    return Response(content, media_type=kind, headers={**HEADERS, "ETag": tag})
