# SPDX-License-Identifier: Apache-2.0
"""The folder of what tests keep for later sessions, and CI between runs: EPLB_TEST_CACHE, or build/test-cache."""

import os
from pathlib import Path


def folder() -> Path:
    return Path(os.environ.get("EPLB_TEST_CACHE") or Path(__file__).parents[1] / "build" / "test-cache")
