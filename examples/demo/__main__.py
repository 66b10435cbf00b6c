# SPDX-License-Identifier: Apache-2.0
"""Runs the demo: reference answers, server, traffic of changing domains, summary.

Exit status: 0 if experts moved, PAR fell in every domain, all tokens were equal and the server ended cleanly;
1 if not; 2 if the server could not be run; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from examples.tiny_moe.expert_load import read_prompts
from vllm_ascend_eplb.observe.stats import EplbStats

from .program import last_cycle, require_balancing, run_in_folder
from .reference import reference_tokens
from .server import Server, ServerError
from .summary import DomainResult, Summary
from .traffic import Traffic
from .view import Clock, View

DOMAINS = ("english", "python", "russian", "japanese")
STREAMS = 24
"""Requests under way at a time: as many as a domain has prompts, so that every window sees the same mixture."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="expert-parallel size (default 4; 2 for small machines)")
    parser.add_argument("--output", type=Path, default=Path("demo.json"), help="where the figures go")
    parser.add_argument("--windows", type=int, help="collection windows in each domain (default 4, with 2 ranks 3)")
    parser.add_argument("--interval", type=int, help="steps of a window (default 100, with 2 ranks 200)")
    parser.add_argument("--new-tokens", type=int, default=48, help="length of each answer")
    parser.add_argument("--policy", help="policy by name (default: the package's)")
    parser.add_argument("--keep", type=Path, help="keep the server's log and statistics in this folder")
    arguments = parser.parse_args()
    if arguments.ranks < 2 or 64 % arguments.ranks:
        parser.error(f"--ranks {arguments.ranks}: allowed are 2, 4, 8, 16, 32 and 64, which divide 64 experts")
    if arguments.windows is None:
        arguments.windows = 3 if arguments.ranks == 2 else 4
    if arguments.windows < 2:
        parser.error(f"--windows {arguments.windows}: at least 2 are needed, one before and one after")
    return arguments


async def serve_domains(server: Server, traffic: Traffic, windows: int, view: View) -> list[DomainResult]:
    """Send the traffic of the domains in turn, each for ``windows`` windows."""
    results: list[DomainResult] = []
    traffic.switch(DOMAINS[0])
    running = asyncio.create_task(traffic.run())
    try:
        stats = server.stats() or EplbStats()
        for domain in DOMAINS:
            view.say(f"traffic is now: {domain}")
            traffic.switch(domain)
            begin, first_step, first_cycle = time.monotonic(), stats.step, last_cycle(stats)
            while last_cycle(stats) < first_cycle + windows and stats.phase != "off":
                await asyncio.sleep(0.1)
                server.check_alive()
                if running.done():
                    running.result()  # raises what ended it
                if time.monotonic() - begin > 60.0 * windows:
                    raise ServerError(f"{domain}: no {windows} windows within {60 * windows} s")
                stats = server.stats() or stats
                require_balancing(stats)
                view.update(domain, stats, traffic.text)
            # the next domain begins at once, while the last answers of this domain are still being generated
            records = [record for record in stats.cycles if record.cycle > first_cycle]
            result = DomainResult.of(
                domain, records, traffic.tallies[domain], stats.step - first_step, time.monotonic() - begin
            )
            results.append(result)
        traffic.stop()
        await running
    finally:
        running.cancel()
    for result in results:  # count the answers that arrived after the switch
        tally = traffic.tallies[result.domain]
        result.requests, result.tokens_compared, result.tokens_equal = (
            tally.requests,
            tally.tokens_compared,
            tally.tokens_equal,
        )
    return results


def run(arguments: argparse.Namespace, console: Console, folder: Path) -> int:
    clock = Clock()
    prompts = {domain: read_prompts(domain) for domain in DOMAINS}
    settings: dict[str, object] = {
        "dynamic_eplb": True,
        "num_redundant_experts": 2 * arguments.ranks,
        "expert_heat_collection_interval": arguments.interval or (200 if arguments.ranks == 2 else 100),
        "algorithm_execution_interval": 5,
        "calibrate": False,  # measured in time, a tiny model gains nothing from moves, but the demo must show moves
    }
    if arguments.policy:
        settings["policy"] = arguments.policy
    server = Server(arguments.ranks, settings, folder, STREAMS)
    left: list[str] = []
    with View(console) as view:
        view.say("a run without balancing, in one process, for the tokens to compare with")
        expected = reference_tokens(list(DOMAINS), arguments.new_tokens, STREAMS)
        clock.lap("reference")
        view.say("starting the server: " + " ".join(server.command[1:]))
        server.start()
        try:
            for waited in server.wait_until_ready(timeout=600.0):
                view.waiting(f"starting vLLM with {arguments.ranks} ranks ... {waited:.0f} s")
            clock.lap("start-up")
            view.say("the server is ready")
            traffic = Traffic(server.url, prompts, expected, arguments.new_tokens, STREAMS)
            results = asyncio.run(serve_domains(server, traffic, arguments.windows, view))
            clock.lap("traffic")
            time.sleep(2.0)  # /metrics looks at the statistics once a second
            stats, metrics = server.stats(), server.metrics()
        finally:
            view.say("stopping the server")
            left = server.stop()
            clock.lap("shutdown")
    difference = next((tally.first_difference for tally in traffic.tallies.values() if tally.first_difference), "")
    summary = Summary(arguments.ranks, settings, results, stats or EplbStats(), metrics, left, clock.laps, difference)
    arguments.output.write_text(json.dumps(summary.to_dict(), indent=2) + "\n")
    summary.show(console)
    console.print(f"figures: {arguments.output}; took {clock.total():.0f} s", markup=False, highlight=False)
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(run_in_folder(run, parse_arguments(), "the server's log", "server.log"))
