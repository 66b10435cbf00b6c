# SPDX-License-Identifier: Apache-2.0
"""``watch``: shows the balancer of a running server in the terminal, from ``/metrics``."""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..observe.stats_file import ELSEWHERE
from .output import CommandError, JsonOption, console, fail, print_json, show_seconds

PREFIX = "vllm_eplb_"
MAX_PAGE_BYTES = 64 << 20
KEPT = 60
BARS = "▁▂▃▄▅▆▇█"

Sample = dict[str, float | str]
"""One reading: metric names without prefix, labels appended with dots."""


LOCAL_NAMES = ("localhost", "localhost.localdomain", "localhost4", "localhost6", "ip6-localhost", "ip6-loopback")
"""Names of this machine in the /etc/hosts of common systems."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


@dataclass
class History:
    """The readings since the start."""

    par: deque[float]
    samples: int = 0
    error: str = ""


def watch(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server, such as http://localhost:8000.")],
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Seconds between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Read once and exit.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=600.0, help="Seconds to wait for an answer.")] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Watch the balancer of a running server; Ctrl-C ends it. With --json one line per reading."""
    try:
        address = metrics_url(url)
        sample = look(address, timeout)  # the first reading must work; later ones may fail for a while
    except CommandError as error:
        fail(str(error), as_json)
    history = History(deque(maxlen=KEPT))
    _keep(history, sample)
    if once or as_json:
        _print(sample, history, url, as_json)
        while not once:
            time.sleep(interval)
            try:
                print_json(look(address, timeout))
            except CommandError as error:
                print_json({"error": str(error)})
        return
    with Live(panel(sample, history, url), console=console(), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                sample = look(address, timeout)
                history.error = ""
                _keep(history, sample)
            except CommandError as error:
                history.error = str(error)
            live.update(panel(sample, history, url), refresh=True)


def metrics_url(url: str) -> str:
    """The address of the metrics page of a server.

    Raises:
        CommandError: ``url`` is not an address of a web server.
    """
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  # raises if it is not a port
    except ValueError as error:
        raise CommandError(f"{url[:200]} is not an address ({error}); give one such as http://localhost:8000") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CommandError(f"{url[:200]} is not an address of a server; give one such as http://localhost:8000")
    path = parts.path.rstrip("/")
    return urllib.parse.urlunsplit(
        (parts.scheme, parts.netloc, path if path.endswith("/metrics") else path + "/metrics", parts.query, "")
    )


def look(address: str, timeout: float) -> Sample:
    """Reads the balancer's metrics once.

    Raises:
        CommandError: the server cannot be reached, answers something else, or has no balancer.
    """
    proxy = proxy_for(address)
    through = (
        f" through the proxy {without_password(proxy)} (of the environment; NO_PROXY leaves a host out)"
        if proxy
        else ""
    )
    scheme, shown = urllib.parse.urlsplit(address).scheme, without_password(address)
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({scheme: proxy} if proxy else {}))
    try:
        with opener.open(urllib.request.Request(address), timeout=timeout) as answer:
            page = answer.read(MAX_PAGE_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise CommandError(f"{shown} answers {error.code} {error.reason}{through}; is that a vLLM server?") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(
            f"{shown} cannot be reached{through} ({reason}); is the server up, and the address right?"
        ) from None
    if len(page) > MAX_PAGE_BYTES:
        raise CommandError(f"{shown} answers with more than {MAX_PAGE_BYTES} bytes; is that a vLLM server?")
    sample = parse(page.decode("utf-8", "replace"))
    rank = sample.pop("reported_elsewhere", None)
    if rank is not None and not sample:
        raise CommandError(f"{shown}: {ELSEWHERE.format(rank=rank)}")
    if not sample:
        raise CommandError(
            f"{shown} has no metrics {PREFIX}*: the balancer is off, its first window has not ended, or the "
            f"server does not load the plugin (check with `vllm-ascend-eplb doctor`)"
        )
    return sample


def proxy_for(address: str) -> str | None:
    """The proxy of a request; None for this machine, whatever the environment has."""
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    host = parts.hostname or ""
    if not proxy or is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    return proxy


def without_password(url: str) -> str:
    """An address as it may be shown: without the name and password of a user."""
    return re.sub(r"^([A-Za-z0-9+.-]+://)?[^/]*@", r"\1", url)


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is this machine: an address is, if a socket can be bound to it. IPv4 addresses may
    be in a short form, such as 127.1."""
    host = host.rstrip(".").lower()
    if host in LOCAL_NAMES or host.endswith(".localhost"):
        return True
    try:
        own = host in (socket.gethostname().lower(), socket.getfqdn().lower())
        address = ipaddress.ip_address("127.0.0.1" if own else host if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):  # a name of somewhere else, which is not looked up: the proxy may do that alone
        return False
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def parse(page: str) -> Sample:
    """The balancer's metrics on a page; empty if there are none."""
    lines = [line for line in page.splitlines() if PREFIX in line[:200]]
    sample: Sample = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for entry in family.samples:
                if not entry.name.startswith(PREFIX):
                    continue
                name = entry.name.removeprefix(PREFIX)
                if name == "info":
                    sample |= {
                        key: value for key, value in entry.labels.items() if key in ("version", "policy", "mode")
                    }
                elif name == "reported_elsewhere":
                    if entry.value == 1:
                        sample[name] = entry.labels.get("dp_rank", "")
                elif name == "phase":
                    if entry.value == 1:
                        sample["phase"] = entry.labels.get("phase", "")
                elif entry.value == entry.value and abs(entry.value) != float("inf"):
                    labels = [value for key, value in sorted(entry.labels.items()) if key in ("layers", "result")]
                    sample[".".join([name, *labels])] = float(entry.value)
    except ValueError as error:
        raise CommandError(f"the page is not a metrics page ({error}); is that a vLLM server?") from None
    return sample


def panel(sample: Sample, history: History, url: str) -> Panel:
    """The panel in the terminal."""
    facts = Table.grid(padding=(0, 3))
    for _ in range(4):
        facts.add_column()
    phase = str(sample.get("phase", "-")) + (" (paused)" if sample.get("paused") == 1.0 else "")
    facts.add_row("phase", Text(phase, style="bold"), "steps", _count(sample, "steps"))
    facts.add_row("policy", str(sample.get("policy", "-")), "mode", str(sample.get("mode", "-")))
    cycles = " / ".join(_count(sample, f"cycles.{result}") for result in ("done", "skipped", "failed"))
    facts.add_row("cycles done / skipped / failed", cycles, "experts moved", _count(sample, "experts_moved"))
    facts.add_row(
        "last plan took",
        _time(sample, "planner_seconds"),
        "longest wait in one step",
        _time(sample, "longest_step_seconds"),
    )
    facts.add_row(
        "waited for agreement",
        _time(sample, "control_wait_seconds"),
        "for transfers",
        _time(sample, "transfer_wait_seconds"),
    )
    pars = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("PAR of rank load", "mean of layers", "worst layer"):
        pars.add_column(column)
    for title, name in (
        ("last window", "par_window"),
        ("  with the start placement", "par_window_start_placement"),
        ("last cycle: before", "par_before"),
        ("  predicted", "par_predicted"),
        ("  realised", "par_realised"),
    ):
        pars.add_row(title, _par(sample, f"{name}.mean"), _par(sample, f"{name}.worst"))
    parts: list[Table | Text] = [facts, Text(""), pars]
    if "moe_seconds" in sample:
        parts += [Text(""), _times(sample)]
    if len(history.par) > 1:
        parts.append(Text(f"\nPAR by window  {sparkline(list(history.par))}  {history.par[-1]:.3f}"))
    age = sample.get("updated_timestamp_seconds")
    if isinstance(age, float) and age > 0 and time.time() - age > 60:
        parts.append(Text(f"the balancer last reported {show_seconds(time.time() - age)} ago", style="yellow"))
    if history.error:
        parts.append(Text(history.error, style="bold red"))
    return Panel(Group(*parts), title=f"expert load balancing: {url}", title_align="left")


def _times(sample: Sample) -> Table:
    """What balancing brings in time: predicted from measured layers, and realised where steps were compared."""
    times = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for column in ("time per step", "last window", "start placement", "saved so far"):
        times.add_column(column)
    now, start = _time(sample, "moe_seconds"), _time(sample, "moe_seconds_start_placement")
    times.add_row("MoE layers, predicted", now, start, _time(sample, "moe_time_saved_seconds"))
    if "moe_seconds_observed" in sample:
        times.add_row("  with the plan that was not carried out", _time(sample, "moe_seconds_observed"))
    if "step_seconds" in sample:
        now, start = (_time(sample, f"step_seconds{end}") for end in ("", "_start_placement"))
        times.add_row("whole step, measured", now, start, _time(sample, "step_time_saved_seconds"))
    fraction = sample.get("plan_saved_fraction")
    if isinstance(fraction, float):
        times.add_row("last plan", f"saves {fraction:.1%} of MoE time, costs {_time(sample, 'plan_cost_seconds')} once")
    return times


def sparkline(values: list[float]) -> str:
    """Values as bars, from 1.0 (perfect) to the largest."""
    top = max(*values, 1.05)
    return "".join(BARS[min(len(BARS) - 1, max(0, int((v - 1.0) / (top - 1.0) * len(BARS))))] for v in values)


def _keep(history: History, sample: Sample) -> None:
    history.samples += 1
    par = sample.get("par_window.mean")
    if isinstance(par, float) and (not history.par or history.par[-1] != par):
        history.par.append(par)


def _print(sample: Sample, history: History, url: str, as_json: bool) -> None:
    if as_json:
        print_json(sample)
    else:
        console().print(panel(sample, history, url))


def _count(sample: Sample, name: str) -> str:
    value = sample.get(name)
    return f"{value:,.0f}" if isinstance(value, float) else "-"


def _time(sample: Sample, name: str) -> str:
    value = sample.get(name)
    return show_seconds(value) if isinstance(value, float) else "-"


def _par(sample: Sample, name: str) -> Text:
    value = sample.get(name)
    if not isinstance(value, float):
        return Text("-")
    return Text(f"{value:.3f}", style="green" if value < 1.05 else "yellow" if value < 1.15 else "red")
