# SPDX-License-Identifier: Apache-2.0
"""Programs with a missing wait, which must be flagged, and the same programs with the wait, which must not."""

import re
from collections.abc import Callable

import torch

from .detector import host_access, new_reports


def _pair() -> tuple[torch.npu.Stream, torch.npu.Stream, torch.Tensor]:
    tensor = torch.zeros(64, device="npu")
    torch.npu.synchronize()
    return torch.npu.Stream(), torch.npu.Stream(), tensor


def read_of_unfinished_write(wait: bool) -> None:
    first, second, x = _pair()
    with torch.npu.stream(first):
        x.fill_(1)
        done = first.record_event()
    with torch.npu.stream(second):
        if wait:
            second.wait_event(done)
        _ = x + 1


def write_over_unfinished_write(wait: bool) -> None:
    first, second, x = _pair()
    with torch.npu.stream(first):
        x.fill_(1)
    with torch.npu.stream(second):
        if wait:
            second.wait_stream(first)
        x.fill_(2)


def write_over_unfinished_read(wait: bool) -> None:
    """The case of a staging buffer that is refilled while a commit still copies out of it."""
    first, second, x = _pair()
    target = torch.zeros(64, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(first):
        target.copy_(x)
        done = first.record_event()
    with torch.npu.stream(second):
        if wait:
            second.wait_event(done)
        x.fill_(2)


def event_recorded_too_early(wait: bool) -> None:
    first, second, x = _pair()
    done = torch.npu.Event()
    with torch.npu.stream(first):
        if not wait:
            done.record()
        x.fill_(1)
        if wait:
            done.record()
    with torch.npu.stream(second):
        second.wait_event(done)
        _ = x + 1


def wait_through_a_third_stream(wait: bool) -> None:
    first, second, x = _pair()
    third = torch.npu.Stream()
    with torch.npu.stream(first):
        x.fill_(1)
    if wait:
        third.wait_stream(first)
    second.wait_stream(third)
    with torch.npu.stream(second):
        _ = x + 1


def host_waits_for_the_wrong_stream(wait: bool) -> None:
    first, second, x = _pair()
    with torch.npu.stream(first):
        x.fill_(1)
    (first if wait else second).synchronize()
    with torch.npu.stream(second):
        _ = x + 1


def copy_to_host_of_unfinished_write(wait: bool) -> None:
    first, second, x = _pair()
    with torch.npu.stream(first):
        x.fill_(1)
    if wait:
        first.synchronize()
    with torch.npu.stream(second):
        x.cpu()


def pinned_buffer_rewritten(wait: bool) -> None:
    first, _, x = _pair()
    pinned = torch.zeros(64).pin_memory()
    with torch.npu.stream(first):
        x.copy_(pinned, non_blocking=True)
    if wait:
        first.synchronize()
    host_access(pinned, write=True)
    first.synchronize()


def pinned_buffer_read_too_early(wait: bool) -> None:
    first, _, x = _pair()
    pinned = torch.zeros(64).pin_memory()
    with torch.npu.stream(first):
        pinned.copy_(x, non_blocking=True)
        done = first.record_event()
    if wait:
        while not done.query():
            pass
    host_access(pinned, write=False)
    first.synchronize()


def memory_reused_while_another_stream_reads(wait: bool) -> None:
    first, second, _ = _pair()
    with torch.npu.stream(first):
        x = torch.zeros(1 << 20, device="npu")
    second.wait_stream(first)
    with torch.npu.stream(second):
        _ = x + 1
        if wait:
            x.record_stream(second)
    address = x.data_ptr()
    del x
    with torch.npu.stream(first):
        y = torch.zeros(1 << 20, device="npu")
    if not wait:
        assert y.data_ptr() == address


def missing_join_inside_a_graph(wait: bool) -> None:
    _, side, x = _pair()
    y = torch.zeros(64, device="npu")
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            x.fill_(1)
        if wait:
            main.wait_stream(side)
        y.copy_(x)
        if not wait:
            main.wait_stream(side)
    graph.replay()


def replay_over_unfinished_write(wait: bool) -> None:
    """The case of a commit that a captured step does not wait for."""
    first, second, x = _pair()
    y = torch.zeros(64, device="npu")
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y.copy_(x)
    torch.npu.synchronize()
    with torch.npu.stream(first):
        x.fill_(3)
    with torch.npu.stream(second):
        if wait:
            second.wait_stream(first)
        graph.replay()


def overlapping_rows(wait: bool) -> None:
    first, second, _ = _pair()
    x = torch.zeros(8, 8, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(first):
        x[:, 0:4].fill_(1)
    with torch.npu.stream(second):
        x[:, 4 if wait else 3 :].fill_(2)


PROGRAMS: list[Callable[[bool], None]] = [
    read_of_unfinished_write,
    write_over_unfinished_write,
    write_over_unfinished_read,
    event_recorded_too_early,
    wait_through_a_third_stream,
    host_waits_for_the_wrong_stream,
    copy_to_host_of_unfinished_write,
    pinned_buffer_rewritten,
    pinned_buffer_read_too_early,
    memory_reused_while_another_stream_reads,
    missing_join_inside_a_graph,
    replay_over_unfinished_write,
    overlapping_rows,
]


def judge() -> dict[str, str]:
    """The errors by program: not flagged without the wait, flagged with it, or a report without both call sites."""
    wrong = {}
    for program in PROGRAMS:
        sound = new_reports(lambda run=program: run(True))
        if sound:
            wrong[program.__name__] = f"flagged although it waits: {sound}"
        flagged = new_reports(lambda run=program: run(False))
        if not flagged:
            wrong[program.__name__] = "not flagged"
        elif not re.search(r"now:.*races\.py:\d+", flagged[0]) or not re.search(r"earlier:.*races\.py:\d+", flagged[0]):
            wrong[program.__name__] = f"a call site is missing: {flagged[0]}"
    return wrong


def error() -> str:
    """With EMULATED_NPU_RACE=error the line without the wait raises."""
    try:
        read_of_unfinished_write(False)
    except RuntimeError as raised:
        return str(raised)
    return "nothing was raised"
