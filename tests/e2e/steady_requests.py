# SPDX-License-Identifier: Apache-2.0
"""Send steady requests to a server and compare the answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field

import httpx

from examples.demo.traffic import ONE_EACH, completion

TOKENS = 48


STREAMS = 3


Pairs = list[tuple[str, list[int]]]
"""Prompts and the expected tokens of their answers."""


@dataclass
class Answers:
    """Results of the requests."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    aborted: int = 0
    tokens: int = 0
    wrong: int = 0
    first_wrong: str = ""


class Requests:
    """Keeps requests under way and compares every answer."""

    def __init__(self, url: str, pairs: Pairs) -> None:
        self.answers = Answers()
        self.pause = asyncio.Event()
        self.pause.set()
        self._luck = random.Random(0)
        self._pairs = pairs
        self._client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(240.0), limits=ONE_EACH)

    async def stream(self, luck: random.Random, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            await self.pause.wait()
            text, expected = luck.choice(self._pairs)
            try:
                response = await self._client.post("/v1/completions", json=completion(text, TOKENS))
                response.raise_for_status()
                got = response.json()["choices"][0]["token_ids"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.answers.failed.append(f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(1)
                continue
            self.answers.requests += 1
            self.answers.tokens += max(len(got), len(expected))
            wrong = max(len(got), len(expected)) - sum(a == b for a, b in zip(got, expected, strict=False))
            self.answers.wrong += wrong
            if wrong and not self.answers.first_wrong:
                self.answers.first_wrong = f"{text[:60]!r}: expected {expected}, got {got}"

    async def abort(self) -> None:
        """Begin a request and close the connection in the middle of the answer."""
        luck = self._luck
        request = completion(luck.choice(self._pairs)[0], 200) | {"stream": True}
        with contextlib.suppress(httpx.HTTPError):
            async with self._client.stream("POST", "/v1/completions", json=request) as response:
                count = luck.randint(1, 20)
                async for _ in response.aiter_lines():
                    count -= 1
                    if not count:
                        break
        self.answers.aborted += 1

    async def close(self) -> None:
        await self._client.aclose()
