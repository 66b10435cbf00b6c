# SPDX-License-Identifier: Apache-2.0
"""Streams of greedy completions whose domain can be switched at any time."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

ONE_EACH = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request: a server closes idle connections, perhaps just when one is used again."""


@dataclass
class Tally:
    """Answers of one domain so far, compared with the reference token by token."""

    requests: int = 0
    tokens_compared: int = 0
    tokens_equal: int = 0
    first_difference: str = ""

    def compare(self, prompt: int, answer: list[int], expected: list[int]) -> None:
        self.requests += 1
        self.tokens_compared += max(len(answer), len(expected))
        equal = sum(a == b for a, b in zip(answer, expected, strict=False))
        self.tokens_equal += equal
        if answer != expected and not self.first_difference:
            self.first_difference = f"prompt {prompt}: expected {expected}, got {answer}"


@dataclass
class Traffic:
    """Keeps ``streams`` requests under way until it is stopped.

    Args:
        url: of the server.
        prompts: texts of each domain.
        expected: greedy token ids of each prompt of each domain.
        max_new_tokens: length of each answer.
        streams: requests under way at a time.
    """

    url: str
    prompts: dict[str, list[str]]
    expected: dict[str, list[list[int]]]
    max_new_tokens: int
    streams: int
    domain: str = ""
    text: str = ""  # the answer that is being written in the first stream
    tallies: dict[str, Tally] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)
    _order: Iterator[int] = field(default_factory=itertools.count, init=False)
    _stopping: bool = field(default=False, init=False)

    def switch(self, domain: str) -> None:
        """Take new requests from this domain."""
        self.domain = domain
        self.tallies.setdefault(domain, Tally())
        self._order = itertools.count()

    def stop(self) -> None:
        """Finish the requests under way and begin no new ones."""
        self._stopping = True

    async def run(self) -> None:
        """Send requests; return when stopped and all answers have arrived.

        Raises:
            httpx.HTTPError: the server does not answer, or answers with an error.
        """
        timeout = httpx.Timeout(120.0)
        # trust_env: the server is on this machine, so a proxy of the environment must not be used.
        async with httpx.AsyncClient(base_url=self.url, timeout=timeout, limits=ONE_EACH, trust_env=False) as client:
            await asyncio.gather(*(self._stream(client, shown=number == 0) for number in range(self.streams)))

    async def _stream(self, client: httpx.AsyncClient, shown: bool) -> None:
        while not self._stopping:
            domain = self.domain
            turn, place = divmod(next(self._order), len(self.prompts[domain]))
            prompt = (place + turn) % len(self.prompts[domain])  # all in turn, a different one in each stream
            request = completion(self.prompts[domain][prompt], self.max_new_tokens)
            answer = await (self._answer_live(client, request) if shown else answer_of(client, request))
            self.tokens[domain] += len(answer)
            self.tallies[domain].compare(prompt, answer, self.expected[domain][prompt])

    async def _answer_live(self, client: httpx.AsyncClient, request: dict[str, object]) -> list[int]:
        answer: list[int] = []
        self.text = ""
        async with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    choice = json.loads(line[len("data: ") :])["choices"][0]
                    answer += choice["token_ids"] or []
                    self.text += choice["text"]
        return answer


def completion(prompt: str, tokens: int) -> dict[str, object]:
    """The request for a greedy answer of so many tokens, by their ids."""
    return {
        "model": "tiny-moe",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def answer_of(client: httpx.AsyncClient, request: dict[str, object]) -> list[int]:
    """The token ids of an answer.

    Raises:
        httpx.HTTPError: the server does not answer, or answers with an error.
    """
    response = await client.post("/v1/completions", json=request)
    response.raise_for_status()
    answer: list[int] = response.json()["choices"][0]["token_ids"]
    return answer
