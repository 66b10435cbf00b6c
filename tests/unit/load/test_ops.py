# SPDX-License-Identifier: Apache-2.0
"""The load recording op against a NumPy oracle, on every available device and path (kernel, ATen).

One file, because every test compares the same op with the same oracle.
"""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_ascend_eplb
from vllm_ascend_eplb.load import ops

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
DEVICES = ["cpu", CUDA]
LIBRARY = Path(vllm_ascend_eplb.__file__).with_name("_ops.so")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="_ops.so is not built")


def map_and_record_oracle(ids, table, replicas, counts, record, bounds):
    """The result and the ``counts`` that map_and_record must produce, computed entry by entry in plain integers."""
    out, counts = ids.copy(), counts.copy()
    num_experts, width = table.shape
    first = int(bounds[0]) if bounds is not None and len(bounds) == 2 else 0
    end = int(bounds[-1]) if bounds is not None else len(ids)
    for n in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            expert = int(ids[n, k])
            if not 0 <= expert < num_experts:
                continue
            fraction = ((n * 2654435769 + expert * 1779033703) % 2**32) >> 16
            valid = min(max(int(replicas[expert]), 0), width)
            slot = int(table[expert, fraction * valid >> 16])
            out[n, k] = slot
            if record and first <= n < end and 0 <= slot < len(counts):
                counts[slot] += 1
    return out, counts


def run_path(path, *arguments):
    return {"op": ops.map_and_record, "aten": ops.map_and_record_aten}[path](*arguments)


@st.composite
def batches(draw):
    num_tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    num_experts, width = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    num_slots = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slack = draw(st.sampled_from([0, 3]))  # with slack some ids, slots and replica counts are out of range
    ids = rng.integers(-slack, num_experts + slack, (num_tokens, top_k))
    ids[rng.random(ids.shape) < 0.05 * slack] = rng.choice([-(2**31), 2**31 - 1])
    return {
        "ids": ids.astype(draw(st.sampled_from([np.int32, np.int64]))),
        "table": rng.integers(-(slack > 0), num_slots + slack, (num_experts, width)),
        "replicas": rng.integers(0 if slack else 1, width + slack + 1, num_experts).astype(
            draw(st.sampled_from([np.int32, np.int64]))
        ),
        "counts": rng.integers(0, 9, num_slots).astype(draw(st.sampled_from([np.int32, np.int64]))),
        "record": draw(st.booleans()),
        "bounds": draw(
            st.one_of(
                st.none(),
                st.lists(st.integers(-1, 45), min_size=1, max_size=2).map(
                    lambda b: np.array(b, dtype=np.int32 if b[0] % 2 else np.int64)
                ),
            )
        ),
    }


@pytest.mark.parametrize("path", ["op", "aten"])
@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_map_and_record_equals_the_oracle(path, device, batch):
    out, counts = map_and_record_oracle(*batch.values())
    on_device = {name: torch.tensor(value, device=device) for name, value in batch.items() if value is not None}
    on_device["record"] = on_device["record"].reshape(1)
    mapped = run_path(path, *on_device.values())
    assert mapped.dtype == on_device["ids"].dtype
    assert mapped.is_contiguous()
    np.testing.assert_array_equal(mapped.cpu().numpy(), out)
    np.testing.assert_array_equal(on_device["counts"].cpu().numpy(), counts)


def model_batch(num_tokens, device, dtype=torch.int64, num_experts=256, top_k=8, num_slots=288, width=16, seed=0):
    """A batch of a model's size: distinct experts per token, 1 to ``width`` replicas per expert, some slots twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices.to(dtype)
    table = torch.randint(0, num_slots, (num_experts, width), generator=generator)
    replicas = torch.randint(1, width + 1, (num_experts,), generator=generator)
    return (
        ids.to(device),
        table.to(device),
        replicas.to(device),
        torch.zeros(num_slots, dtype=torch.int64, device=device),
        torch.ones(1, dtype=torch.bool, device=device),
    )


def reference(ids, table, replicas, counts, record, bounds=None):
    """The ATen path on the CPU. The small batches above prove that it equals the oracle."""
    arguments = [t.cpu().clone() for t in (ids, table, replicas, counts, record)]
    out = ops.map_and_record_aten(*arguments, None if bounds is None else bounds.cpu())
    return out, arguments[3]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [1, 255, 512, 8191, 40000])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_of_every_size(device, num_tokens, dtype):
    """Kernels have different paths by size: one or more threads, and blocks that count alone or together."""
    batch = model_batch(num_tokens, device, dtype)
    bounds = torch.tensor([num_tokens // 3, num_tokens - num_tokens // 4], device=device)
    out, counts = reference(*batch, bounds)
    mapped = ops.map_and_record(*batch, bounds)
    assert torch.equal(mapped.cpu(), out)
    assert torch.equal(batch[3].cpu(), counts)
    assert int(batch[3].sum()) == int(bounds[1] - bounds[0]) * 8


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, 255, 256, 257, 700])
@pytest.mark.parametrize("device", DEVICES)
def test_any_number_of_experts_per_token(device, top_k, uniform):
    ids, table, replicas, counts, record = model_batch(37, device, num_experts=800, top_k=top_k, num_slots=20000)
    if uniform:
        replicas.fill_(table.shape[1])
    out, expected = reference(ids, table, replicas, counts, record)
    assert torch.equal(ops.map_and_record(ids, table, replicas, counts, record).cpu(), out)
    assert torch.equal(counts.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "odd", [None, "unknown ids", "slots that are not counted", "an empty valid entry", "wide slots"]
)
@pytest.mark.parametrize("replica_counts", [[1], [16], [0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 7, 8, 9, 11]], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_form_of_table(device, replica_counts, odd, dtype):
    """Large batches have a separate path for tables whose replica counts have a small common multiple."""
    num_slots = 70_000 if odd == "wide slots" else 288
    ids, table, _, counts, record = model_batch(3000, device, dtype, num_slots=num_slots)
    replicas = torch.tensor(replica_counts, device=device).repeat(256)[:256]
    table[torch.arange(16, device=device) >= replicas.clamp(min=1)[:, None]] = -1
    if odd == "unknown ids":
        ids[::7, 1], ids[::5, 2], ids[-1, -1] = -1, 256, 2**31 - 1
    elif odd == "slots that are not counted":
        table[100:110, 0] = 288
    elif odd == "an empty valid entry":
        table[7, 0] = -1
    out, expected = reference(ids, table, replicas, counts, record)
    assert torch.equal(ops.map_and_record(ids, table, replicas, counts, record).cpu(), out)
    assert torch.equal(counts.cpu(), expected)


@pytest.mark.parametrize("num_tokens", [31, 32, 37, 3000])
@pytest.mark.parametrize("num_experts", [8, 128, 256, 257])
@pytest.mark.parametrize("width", [7, 255, 256])
@pytest.mark.parametrize("device", DEVICES)
def test_replica_counts_of_all_sizes(device, width, num_experts, num_tokens):
    """The CPU kernel looks replica counts up as bytes if the numbers of experts and replicas are small enough."""
    batch = model_batch(num_tokens, device, num_experts=num_experts, width=width)
    out, counts = reference(*batch)
    assert torch.equal(ops.map_and_record(*batch).cpu(), out)
    assert torch.equal(batch[3].cpu(), counts)


@pytest.mark.parametrize("path", ["op", "aten"])
@pytest.mark.parametrize("device", DEVICES)
def test_views_of_larger_tensors(path, device):
    """The op accepts views: ids as a column slice, one layer of a wider table, one row of all layers' counts."""
    ids, table, replicas, counts, record = model_batch(64, device)
    wide_ids = torch.full((64, 11), -5, device=device)
    wide_ids[:, 2:10] = ids
    tables = torch.full((3, 256, 40), -1, device=device)
    tables[1, :, :16] = table
    rows = torch.zeros((3, 300), dtype=torch.int64, device=device)
    out, expected = reference(ids, table, replicas, counts, record)
    mapped = run_path(path, wide_ids[:, 2:10], tables[1][:, :16], replicas, rows[1, :288], record)
    assert torch.equal(mapped.cpu(), out)
    assert torch.equal(rows[1, :288].cpu(), expected)
    assert int(rows.sum()) == int(expected.sum())


def test_threads_record_into_their_own_counts():
    """Two concurrent calls on a CPU, as two micro-batches make them, share no memory."""
    batches_of = [model_batch(3000, "cpu", seed=seed) for seed in range(2)]
    expected = [reference(*batch) for batch in batches_of]
    results = [[], []]

    def work(i):
        for _ in range(20):
            results[i].append(ops.map_and_record(*batches_of[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, (out, counts), mapped in zip(batches_of, expected, results, strict=True):
        assert all(torch.equal(m, out) for m in mapped)
        assert torch.equal(batch[3], counts * 20)


def misses(choose, shares, stride, entries=64, tokens=32, expert=7):
    """For many runs of tokens: the largest difference, in tokens, between a replica's share and what it gets."""
    row = np.repeat(np.arange(len(shares)), np.round(np.array(shares) * entries).astype(int))
    off = []
    for start in range(0, 1000, 7):
        chosen = row[choose(start + stride * np.arange(tokens), expert, len(row))]
        got = np.bincount(chosen, minlength=len(shares))
        off.append(np.abs(got - np.bincount(row) / len(row) * tokens).max())
    return np.array(off)


def by_golden_ratio(positions, expert, valid):
    return ops.entries_of(torch.as_tensor(positions), torch.tensor(expert), torch.tensor(valid)).numpy()


def by_remainder(positions, expert, valid):
    return (positions * 2654435769 % 2**32) % valid


def at_random(positions, expert, valid):
    return np.random.default_rng(int(positions[0])).integers(0, valid, len(positions))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.75, 0.25], [0.45, 0.35, 0.2], [0.25] * 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8, 32])
def test_shares_hold_for_runs_of_few_tokens(shares, stride):
    """32 tokens of an expert are split better than at random, at any distance between these tokens."""
    off = misses(by_golden_ratio, shares, stride)
    assert off.max() <= 4.5
    assert off.mean() <= 0.8 * misses(at_random, shares, stride).mean()


def test_rule_by_remainders_does_not_hold_shares():
    """Negative control of the test above."""
    assert misses(by_remainder, [0.5, 0.5], stride=2, entries=2).min() == 16


def test_one_token_spreads_experts_over_replicas():
    entries = ops.entries_of(torch.tensor(0), torch.arange(256), torch.tensor(2))
    assert 115 <= int(entries.sum()) <= 141


def test_the_choice_depends_on_position_and_expert_alone():
    """Ranks that route the same token must agree, so the other tokens of the batch must not matter."""
    ids, table, replicas, counts, record = model_batch(64, "cpu")
    whole = ops.map_and_record(ids, table, replicas, counts, record)
    changed_ids = ids.clone()
    changed_ids[1::2] = (changed_ids[1::2] + 5) % 256
    changed = ops.map_and_record(changed_ids, table, replicas, counts, record)
    assert torch.equal(whole[::2], changed[::2])
    assert not torch.equal(whole[1::2], changed[1::2])


BAD_ARGUMENTS = {
    "topk_ids": [torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)],
    "dispatch_table": [torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, 0, dtype=torch.int64)],
    "replica_count": [torch.ones(4, dtype=torch.int64), torch.ones(5)],
    "counts": [torch.zeros(9), torch.zeros(3, 9, dtype=torch.int64)],
    "record": [torch.ones(1, dtype=torch.int64), torch.ones(2, dtype=torch.bool)],
    "num_unpadded": [torch.ones(3, dtype=torch.int64), torch.ones(1)],
}


@pytest.mark.parametrize("path", ["op", "aten"])
@pytest.mark.parametrize(("name", "case"), [(name, i) for name, bad in BAD_ARGUMENTS.items() for i in range(len(bad))])
def test_errors_name_the_argument(path, name, case):
    arguments = {
        "topk_ids": torch.zeros((4, 2), dtype=torch.int64),
        "dispatch_table": torch.zeros((5, 2), dtype=torch.int64),
        "replica_count": torch.ones(5, dtype=torch.int64),
        "counts": torch.zeros(9, dtype=torch.int64),
        "record": torch.ones(1, dtype=torch.bool),
        "num_unpadded": torch.ones(1, dtype=torch.int64),
    }
    run_path(path, *arguments.values())
    arguments[name] = BAD_ARGUMENTS[name][case]
    with pytest.raises(RuntimeError, match=f"^{name} has dtype"):
        run_path(path, *arguments.values())


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    batch = model_batch(5, device)
    bounds = torch.tensor([3], device=device)
    torch.library.opcheck(torch.ops.vllm_ascend_eplb.map_and_record.default, batch)
    torch.library.opcheck(torch.ops.vllm_ascend_eplb.map_and_record.default, (*batch, bounds))


def layer(ids, table, replicas, counts, record, bounds):
    """Record twice around other work, as two layers do; a compiler that loses the order or a mutation is noticed."""
    first = ops.map_and_record(ids + 0, table, replicas, counts[0], record, bounds)
    second = ops.map_and_record((ids + 1) % table.shape[0], table, replicas, counts[1], record, bounds)
    return first * 2, second


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for num_tokens in (6, 9, 33):
        ids, table, replicas, _, record = model_batch(num_tokens, device)
        bounds = torch.tensor([num_tokens - 2], device=device)
        counts = torch.zeros((2, 288), dtype=torch.int64, device=device)
        expected_counts = counts.clone()
        expected = layer(ids, table, replicas, expected_counts, record, bounds)
        got = compiled(ids, table, replicas, counts, record, bounds)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert torch.equal(counts, expected_counts)
        assert int(counts[0].sum()) == (num_tokens - 2) * 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("path", ["op", "aten"])
def test_captured_graph_reads_switch_and_table_at_replay(path):
    ids, table, replicas, counts, record = model_batch(512, "cuda")
    bounds = torch.tensor([500], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_path(path, ids, table, replicas, counts, record, bounds)  # warm-up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = run_path(path, ids, table, replicas, counts, record, bounds)
    torch.cuda.synchronize()
    for step in range(6):
        batch = model_batch(512, "cuda", seed=step)
        ids.copy_(batch[0])
        table.copy_(batch[1])
        replicas.copy_(batch[2])
        record.fill_(step % 3 != 2)
        bounds.fill_(100 * step)
        counts.zero_()
        expected, expected_counts = reference(ids, table, replicas, counts, record, bounds)
        graph.replay()
        assert torch.equal(out.cpu(), expected)
        assert torch.equal(counts.cpu(), expected_counts)
        assert int(counts.sum()) == (0 if step % 3 == 2 else min(100 * step, 512) * 8)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_tokens", [128, 4096])
def test_concurrent_streams_lose_no_count(num_tokens):
    batches_of = [model_batch(num_tokens, "cuda", seed=seed) for seed in range(4)]
    counts = torch.zeros(288, dtype=torch.int64, device="cuda")
    expected = sum(reference(*batch)[1] for batch in batches_of) * 50
    streams = [torch.cuda.Stream() for _ in batches_of]
    torch.cuda.synchronize()
    for _ in range(50):
        for (ids, table, replicas, _, record), stream in zip(batches_of, streams, strict=True):
            with torch.cuda.stream(stream):
                ops.map_and_record(ids, table, replicas, counts, record)
    torch.cuda.synchronize()
    assert torch.equal(counts.cpu(), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("path", ["op", "aten"])
def test_never_waits_for_the_device(path):
    batch = model_batch(512, "cuda")
    bounds = torch.tensor([3], device="cuda")
    run_path(path, *batch, bounds)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_path(path, *batch, bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_python(folder, program):
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)


RECORD = (
    "import torch; from vllm_ascend_eplb.load import ops; c = torch.zeros(3, dtype=torch.int64);"
    "t = torch.ones(1, dtype=torch.bool);"
    "out = ops.map_and_record(torch.tensor([[1, 0]]), torch.tensor([[2], [1]]), torch.tensor([1, 1]), c, t);"
    "print(ops.kernel_for('cpu'), out.tolist(), c.tolist())"
)


@pytest.mark.parametrize("library", ["none", "garbage", "of something else"])
def test_aten_replaces_a_missing_library_with_one_line(tmp_path, library):
    package = tmp_path / "vllm_ascend_eplb"
    (package / "load").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "load" / "__init__.py").touch()
    shutil.copy(ops.__file__, package / "load" / "ops.py")
    if library == "garbage":
        (package / "_ops.so").write_bytes(b"\x7fELF and so on")
    elif library == "of something else":
        compile_library(package / "_ops.so", "int something_else(void) { return 1; }")
    run = run_python(tmp_path, RECORD)
    assert run.stdout == "aten [[1, 2]] [0, 1, 1]\n"
    assert [line for line in run.stderr.splitlines() if "ATen" in line] == run.stderr.splitlines()
    assert len(run.stderr.splitlines()) == 1


def compile_library(path, program):
    """Compile a shared library whose soname is its file's name."""
    source = path.with_suffix(".c")
    source.write_text(program)
    name = f"-Wl,-soname,{path.name}"
    subprocess.run(["cc", "-shared", "-fPIC", name, "-o", str(path), str(source)], check=True)


@pytest.mark.parametrize(
    ("major", "minor", "expected"),
    [
        (2, 9, "torch is 2.9; supported are 2.10 and later 2.x"),
        (3, 0, "torch is 3.0; supported are 2.10 and later 2.x"),
        (2, 99, "torch has no aoti_torch_dtype_int32"),
        (None, None, "libtorch_cpu.so is not loaded"),
    ],
)
@needs_library
def test_another_torch_is_refused_with_a_reason(tmp_path, major, minor, expected):
    """The stand-in for torch's library tells a version but has none of the functions."""
    load = ""
    if major is not None:
        program = f"unsigned long aoti_torch_abi_version(void) {{ return {major}ul << 56 | {minor}ul << 48; }}"
        compile_library(tmp_path / "libtorch_cpu.so", program)
        load = f"ctypes.CDLL({str(tmp_path / 'libtorch_cpu.so')!r});"
    program = (
        f"import ctypes; {load} f = ctypes.CDLL({str(LIBRARY)!r}).eplb_register_cpu; f.restype = ctypes.c_char_p;"
        "print(f().decode())"
    )
    assert run_python(tmp_path, program).stdout == expected + "\n"


@needs_library
def test_the_library_needs_nothing_of_torch():
    """The library loads beside every torch, because the loader resolves all its symbols without torch."""
    run_python("/", f"import ctypes; ctypes.CDLL({str(LIBRARY)!r}).eplb_register_cpu")
    assert b"libtorch_cpu.so" in LIBRARY.read_bytes()  # looked up by name instead


@needs_library
def test_the_built_kernel_is_in_use():
    assert not ops.why_not
    assert ops.kernel_for("cpu") == "cpu"
    assert ops.kernel_for("meta") == "aten"


@needs_library
def test_kernels_leave_no_tensor_behind():
    """A kernel must free the handles and optionals that it takes from torch's stack, also on errors."""
    batch = model_batch(37, "cpu")
    bounds = torch.tensor([3])
    uses = [tensor._use_count() for tensor in (*batch, bounds)]
    for _ in range(3):
        out = ops.map_and_record(batch[0][:, ::2], *batch[1:], bounds)
        with pytest.raises(RuntimeError, match="counts has dtype"):
            ops.map_and_record(*batch[:3], batch[3].float(), batch[4], bounds)
    assert [tensor._use_count() for tensor in (*batch, bounds)] == uses
    assert out._use_count() == 1
    kept, factor = torch.ones(2), torch.ones(2, requires_grad=True)
    product = kept * factor  # the control: a kept handle raises the count
    assert kept._use_count() > 1
    del product
