# SPDX-License-Identifier: Apache-2.0
"""Metrics: the statistics of the balancer as gauges ``vllm_eplb_*`` on the server's ``/metrics``.

If balancing is on, the front-end process starts a daemon thread that reads the statistics file once a second. Requests
and scrapes never wait for it, and the last cycle is shown even after traffic has ended. All values are gauges, totals
included, because several API servers show the same file (``multiprocess_mode="mostrecent"``).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from .stats import EplbStats, Par, PhaseName, StatsError
from .stats_file import read_stats, reported_elsewhere, stats_path

__all__ = ["EplbGauges", "StatsWatcher", "metrics_table", "read_stats", "watch"]


logger = logging.getLogger("vllm.eplb.metrics")  # only loggers under vllm have handlers in a server


class _Gauge:
    """A Prometheus gauge that has a sample only while it has a value.

    prometheus_client gives a new gauge without labels the value 0, also in the files that several API servers share. So
    the gauge is made with its first value. A value that is gone is removed; in those shared files, where that is not
    possible, it becomes NaN.
    """

    def __init__(self, name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self.name = name
        self.text = text
        self.labels = labels
        self._registry = registry
        self._made: Gauge | None = None
        self._shown: set[tuple[str, ...]] = set()

    def set(self, value: float | None, **labels: str) -> None:
        """Sets the value for these labels; None removes it."""
        key = tuple(labels[name] for name in self.labels)
        if value is None:
            if key in self._shown:
                self._clear(key)
            return
        if self._made is None:
            self._made = Gauge(
                self.name, self.text, self.labels, registry=self._registry, multiprocess_mode="mostrecent"
            )
        self._shown.add(key)
        (self._made.labels(*key) if self.labels else self._made).set(value)

    def register(self) -> None:
        """Registers the gauge again if it was removed from the registry."""
        if self._made is not None:
            with contextlib.suppress(ValueError):  # still there
                self._registry.register(self._made)

    def _clear(self, key: tuple[str, ...]) -> None:
        assert self._made is not None
        self._shown.discard(key)
        if not any(name in os.environ for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")):
            if self.labels:
                self._made.remove(*key)
            else:
                with contextlib.suppress(KeyError):  # it was removed already
                    self._registry.unregister(self._made)
                self._made = None
            return
        (self._made.labels(*key) if self.labels else self._made).set(math.nan)


def _without_value(stats: EplbStats) -> set[str]:
    """Names of the numbers that are 0 only because their event has not happened yet."""
    absent = set()
    if not stats.updated_at:
        absent.add("updated_at")
    if stats.par_planned is None:
        absent |= {"moves_planned", "planner_seconds"}
    if stats.cycles_done == 0:
        absent |= {"experts_moved_last", "control_wait_last_cycle_seconds"}
    if stats.audits == 0:
        absent.add("audit_damaged")
    absent |= {name for name in ("moe_ms", "moe_ms_start", "moe_ms_observed", "step_ms") if not getattr(stats, name)}
    if not (stats.moe_ms or stats.moe_time_saved_seconds):  # no layer was timed at start-up
        absent.add("moe_time_saved_seconds")
    if not (stats.plan_cost_seconds or stats.plan_saved_fraction):  # no plan was weighed by these times
        absent |= {"plan_saved_fraction", "plan_cost_seconds"}
    if "step_ms" in absent:
        absent |= {"step_ms_start", "step_time_saved_seconds"}
    return absent


class EplbGauges:
    """The gauges. Names are unique per registry, so make one object per registry.

    Args:
        registry: where to register them.
        parts: names of the server's balancers if it has several (pipeline stages); gauges then have a label ``part``.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, parts: Sequence[str] = ()) -> None:
        self.parts = tuple(parts)
        self._shown_info: dict[str, dict[str, str]] = {}
        common = ("part",) if parts else ()

        def gauge(name: str, text: str, *labels: str) -> _Gauge:
            return _Gauge(f"vllm_eplb_{name}", text, (*labels, *common), registry)

        par = "Peak-to-average ratio (PAR) of rank load over MoE layers, 1 is perfect: "
        self._par = {
            "par_before": gauge("par_before", par + "before the last cycle that moved experts.", "layers"),
            "par_predicted": gauge("par_predicted", par + "as the plan of that cycle predicted.", "layers"),
            "par_realised": gauge("par_realised", par + "in the window after that cycle.", "layers"),
            "par_planned": gauge("par_planned", par + "as the last plan predicts, carried out or not.", "layers"),
            "par_window": gauge("par_window", par + "in the last window.", "layers"),
            "par_window_start_placement": gauge(
                "par_window_start_placement",
                par + "in the last window, as it would have been with the start placement.",
                "layers",
            ),
            "par_window_observed": gauge(
                "par_window_observed",
                par + "in the last window, as it would have been with the plan of the window before (mode observe).",
                "layers",
            ),
        }
        over_windows = "95th percentile over the windows that the last plan was made from, "
        self._par |= {
            "p95_before": gauge("par_p95_before", par + over_windows + "with the placement in force.", "layers"),
            "p95_planned": gauge("par_p95_planned", par + over_windows + "as the plan predicts.", "layers"),
        }
        self._par |= {
            "dispatch_par_before": gauge(
                "dispatch_par_before", par + "before the last change of dispatch shares.", "layers"
            ),
            "dispatch_par_after": gauge(
                "dispatch_par_after",
                par + "in the same window with the new dispatch shares; no expert moves.",
                "layers",
            ),
        }
        self._cycles = gauge("cycles", "Balancing cycles so far, by result.", "result")
        self._failures = gauge("failures", "Cycles that failed so far, by kind of failure.", "kind")
        self._phase = gauge("phase", "1 for the current phase of the balancer, 0 for all others.", "phase")
        self._elsewhere = _Gauge(
            "vllm_eplb_reported_elsewhere",
            "1 where the API server that hosts DP rank 0 has the balancer's metrics, and this one has none.",
            ("dp_rank",),
            registry,
        )
        self._info = gauge(
            "info", "Always 1; the labels are the version and the settings in force.", "version", "policy", "mode"
        )
        self._numbers = {
            "step": gauge("steps", "Forward passes counted so far."),
            "experts_moved": gauge("experts_moved", "Experts moved so far."),
            "experts_moved_last": gauge("experts_moved_last_cycle", "Experts moved in the last cycle that moved any."),
            "dispatch_updates": gauge("dispatch_updates", "Changes of the dispatch shares so far."),
            "planner_starts": gauge("planner_starts", "Starts of the planner process so far."),
            "moves_planned": gauge("moves_planned", "Moves of the last plan, carried out or not."),
            "planner_seconds": gauge("planner_seconds", "Wall time of the last plan, in seconds."),
            "control_wait_seconds": gauge(
                "control_wait_seconds", "Seconds that steps waited for the ranks' agreement so far."
            ),
            "control_wait_last_cycle_seconds": gauge(
                "control_wait_last_cycle_seconds", "Seconds that steps of the last cycle waited for agreement."
            ),
            "control_wait_longest_seconds": gauge(
                "control_wait_longest_seconds", "Longest wait of one step for agreement, in seconds."
            ),
            "transfer_wait_seconds": gauge("transfer_wait_seconds", "Seconds that steps waited for transfers so far."),
            "commit_seconds": gauge("commit_seconds", "Seconds that steps spent on commits so far."),
            "commit_longest_seconds": gauge("commit_longest_seconds", "Longest commit in one step, in seconds."),
            "longest_step_seconds": gauge(
                "longest_step_seconds", "Longest time that balancing added to one step, in seconds."
            ),
            "moe_time_saved_seconds": gauge(
                "moe_time_saved_seconds",
                "Seconds of MoE layers saved so far against the start placement, predicted from the times measured "
                "at start-up and the load of each window.",
            ),
            "moe_ms": gauge(
                "moe_seconds",
                "Seconds of the MoE layers in an average step of the last window, by the times measured at start-up.",
            ),
            "moe_ms_start": gauge(
                "moe_seconds_start_placement",
                "Seconds of the MoE layers in an average step of the last window, as they would have been with the "
                "start placement.",
            ),
            "moe_ms_observed": gauge(
                "moe_seconds_observed",
                "Seconds of the MoE layers in an average step of the last window, as they would have been with the "
                "plan of the window before (mode observe).",
            ),
            "step_ms": gauge(
                "step_seconds",
                "Seconds from one step to the next in the last window, median by tokens per rank, while no cycle "
                "was active.",
            ),
            "step_ms_start": gauge(
                "step_seconds_start_placement",
                "Seconds from one step to the next, measured with the start placement for steps of as many tokens.",
            ),
            "step_time_saved_seconds": gauge(
                "step_time_saved_seconds",
                "Seconds saved so far against the start placement, measured: step time with the start placement minus "
                "step time since, summed over all compared steps. Effects of other changes are included.",
            ),
            "plan_saved_fraction": gauge(
                "plan_saved_fraction", "Fraction of MoE time that the last plan saves, carried out or not."
            ),
            "plan_cost_seconds": gauge("plan_cost_seconds", "Cost of carrying out the last plan once, in seconds."),
            "paused": gauge("paused", "1 while paused: cycles begin only when an operator orders one."),
            "audits": gauge("audits", "Audits of the weights in all slots so far."),
            "audit_damaged": gauge("audit_damaged_slots", "Damaged slots that the last audit found."),
            "audit_repaired": gauge("audit_repaired_slots", "Damaged slots that were repaired so far."),
            "updated_at": gauge("updated_timestamp_seconds", "Time of the last report, in seconds since 1970."),
        }

        # old names of renamed metrics; they stay for one release
        self._old_names = {"audit_repaired": gauge("audit_mended_slots", "Old name of vllm_eplb_audit_repaired_slots.")}

    def register(self) -> None:
        """Registers gauges again that were removed from the registry: when an engine starts, vLLM 0.23 (the version of
        vllm-ascend 0.23) unregisters everything with "vllm" in its name."""
        for gauge in self.gauges():
            gauge.register()

    def gauges(self) -> list[_Gauge]:
        return [
            *self._par.values(),
            self._cycles,
            self._failures,
            self._phase,
            self._info,
            *self._numbers.values(),
            self._elsewhere,
            *self._old_names.values(),
        ]

    def show_elsewhere(self, rank: int) -> None:
        """Shows that another API server has the metrics.

        Args:
            rank: first DP rank of this server.
        """
        self._elsewhere.set(1, dp_rank=str(rank))

    def show(self, stats: EplbStats, part: str = "") -> None:
        """Sets all gauges, or those of one part."""
        own = {"part": part} if self.parts else {}
        window = stats.window
        pars: dict[str, Par | None] = {
            "par_before": stats.par_before,
            "par_predicted": stats.par_predicted,
            "par_realised": stats.par_realised,
            "dispatch_par_before": stats.dispatch_par_before,
            "dispatch_par_after": stats.dispatch_par_after,
            "par_planned": stats.par_planned,
            "p95_before": stats.p95_before,
            "p95_planned": stats.p95_planned,
            "par_window": window.par if window else None,
            "par_window_start_placement": window.par_start if window else None,
            "par_window_observed": window.par_observed if window else None,
        }
        for name, par in pars.items():
            self._par[name].set(par.mean if par else None, layers="mean", **own)
            self._par[name].set(par.worst if par else None, layers="worst", **own)
        for result in ("done", "skipped", "failed"):
            self._cycles.set(getattr(stats, f"cycles_{result}"), result=result, **own)
        for kind, count in stats.failures.items():
            self._failures.set(count, kind=kind, **own)
        for phase in get_args(PhaseName):
            self._phase.set(phase == stats.phase, phase=phase, **own)
        info = {"version": stats.version, "policy": stats.policy, "mode": stats.mode}
        shown = self._shown_info.get(part)
        if shown is not None and shown != info:
            self._info.set(None, **shown, **own)
        self._shown_info[part] = info
        self._info.set(1, **info, **own)
        absent = _without_value(stats)
        for name, number in (*self._numbers.items(), *self._old_names.items()):
            value = None if name in absent else getattr(stats, name)
            number.set(1e-3 * value if value is not None and "_ms" in name else value, **own)
        rank = reported_elsewhere()
        if rank is not None:
            self._elsewhere.set(None, dp_rank=str(rank))


def metrics_table() -> str:
    """All gauges as a Markdown table: name, labels, meaning."""
    registry = CollectorRegistry()
    made = EplbGauges(registry)
    values = {"layers": "mean, worst", "result": "done, skipped, failed", "phase": ", ".join(get_args(PhaseName))}
    rows = ["| metric | labels | meaning |", "| --- | --- | --- |"]
    for gauge in made.gauges():
        labels = "; ".join(f"{name}: {values[name]}" if name in values else name for name in gauge.labels)
        rows.append(f"| `{gauge.name}` | {labels} | {gauge.text} |")
    return "\n".join(rows) + "\n"


class StatsWatcher:
    """Shows a statistics file on gauges whenever it changes. A missing or damaged file does not stop it.

    Args:
        path: of the file.
        gauges: gauges to set.
        interval: seconds between two reads.
        part: name of the balancer whose statistics these are, if the gauges are of several.
    """

    def __init__(self, path: str | os.PathLike[str], gauges: EplbGauges, interval: float = 1.0, part: str = "") -> None:
        self.path = Path(path)
        self.part = part
        self._gauges = gauges
        self._interval = interval
        self._seen: tuple[int, int] | None = None
        self._complained = False
        self._closing = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="eplb-metrics", daemon=True).start()

    def close(self) -> None:
        self._closing.set()

    def look(self) -> bool:
        """Shows the file if it changed since the last call, and returns whether it did. Never raises."""
        try:
            status = os.stat(self.path)
            version = (status.st_mtime_ns, status.st_ino)
            if version == self._seen:
                return False
            self._seen = version
            stats = read_stats(self.path)
            if stats is None:
                return False
            self._gauges.show(stats, self.part)
            return True
        except FileNotFoundError:
            return False  # nothing written yet
        except Exception as error:
            if not self._complained:
                kind = "" if isinstance(error, (StatsError, OSError)) else f"{type(error).__name__}: "
                logger.warning("EPLB metrics are not updated: %s%s", kind, error)
                self._complained = True
            return False

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._gauges.register()
            self.look()


watchers: list[StatsWatcher] = []


def watch(parts: Sequence[str] = ()) -> None:
    """Starts the watchers of this process, once. Never raises: metrics must not stop a server.

    Args:
        parts: names of the server's balancers if it has several; each has a statistics file of its own.
    """
    try:
        path = stats_path()
        if path is None:
            return
        if not watchers:
            gauges = EplbGauges(parts=parts)
            watchers.extend(StatsWatcher(path, gauges, part=part) for part in parts or ("",))
            rank = reported_elsewhere()
            if rank is not None:
                gauges.show_elsewhere(rank)
            for watcher in watchers:
                watcher.start()
        for watcher in watchers:
            watcher.path = stats_path(watcher.part) or watcher.path
    except Exception as error:
        logger.warning("EPLB metrics are not available: %s", error)
