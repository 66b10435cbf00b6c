# SPDX-License-Identifier: Apache-2.0
"""The live page: the report of a run that goes on, kept up to date by a few lines of script."""

from __future__ import annotations

import base64
import hashlib

from ..stats import EplbStats
from .page import document, run_parts, subtitle

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
    """The page without its contents, which the script fetches and keeps up to date."""
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
    """What the page shows of a run, as HTML without a document around it."""
    return "\n".join([subtitle(stats), *run_parts(stats)])
