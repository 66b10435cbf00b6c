# SPDX-License-Identifier: Apache-2.0
"""The live page: the answers of the routes, and the page in a real browser while the statistics change."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from examples.demo.port import free_port
from tests.windows import rank_window
from vllm_ascend_eplb.files.run_folder import STATS_VARIABLE
from vllm_ascend_eplb.observe.keeper import StatsKeeper
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile
from vllm_ascend_eplb.report.live import EplbPage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def statistics(cycles: int, reason: str = "") -> EplbStats:
    keeper = StatsKeeper("1.0", "incremental", "balance")
    for number in range(cycles):
        keeper.step += 100
        keeper.window_ended(rank_window([[22.0 + number, 18.0], [20.0, 20.0]], [[30.0, 10.0], [20.0, 20.0]]))
        keeper.planned([1.0, 1.0], 0.25, 3)
        keeper.cycle_ended("done", moved=3, reason=reason)
    return keeper.stats()


class Page:
    """A web server with the plugin's routes, in a thread."""

    def __init__(self, stats: Path) -> None:
        self.stats = stats
        self.asked: list[str] = []
        app = FastAPI()
        EplbPage().attach_router(app)

        @app.middleware("http")
        async def note(request, call_next):
            self.asked.append(request.url.path)
            if self.asked.count("/eplb/part") == 3:  # new statistics between two requests of the page
                self.write(statistics(7))
            return await call_next(request)

        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)

    def write(self, stats: EplbStats) -> None:
        StatsFile(self.stats).write(stats)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=20)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setenv(STATS_VARIABLE, str(tmp_path / "stats.json"))
    made = Page(tmp_path / "stats.json")
    yield made
    made.server.should_exit = True
    made.thread.join(20)


def test_statistics_are_served_as_json(page: Page) -> None:
    assert page.get("/eplb/stats").status_code == 503
    assert "has not reported yet" in page.get("/eplb/stats").text
    page.write(statistics(2))
    answer = page.get("/eplb/stats")
    assert answer.headers["content-type"] == "application/json"
    assert EplbStats.from_json(answer.text).cycles_done == 2
    again = page.get("/eplb/stats", **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    page.write(statistics(3))
    changed = page.get("/eplb/stats", **{"If-None-Match": answer.headers["etag"]})
    assert EplbStats.from_json(changed.text).cycles_done == 3


def test_broken_statistics_are_a_clear_error(page: Page) -> None:
    page.stats.write_text('{"hello": 1}')
    answer = page.get("/eplb/part")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "text/plain; charset=utf-8")
    assert "not statistics" in answer.text


def test_page_only_reads(page: Page) -> None:
    page.write(statistics(1))
    for path in ("/eplb", "/eplb/part", "/eplb/stats"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert httpx.request(method, page.url + path).status_code == 405


def test_page_says_that_balancing_is_off(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATS_VARIABLE)
    assert "balancing is off in this server" in page.get("/eplb/part").text


def test_vllm_finds_the_plugin() -> None:
    (point,) = [p for p in metadata.entry_points(group="vllm.endpoint_plugins") if p.name == "eplb_page"]
    plugin = point.load()()
    assert plugin.name == "eplb_page"
    assert plugin.required_tasks is None
    assert callable(plugin.attach_router)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian package chromium)")
def test_page_in_chromium_follows_the_statistics(page: Page, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    page.write(statistics(1, reason="</main><script>alert(1)</script>"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0"]
    command += ["--window-size=390,2500", f"--screenshot={tmp_path / 'shot.png'}", "--virtual-time-budget=15000"]
    done = subprocess.run(
        [*command, "--dump-dom", page.url + "/eplb"], capture_output=True, text=True, timeout=120, check=False
    )
    document, log = done.stdout, done.stderr
    assert page.asked.count("/eplb/part") >= 3
    assert "<b>7</b><span>cycles done; 0 skipped, 0 failed</span>" in document
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert set(page.asked) == {"/eplb", "/eplb/part"}
    assert (tmp_path / "shot.png").stat().st_size > 10_000
