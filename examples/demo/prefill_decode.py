# SPDX-License-Identifier: Apache-2.0
"""Runs the demo of separate prefill and decode servers: reference answers, both servers behind a proxy, prompts of two
domains, a summary for each server.

Exit status: 0 if on both servers experts moved, PAR was lower than with the start placement in the mean of every
domain's windows but the first, and all processes ended, and if all tokens were equal; 1 if not; 2 if a server could not
be run; 130 after Ctrl-C. Windows of a decode server are short of tokens, so that no single one of them is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

from examples.tiny_moe.expert_load import read_prompts
from vllm_ascend_eplb.observe.stats import CycleRecord, EplbStats

from .program import last_cycle, require_balancing, run_in_folder
from .reference import reference_tokens
from .roles import Proxy, RoleServer, Store
from .server import ServerError
from .summary import DomainResult, Summary
from .traffic import ONE_EACH, Tally, answer_of, completion
from .view import Clock, View, describe_cycle

DOMAINS = ("english", "python")
MOST_ROUNDS = 40
"""Rounds of a domain, until both servers have measured enough windows."""

COMMON: dict[str, object] = {
    "dynamic_eplb": True,
    "algorithm_execution_interval": 5,
    "calibrate": False,  # measured in time, a tiny model gains nothing from moves, but the demo must show moves
}
SETTINGS: dict[str, dict[str, object]] = {
    "prefill": {
        **COMMON,
        "num_redundant_experts": 4,
        "eplb_heat_collection_stage": "prefill",
        "expert_heat_collection_interval": 60,
    },
    "decode": {
        **COMMON,
        "num_redundant_experts": 0,
        "eplb_heat_collection_stage": "decode",
        "expert_heat_collection_interval": 100,
    },
}
"""By server. An interval is about two rounds of prompts."""


@dataclass
class Role:
    """One of the two servers, and what is known of its balancer."""

    name: str
    server: RoleServer
    stats: EplbStats = field(default_factory=EplbStats)
    results: list[DomainResult] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def look(self) -> list[CycleRecord]:
        """Reads the statistics; returns the cycles that have ended since the last look."""
        self.server.check_alive()
        known = last_cycle(self.stats)
        self.stats = self.server.stats() or self.stats
        return [record for record in self.stats.cycles if record.cycle > known]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.prefill_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("demo-pd.json"), help="where the figures go")
    parser.add_argument("--windows", type=int, default=3, help="collection windows of both servers in each domain")
    parser.add_argument("--domains", type=int, default=len(DOMAINS), help="domains of prompts, 1 or 2")
    parser.add_argument("--new-tokens", type=int, default=24, help="length of each answer")
    parser.add_argument("--keep", type=Path, help="keep the servers' logs and statistics in this folder")
    arguments = parser.parse_args()
    if arguments.windows < 2:
        parser.error(f"--windows {arguments.windows}: at least 2 are needed, one before and one after")
    if not 1 <= arguments.domains <= len(DOMAINS):
        parser.error(f"--domains {arguments.domains}: allowed are 1 to {len(DOMAINS)}")
    return arguments


async def ask_round(url: str, prompts: list[str], expected: list[list[int]], tokens: int, tally: Tally) -> None:
    """Sends all prompts of a domain at once, and compares the answers.

    Raises:
        httpx.HTTPError: no answer.
    """
    timeout = httpx.Timeout(240.0)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=ONE_EACH, trust_env=False) as client:

        async def ask(number: int) -> None:
            answer = await answer_of(client, completion(prompts[number], tokens))
            tally.compare(number, answer, expected[number])

        await asyncio.gather(*(ask(number) for number in range(len(prompts))))


def serve_domain(
    domain: str, roles: list[Role], proxy: Proxy, store: Store, expected: list[list[int]], windows: int, view: View
) -> Tally:
    """Asks all prompts of a domain, round after round, until both servers have measured ``windows`` windows."""
    view.say(f"prompts are now: {domain}")
    prompts, tally, began = read_prompts(domain), Tally(), time.monotonic()
    first_cycles = {role.name: last_cycle(role.stats) for role in roles}
    first_steps = {role.name: role.stats.step for role in roles}
    for _ in range(MOST_ROUNDS):
        store.clear()  # every round is computed anew
        asyncio.run(ask_round(proxy.url, prompts, expected, len(expected[0]), tally))
        for role in roles:
            for record in role.look():
                view.say(f"{role.name}: {describe_cycle(record)}")
            require_balancing(role.stats, f"{role.name}: ")
        if all(last_cycle(role.stats) >= first_cycles[role.name] + windows for role in roles):
            break
    else:
        raise ServerError(f"{domain}: no {windows} windows of both servers in {MOST_ROUNDS} rounds of the prompts")
    seconds = time.monotonic() - began
    for role in roles:
        records = [record for record in role.stats.cycles if record.cycle > first_cycles[role.name]]
        steps = role.stats.step - first_steps[role.name]
        role.results.append(DomainResult.of(domain, records, tally, steps, seconds, few_tokens=True))
    return tally


@contextlib.contextmanager
def both_servers(folder: Path, view: View, clock: Clock) -> Iterator[tuple[list[Role], Proxy, Store]]:
    """Both servers, ready, and the proxy before them."""
    store = Store(folder / "kv")
    store.path.mkdir(parents=True, exist_ok=True)
    roles = []
    for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        (folder / name).mkdir(exist_ok=True)
        roles.append(Role(name, RoleServer(role, SETTINGS[name], folder / name, store.path)))
    proxy = Proxy(*(role.server.url for role in roles))
    try:
        for role in roles:
            view.say(f"starting the {role.name} server: " + " ".join(role.server.command[1:]))
            role.server.start()
        for role in roles:
            for waited in role.server.wait_until_ready(timeout=600.0):
                view.waiting(f"starting two servers of two engines ... {waited:.0f} s")
        clock.lap("start-up")
        view.say("both servers are ready")
        yield roles, proxy, store
        clock.lap("traffic")
        time.sleep(2.0)  # /metrics looks at the statistics once a second
        for role in roles:
            role.look()
            role.metrics = role.server.metrics()
    finally:
        proxy.close()
        view.say("stopping the servers")
        for role in roles:
            role.left = role.server.stop()
        clock.lap("shutdown")


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    clock, domains = Clock(), DOMAINS[: arguments.domains]
    with View(console) as view:
        view.say("a run without balancing, in one process, for the tokens to compare with")
        expected = reference_tokens(list(domains), arguments.new_tokens, 24)
        clock.lap("reference")
        with both_servers(folder, view, clock) as (roles, proxy, store):
            tallies = [
                serve_domain(domain, roles, proxy, store, expected[domain], arguments.windows, view)
                for domain in domains
            ]
    difference = next((tally.first_difference for tally in tallies if tally.first_difference), "")
    summaries = {
        role.name: Summary(
            2,
            SETTINGS[role.name],
            role.results,
            role.stats,
            role.metrics,
            role.left,
            clock.laps,
            difference,
            against_start=True,
        )
        for role in roles
    }
    figures = {name: summary.to_dict() for name, summary in summaries.items()}
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    for name, summary in summaries.items():
        console.print(f"\n{name} server", style="bold")
        summary.show(console)
    console.print(f"figures: {arguments.output}; took {clock.total():.0f} s", markup=False, highlight=False)
    return 1 if any(summary.failures for summary in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(run_in_folder(run, parse_arguments(), "the servers' logs", "*/server.log"))
