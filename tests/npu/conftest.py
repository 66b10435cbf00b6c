# SPDX-License-Identifier: Apache-2.0
"""All tests here need NPUs, emulated or real; without them they are skipped with the reason."""

from pathlib import Path

import pytest

from . import npus


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = npus.missing()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.npu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
