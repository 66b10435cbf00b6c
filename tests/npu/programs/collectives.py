# SPDX-License-Identifier: Apache-2.0
"""HCCL between processes through torch.distributed: results, and programs that must be errors."""

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    dist.init_process_group("hccl", timeout=timedelta(seconds=100))


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return (numbers + 100 * RANK).to(dtype).npu()


def _expected(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()).reshape(shape) + 100 * rank).to(dtype)


def broadcast() -> None:
    for root in range(SIZE):
        x = _tensor(3, 4)
        dist.broadcast(x, root)
        assert torch.equal(x.cpu(), _expected(root, 3, 4))


def all_reduce() -> None:
    for dtype in (torch.float32, torch.int64, torch.bfloat16, torch.int32):
        x = _tensor(5, dtype=dtype)
        dist.all_reduce(x)
        assert torch.equal(x.cpu(), sum(_expected(r, 5, dtype=dtype) for r in range(SIZE)).to(dtype)), dtype
    x = _tensor(5)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    assert torch.equal(x.cpu(), _expected(SIZE - 1, 5))


def all_gather() -> None:
    parts = [torch.empty(2, 3, device="npu") for _ in range(SIZE)]
    dist.all_gather(parts, _tensor(2, 3))
    whole = torch.empty(2 * SIZE, 3, device="npu")
    dist.all_gather_into_tensor(whole, _tensor(2, 3))
    for r in range(SIZE):
        assert torch.equal(parts[r].cpu(), _expected(r, 2, 3))
    assert torch.equal(whole.cpu(), torch.cat([_expected(r, 2, 3) for r in range(SIZE)]))


def reduce_scatter() -> None:
    out = torch.empty(3, device="npu")
    dist.reduce_scatter_tensor(out, _tensor(3 * SIZE))
    assert torch.equal(out.cpu(), sum(_expected(r, 3 * SIZE) for r in range(SIZE))[3 * RANK : 3 * RANK + 3])


def all_to_all() -> None:
    out = torch.empty(2 * SIZE, device="npu")
    dist.all_to_all_single(out, _tensor(2 * SIZE))
    assert torch.equal(out.cpu(), torch.cat([_expected(r, 2 * SIZE)[2 * RANK : 2 * RANK + 2] for r in range(SIZE)]))
    # Rank r sends p + 1 rows to rank p.
    total = SIZE * (SIZE + 1) // 2
    out = torch.empty(SIZE * (RANK + 1), device="npu")
    dist.all_to_all_single(out, _tensor(total), [RANK + 1] * SIZE, [p + 1 for p in range(SIZE)])
    begin = RANK * (RANK + 1) // 2
    assert torch.equal(out.cpu(), torch.cat([_expected(r, total)[begin : begin + RANK + 1] for r in range(SIZE)]))


def send_and_receive() -> None:
    x = _tensor(4)
    if RANK % 2 == 0 and RANK + 1 < SIZE:
        dist.send(x, RANK + 1)
    elif RANK % 2:
        dist.recv(x, RANK - 1)
        assert torch.equal(x.cpu(), _expected(RANK - 1, 4))


def batch_to_everybody() -> None:
    """Every rank sends twice to every other rank, on a side stream."""
    side = torch.npu.Stream()
    out = [[torch.empty(1000, device="npu") for _ in range(2)] for _ in range(SIZE)]
    x = _tensor(1000)
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        operations = []
        for peer in range(SIZE):
            if peer != RANK:
                operations += [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, out[peer][0], peer)]
                operations += [dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, out[peer][1], peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        done = side.record_event()
    torch.npu.current_stream().wait_event(done)
    for peer in range(SIZE):
        for received in out[peer]:
            assert peer == RANK or torch.equal(received.cpu(), _expected(peer, 1000))


def several_communicators() -> None:
    """A step's collectives, and a transfer on a separate communicator, issued at one point of the loop."""
    transfers = dist.new_group(backend="hccl")
    side = torch.npu.Stream()
    for step in range(20):
        x, y = _tensor(50), torch.empty(200, device="npu")
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            z = _tensor(200)
            operations = [
                dist.P2POp(dist.isend, z, (RANK + 1) % SIZE, transfers),
                dist.P2POp(dist.irecv, y, (RANK - 1) % SIZE, transfers),
            ]
            works = dist.batch_isend_irecv(operations)
        for _ in range(3):
            dist.all_reduce(x)
        with torch.npu.stream(side):
            for work in works:
                work.wait()
        torch.npu.current_stream().wait_stream(side)
        assert torch.equal(y.cpu(), _expected((RANK - 1) % SIZE, 200)), step


def captured_collective() -> None:
    x, out = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    dist.all_reduce(out)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out.copy_(x)
        dist.all_reduce(out)
    for value in (1.0, 2.0, 3.0):
        x.fill_(value + RANK)
        graph.replay()
        assert out.cpu().tolist() == [sum(value + r for r in range(SIZE))] * 4


CHECKS: list[Callable[[], None]] = [
    broadcast,
    all_reduce,
    all_gather,
    reduce_scatter,
    all_to_all,
    send_and_receive,
    batch_to_everybody,
    several_communicators,
    captured_collective,
]


def check() -> dict[str, str]:
    start()
    wrong = {}
    for program in CHECKS:
        try:
            program()
        except BaseException as error:
            wrong[program.__name__] = f"{type(error).__name__}: {str(error)[:1500]}"
            break  # the ranks are no longer in step
        torch.npu.synchronize()
    return wrong


def _failure(program: Callable[[], object]) -> str:
    start()
    dist.all_reduce(torch.zeros(1, device="npu"))
    torch.npu.synchronize()
    try:
        program()
        torch.npu.synchronize()
    except BaseException as error:
        return str(error)
    return "nothing was raised"


def other_operation() -> str:
    x = torch.zeros(4, device="npu")
    return _failure(lambda: dist.all_reduce(x) if RANK else dist.broadcast(x, 0))


def other_size() -> str:
    return _failure(lambda: dist.all_reduce(torch.zeros(4 + RANK, device="npu")))


def other_type() -> str:
    return _failure(lambda: dist.all_reduce(torch.zeros(4, device="npu", dtype=torch.int32 if RANK else torch.float32)))


def other_message_size() -> str:
    x = torch.zeros(4 + RANK, device="npu")
    return _failure(lambda: dist.send(x, 1) if RANK == 0 else dist.recv(x, 0))


def dead_peer() -> str:
    def run() -> None:
        if RANK == 1:
            os._exit(0)
        dist.all_reduce(torch.zeros(4, device="npu"))

    return _failure(run)


def both_send() -> str:
    """A send waits for its receive, so two ranks that both send first wait for ever."""

    def run() -> None:
        x = torch.zeros(4, device="npu")
        dist.send(x, 1 - RANK)
        dist.recv(x, 1 - RANK)

    started = time.monotonic()
    text = _failure(run)
    return f"{time.monotonic() - started:.1f} s: {text}"


def other_order() -> str:
    """Two communicators that the ranks enter in different order, on separate streams."""

    def run() -> None:
        groups = [dist.new_group(backend="hccl"), dist.new_group(backend="hccl")]
        for group in groups:
            dist.all_reduce(torch.zeros(1, device="npu"), group=group)
        x = [torch.zeros(4, device="npu"), torch.zeros(4, device="npu")]
        torch.npu.synchronize()
        for i in (0, 1) if RANK else (1, 0):
            with torch.npu.stream(torch.npu.Stream()):
                dist.all_reduce(x[i], group=groups[i])

    return _failure(run)


def missing_wait() -> list[str]:
    """The receive buffer is read without waiting for the work."""
    start()
    from .detector import new_reports

    x, y = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    dist.all_reduce(x)

    def run(wait: bool) -> None:
        peer = 1 - RANK
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, peer), dist.P2POp(dist.irecv, y, peer)])
        if wait:
            for work in works:
                work.wait()
        y.add_(1)
        torch.npu.synchronize()

    sound = new_reports(lambda: run(True))
    return [*sound, "--", *new_reports(lambda: run(False))]
