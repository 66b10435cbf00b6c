# SPDX-License-Identifier: Apache-2.0
"""The result of the demo: the figures of demo.json, and the reasons for a failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vllm_ascend_eplb.observe.stats import CycleRecord, EplbStats, Par

from .traffic import Tally


@dataclass
class DomainResult:
    """One domain. A window's PAR is measured with the placement that was in force during the window.

    Attributes:
        par_before: in the first window of the domain, with the placement that the previous domain left.
        par_after: in its last window, or in the mean of all but the first.
        par_without: the same with the start placement.
    """

    domain: str
    windows: int
    cycles_done: int
    moves: int
    steps: int
    seconds: float
    requests: int
    tokens_compared: int
    tokens_equal: int
    par_before: dict[str, float] | None
    par_after: dict[str, float] | None
    par_without: dict[str, float] | None
    par_by_window: list[float]

    @classmethod
    def of(
        cls, domain: str, records: list[CycleRecord], tally: Tally, steps: int, seconds: float, few_tokens: bool = False
    ) -> DomainResult:
        """``few_tokens``: whether windows differ by chance, because they have few tokens. PAR after, and without moves,
        is then the mean of all windows but the first, instead of the last one's."""
        measured = [record for record in records if record.par is not None]
        later = measured[1:] if few_tokens else measured[-1:]
        return cls(
            domain=domain,
            windows=len(measured),
            cycles_done=sum(record.result == "done" for record in records),
            moves=sum(record.moved for record in records),
            steps=steps,
            seconds=round(seconds, 1),
            requests=tally.requests,
            tokens_compared=tally.tokens_compared,
            tokens_equal=tally.tokens_equal,
            par_before=_par(measured[0].par) if measured else None,
            par_after=_mean([record.par for record in later]) if len(measured) > 1 else None,
            par_without=_mean([record.par_start for record in later]),
            par_by_window=[round(record.par.mean, 4) for record in measured if record.par],
        )


@dataclass
class Summary:
    ranks: int
    settings: dict[str, object]
    domains: list[DomainResult]
    stats: EplbStats
    metrics: dict[str, float]
    processes_left: list[str]
    seconds: dict[str, float]
    first_difference: str = ""
    against_start: bool = False
    """Whether PAR must be lower than with the start placement, instead of lower than in the first window."""
    failures: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.failures = list(self._find_failures())

    @property
    def tokens_compared(self) -> int:
        return sum(result.tokens_compared for result in self.domains)

    @property
    def tokens_equal(self) -> int:
        return sum(result.tokens_equal for result in self.domains)

    def _find_failures(self) -> list[str]:
        stats, failures = self.stats, []
        if not stats.cycles_done or not stats.experts_moved:
            failures.append("nothing was balanced: no expert moved")
        if stats.phase == "off":
            failures.append(f"balancing was switched off: {stats.off_reason}")
        for result in self.domains:
            worse = result.par_without if self.against_start else result.par_before
            if worse is None or result.par_after is None:
                failures.append(f"{result.domain}: fewer than two windows were measured")
            elif result.par_after["mean"] >= worse["mean"]:
                failures.append(f"{result.domain}: PAR did not fall")
        if not self.tokens_compared:
            failures.append("no tokens were compared")
        if self.tokens_equal != self.tokens_compared:
            failures.append(
                f"{self.tokens_compared - self.tokens_equal} of {self.tokens_compared} tokens differ "
                f"from the run without balancing; {self.first_difference}"
            )
        if not self.metrics.get("vllm_eplb_experts_moved"):
            failures.append("/metrics does not show the moved experts")
        if self.processes_left:
            failures.append(f"did not end with the server: {', '.join(self.processes_left)}")
        return failures

    def to_dict(self) -> dict[str, object]:
        stats = self.stats
        return {
            "ok": not self.failures,
            "failures": self.failures,
            "ranks": self.ranks,
            "version": stats.version,
            "settings": self.settings,
            "policy": stats.policy,
            "domains": [asdict(result) for result in self.domains],
            "moves": stats.experts_moved,
            "steps": stats.step,
            "requests": sum(result.requests for result in self.domains),
            "tokens_compared": self.tokens_compared,
            "tokens_equal": self.tokens_equal,
            "cycles": {
                "done": stats.cycles_done,
                "skipped": stats.cycles_skipped,
                "failed": stats.cycles_failed,
            },
            "longest_wait_seconds": stats.longest_step_seconds,
            "waits_seconds": {
                "control_total": stats.control_wait_seconds,
                "control_longest": stats.control_wait_longest_seconds,
                "transfer_total": stats.transfer_wait_seconds,
                "commit_total": stats.commit_seconds,
                "commit_longest": stats.commit_longest_seconds,
            },
            "metrics": self.metrics,
            "processes_left": self.processes_left,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }

    def show(self, console: Console) -> None:
        console.print("\nPAR of rank load, mean of layers (worst layer); unmoved: with the start placement")
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for column in ("traffic", "before", "after", "unmoved", "moves", "steps", "requests", "tokens equal"):
            table.add_column(column, justify="left" if column == "traffic" else "right", no_wrap=True)
        for result in self.domains:
            table.add_row(
                result.domain,
                _show(result.par_before),
                _show(result.par_after),
                _show(result.par_without),
                str(result.moves),
                str(result.steps),
                str(result.requests),
                f"{result.tokens_equal}/{result.tokens_compared}",
            )
        console.print(table)
        stats = self.stats
        console.print(
            f"{stats.experts_moved} experts moved in {stats.cycles_done} cycles ({stats.cycles_skipped} had nothing to "
            f"gain, {stats.cycles_failed} failed), {stats.step} steps; {self.tokens_equal} of {self.tokens_compared} "
            f"tokens equal to a run without balancing.\n"
            f"Longest wait caused by balancing: {stats.longest_step_seconds * 1000:.1f} ms in one step "
            f"(longest agreement {stats.control_wait_longest_seconds * 1000:.1f} ms, "
            f"longest commit {stats.commit_longest_seconds * 1000:.1f} ms).",
            highlight=False,
        )
        for failure in self.failures:
            console.print(f"FAILED: {failure}", style="bold red", markup=False, highlight=False)
        if not self.failures:
            console.print("OK", style="bold green")


def _par(par: Par | None) -> dict[str, float] | None:
    return None if par is None else {"mean": round(par.mean, 4), "worst": round(par.worst, 4)}


def _mean(pars: list[Par | None]) -> dict[str, float] | None:
    known = [par for par in pars if par is not None]
    if not known:
        return None
    return _par(Par(mean=fmean(par.mean for par in known), worst=fmean(par.worst for par in known)))


def _show(par: dict[str, float] | None) -> str:
    return "-" if par is None else f"{par['mean']:.3f} ({par['worst']:.3f})"
