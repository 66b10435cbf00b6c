# SPDX-License-Identifier: Apache-2.0
"""All tests here need NPUs, emulated or real; without them they are skipped with the reason. Where NPU_TEST_REQUIRED is
1, as in the targets of make, that is an error."""

import os
from pathlib import Path

import pytest

from . import npus


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = npus.missing()
    if reason and os.environ.get("NPU_TEST_REQUIRED") == "1":
        raise pytest.UsageError(reason)
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.npu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
