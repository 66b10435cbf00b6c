# SPDX-License-Identifier: Apache-2.0
"""Programs without races that test memory, streams, events and graphs."""

import time
from collections.abc import Callable

import torch


def memory_has_a_limit() -> None:
    free, total = torch.npu.mem_get_info()
    assert total == 1 << 30, total
    held = torch.empty(600 << 20, dtype=torch.uint8, device="npu")
    assert torch.npu.mem_get_info()[0] <= free - (600 << 20)
    try:
        torch.empty(600 << 20, dtype=torch.uint8, device="npu")
    except torch.OutOfMemoryError as error:
        text = str(error)
    else:
        raise AssertionError("1200 MiB fitted into 1 GiB")
    assert "out of memory" in text
    del held
    torch.npu.empty_cache()
    torch.empty(900 << 20, dtype=torch.uint8, device="npu")
    torch.npu.empty_cache()


def fresh_memory_is_not_zero() -> None:
    torch.npu.empty_cache()
    assert torch.isnan(torch.empty(1 << 20, device="npu")[:10].cpu()).all()


def streams_are_asynchronous() -> None:
    """Needs EMULATED_NPU_DELAY_US, so that a task takes longer than its launch."""
    stream = torch.npu.Stream()
    x = torch.zeros(4, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(stream):
        for _ in range(40):
            x.add_(1)
        done = stream.record_event()
    assert not done.query()
    assert not stream.query()
    done.synchronize()
    assert done.query()
    assert x.cpu().tolist() == [40.0] * 4


def streams_run_beside_each_other() -> None:
    first, second = torch.npu.Stream(), torch.npu.Stream()
    x, y = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(first):
        for _ in range(200):
            x.add_(1)
        slow = first.record_event()
    with torch.npu.stream(second):
        y.add_(1)
        quick = second.record_event()
    quick.synchronize()
    assert not slow.query()
    first.synchronize()


def events_measure_time() -> None:
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    x = torch.zeros(4, device="npu")
    start.record()
    for _ in range(5):
        x.add_(1)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0


def pinned_memory_copies_asynchronously() -> None:
    pinned = torch.arange(1000.0).pin_memory()
    assert pinned.is_pinned()
    on_device = pinned.to("npu", non_blocking=True)
    back = torch.empty(1000).pin_memory()
    back.copy_(on_device * 2, non_blocking=True)
    torch.npu.current_stream().synchronize()
    assert torch.equal(back, torch.arange(1000.0) * 2)


def graphs_replay_in_place() -> None:
    weight, x = torch.ones(4, device="npu"), torch.ones(4, device="npu")
    side = torch.npu.Stream()
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        main = torch.npu.current_stream()
        y = x * weight
        side.wait_stream(main)
        with torch.npu.stream(side):
            z = y + 1
        main.wait_stream(side)
        out = z * 2
    for value in (1.0, 5.0):
        weight.fill_(value)
        graph.replay()
        assert out.cpu().tolist() == [(value + 1) * 2] * 4, (value, out)


def capture_executes_nothing() -> None:
    x = torch.zeros(4, device="npu")
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        x.add_(1)
    torch.npu.synchronize()
    assert x.cpu().tolist() == [0.0] * 4
    graph.replay()
    graph.replay()
    assert x.cpu().tolist() == [2.0] * 4


def task_groups_take_new_arguments() -> None:
    """Arguments may change between replays: the graph waits for an external event, and the update comes after the
    launch of the replay."""
    a, b, out = torch.full((4,), 1.0, device="npu"), torch.full((4,), 2.0, device="npu"), torch.zeros(4, device="npu")
    event = torch.npu.ExternalEvent()
    graph, update = torch.npu.NPUGraph(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        stream = torch.npu.current_stream()
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        torch.add(a, a, out=out)
        handle = torch.npu.graph_task_group_end(stream)
    for addend, expected in ((b, 3.0), (a, 2.0), (b, 3.0)):
        graph.replay()
        time.sleep(0.01)
        with torch.npu.stream(update):
            torch.npu.graph_task_update_begin(update, handle)
            torch.add(a, addend, out=out)
            torch.npu.graph_task_update_end(update)
            event.record(update)
        torch.npu.synchronize()
        assert out.cpu().tolist() == [expected] * 4, (out, expected)


def unjoined_streams_end_a_capture() -> None:
    x = torch.zeros(4, device="npu")
    side = torch.npu.Stream()
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    try:
        with torch.npu.graph(graph):
            side.wait_stream(torch.npu.current_stream())
            with torch.npu.stream(side):
                x.add_(1)
    except RuntimeError as error:
        text = str(error)
    else:
        raise AssertionError("the capture ended well")
    assert "without being waited for" in text


CHECKS: list[Callable[[], None]] = [
    memory_has_a_limit,
    fresh_memory_is_not_zero,
    streams_are_asynchronous,
    streams_run_beside_each_other,
    events_measure_time,
    pinned_memory_copies_asynchronously,
    graphs_replay_in_place,
    capture_executes_nothing,
    task_groups_take_new_arguments,
    unjoined_streams_end_a_capture,
]


def check() -> dict[str, str]:
    wrong = {}
    for program in CHECKS:
        try:
            program()
        except BaseException as error:
            wrong[program.__name__] = f"{type(error).__name__}: {str(error)[:1500]}"
        torch.npu.synchronize()
    return wrong


def device_error_is_sticky() -> list[str]:
    """The device finds an index out of range later; from then on every operation fails."""
    errors = []
    x = torch.zeros(4, 4, device="npu")
    x.index_select(0, torch.tensor([9], device="npu"))
    for _ in range(2):
        try:
            (x + 1).cpu()
        except RuntimeError as error:
            errors.append(str(error))
    return errors
