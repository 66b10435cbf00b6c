# SPDX-License-Identifier: Apache-2.0
"""All tests here need NPUs, emulated or real. Without NPUs they are skipped with the reason, or end with an error if
NPU_TEST_REQUIRED is 1, as in the targets of make."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import npus, serving


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


@pytest.fixture(scope="session", autouse=True)
def nurseries() -> Iterator[None]:
    yield
    npus.close_nurseries()


@pytest.fixture(scope="session")
def batches() -> list[list[str]]:
    """Batches of prompts, one per domain."""
    return serving.prompts(3)


@pytest.fixture(scope="session")
def want(tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]]) -> list[list[list[int]]]:
    """The answers of transformers, by batch."""
    texts = [text for batch in batches for text in batch]
    flat = serving.transformers_tokens(tmp_path_factory.mktemp("transformers"), texts, serving.TOKENS)
    return [flat[i : i + len(batches[0])] for i in range(0, len(flat), len(batches[0]))]
