# SPDX-License-Identifier: Apache-2.0
"""The live page: the report of a running server, updated by a few lines of script."""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from ..observe.stats import EplbStats, StatsError
from ..observe.stats_file import ELSEWHERE, read_stats, reported_elsewhere, stats_path
from .page import document, subtitle
from .run import run_parts

_SCRIPT = """
"use strict";
const body = document.getElementById("body"), state = document.getElementById("state");
let tag = "", failed = 0, timer = 0;
async function look() {
  window.clearTimeout(timer);
  try {
    const answer = await fetch("eplb/part", {headers: tag ? {"If-None-Match": tag} : {}, cache: "no-store"});
    if (answer.status === 200) {
      tag = answer.headers.get("ETag") || "";
      body.innerHTML = await answer.text();
      state.textContent = "";
    } else if (answer.status === 304) {
      state.textContent = "";
    } else {
      tag = "";
      state.textContent = await answer.text();
    }
    failed = 0;
  } catch (error) {
    failed += 1;
    state.textContent = "The server does not answer; trying again.";
  }
  window.clearTimeout(timer);
  if (!document.hidden) timer = window.setTimeout(look, Math.min(2000 * (1 + failed), 30000));
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
"""


def live_page() -> str:
    """The page without contents; its script fetches them and updates them."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    parts = [
        "<h1>Expert load balancing</h1>",
        '<p class="soft">Live. As JSON: <a href="eplb/stats">/eplb/stats</a></p>',
        '<p id="state" role="status" class="state"></p>',
        '<main id="body"></main>',
        f"<script>{_SCRIPT}</script>",
    ]
    return document("Expert load balancing", parts, f"script-src 'sha256-{digest}'; connect-src 'self'")


def live_body(stats: EplbStats) -> str:
    """The contents of the page for a run, as HTML without a document around it."""
    return "\n".join([subtitle(stats), *run_parts(stats)])


PATH = "/eplb"


HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class NoStatsError(Exception):
    """There are no statistics; the message says why."""


class StatsReader:
    """Reads the statistics file, and draws the page, once per change of the file."""

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
        """The contents of the page, as HTML, and a tag that changes with them.

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
            rank = reported_elsewhere()
            if rank is not None:
                raise NoStatsError(ELSEWHERE.format(rank=rank)) from None
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

        # Plain functions, not coroutines: FastAPI runs them in threads, so that they do not delay requests.
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
        """Does nothing: the routes do not use the engine."""


def _answer(request: Request, read: Callable[[], tuple[str, str]], kind: str) -> Response:
    try:
        content, tag = read()
    except NoStatsError as error:
        return Response(str(error), status_code=503, media_type="text/plain", headers=HEADERS)
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers={**HEADERS, "ETag": tag})
    return Response(content, media_type=kind, headers={**HEADERS, "ETag": tag})
