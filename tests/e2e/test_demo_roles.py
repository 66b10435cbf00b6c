# SPDX-License-Identifier: Apache-2.0
"""The demo of a prefill server and a decode server, as ``make demo-pd`` runs it, with one domain of prompts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from examples.demo.server import REPOSITORY

pytestmark = pytest.mark.soak


def test_demo_of_two_servers_passes_and_leaves_figures(tmp_path):
    output = tmp_path / "demo-pd.json"
    options = ["--domains", "1", "--output", str(output), "--keep", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo.prefill_decode", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    figures = json.loads(output.read_text())
    assert list(figures) == ["prefill", "decode"]
    for server in figures.values():
        assert server["ok"]
        assert server["moves"] > 0
        assert server["tokens_equal"] == server["tokens_compared"] > 0
        assert server["cycles"]["failed"] == 0
    assert "External Cache Hit!" in (tmp_path / "kept" / "decode" / "server.log").read_text()
