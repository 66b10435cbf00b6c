# SPDX-License-Identifier: Apache-2.0
"""LoadRecorder: the recorded load per logical expert equals the routed tokens, even if experts moved in the window."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.load import ops
from vllm_ascend_eplb.load.recorder import LoadError, LoadRecorder
from vllm_ascend_eplb.values.placement import Placement
from vllm_ascend_eplb.values.traffic import Traffic

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
DEVICES = ["cpu", CUDA]
LAYERS, EXPERTS, RANKS, SLOTS, TOP_K = 3, 6, 2, 10, 2


def some_placement(seed, empty=True):
    rng = np.random.default_rng(seed)
    extra = rng.integers(-1 if empty else 0, EXPERTS, (LAYERS, SLOTS - EXPERTS))
    slots = np.concatenate([np.tile(np.arange(EXPERTS), (LAYERS, 1)), extra], axis=1)
    return Placement(rng.permuted(slots, axis=1), EXPERTS, RANKS)


PLACEMENTS = [some_placement(seed) for seed in range(4)]


class Model:
    """The parts of a model's MoE layers that counting needs: tables in place, and one row of counts per layer."""

    def __init__(self, recorder):
        device = recorder.device
        self.recorder = recorder
        self.tables = torch.zeros((LAYERS, EXPERTS, SLOTS), dtype=torch.int64, device=device)
        self.replicas = torch.ones((LAYERS, EXPERTS), dtype=torch.int64, device=device)
        self.num_unpadded = torch.zeros(1, dtype=torch.int32, device=device)

    def commit(self, placement):
        self.tables.copy_(torch.tensor(placement.logical_to_physical(SLOTS)))
        self.replicas.copy_(torch.tensor(placement.replica_count))

    def forward(self, ids, num_unpadded):
        """Route ``ids`` [L, N, K]; returns [L, E], how often the router chose each expert, without padding."""
        self.num_unpadded.fill_(num_unpadded)
        for layer in range(LAYERS):
            routed = torch.tensor(ids[layer], device=self.recorder.device)
            row = self.recorder.counts[layer]
            table, replicas = self.tables[layer], self.replicas[layer]
            ops.map_and_record(routed, table, replicas, row, self.recorder.recording, self.num_unpadded)
        return np.stack([np.bincount(i[:num_unpadded].ravel(), minlength=EXPERTS) for i in ids])


def draw_ids(rng, num_tokens):
    return np.stack([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(num_tokens)] for _ in range(LAYERS)])


steps = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "decode", "dummy", "commit", "snapshot", "new window"]),
        st.integers(0, 2**16),
        st.integers(0, 7),
    ),
    max_size=25,
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=120, deadline=None)
@given(
    story=steps,
    phases=st.sampled_from([("all",), ("prefill",), ("decode",), ("prefill", "decode")]),
    num_entries=st.integers(1, 3),
    steps_per_entry=st.integers(1, 3),
    contributes=st.booleans(),
    explicit=st.booleans(),
)
def test_load_is_what_the_router_chose(device, story, phases, num_entries, steps_per_entry, contributes, explicit):
    """Steps, commits and snapshots in any order give the router's own counts. Batches always have padding."""
    recorder = LoadRecorder(
        *(LAYERS, EXPERTS, SLOTS, device),
        contributes=contributes,
        phases=phases,
        num_entries=num_entries,
        steps_per_entry=steps_per_entry,
    )
    address = recorder.counts.data_ptr()
    model = Model(recorder)
    placement = PLACEMENTS[0]
    model.commit(placement)
    empty = np.zeros((0, LAYERS, EXPERTS), dtype=np.int64)
    expected = empty  # the series since the last snapshot, the oldest entry first
    num_steps = 0

    def begin_step(**step):
        nonlocal num_steps, expected
        recorder.begin_step(placement, **step)
        if num_steps == 0 or (num_entries > 1 and num_steps % steps_per_entry == 0):
            expected = np.concatenate([expected, np.zeros((1, LAYERS, EXPERTS), dtype=np.int64)])
        num_steps += 1

    for kind, seed, num_tokens in [*story, ("snapshot", 0, 0)]:
        if kind == "commit":
            if explicit:
                recorder.flush(placement)
            placement = PLACEMENTS[seed % len(PLACEMENTS)]
            if not explicit:  # the recorder must notice the change itself, before the next forward counts
                begin_step(record=False)
            model.commit(placement)
        elif kind == "snapshot":
            recorder.snapshot(placement)
            missing = np.zeros((num_entries, LAYERS, EXPERTS), dtype=np.int64)
            window = np.concatenate([missing, expected])[-num_entries:] * contributes
            np.testing.assert_array_equal(recorder.take(), window)
            assert recorder.snapshot_ready()
            expected, num_steps = empty, 0
        elif kind == "new window":
            steps_per_entry = 1 + seed % 3
            recorder.begin_window(placement, steps_per_entry)
            expected, num_steps = empty, 0
        else:
            begin_step(record=kind != "dummy", phase=kind)
            chosen = model.forward(draw_ids(np.random.default_rng(seed), num_tokens + 3), num_tokens)
            if kind != "dummy" and (phases == ("all",) or kind in phases):
                expected[-1] += chosen
    assert recorder.counts.data_ptr() == address


def record_some(recorder, placement, num_tokens=5, seed=0, **step):
    model = Model(recorder)
    model.commit(placement)
    recorder.begin_step(placement, **{"record": True, **step})
    return model.forward(draw_ids(np.random.default_rng(seed), num_tokens), num_tokens)


def test_window_spans_a_commit():
    """With a flush before the commit the load is right. The control flushes under the placement after the commit, and
    gets another load."""
    before, after = some_placement(1, empty=False), some_placement(2, empty=False)
    loads = {}
    for flushed_under in (before, after):
        recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu")
        chosen = record_some(recorder, before)
        recorder.flush(flushed_under)
        chosen = chosen + record_some(recorder, after, seed=1)
        recorder.snapshot(after)
        loads[flushed_under] = recorder.take()[0]
        assert loads[flushed_under].sum() == chosen.sum() == 2 * 5 * TOP_K * LAYERS
    np.testing.assert_array_equal(loads[before], chosen)
    assert not np.array_equal(loads[after], chosen)


def test_only_what_changes_is_enqueued():
    """The switch is a tensor on the device. Writing it costs a kernel, so it is written only when it changes."""
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu")
    version = recorder.recording._version
    for record in (False, False, True, True, True, False):
        recorder.begin_step(PLACEMENTS[0], record=record)
        assert bool(recorder.recording) == record
    assert recorder.recording._version - version == 2
    counts_version = recorder.counts._version
    recorder.flush(PLACEMENTS[0])
    recorder.flush(PLACEMENTS[0])
    assert recorder.counts._version - counts_version == 1


def test_rank_that_does_not_contribute_never_records():
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu", contributes=False)
    record_some(recorder, PLACEMENTS[0])
    assert not bool(recorder.recording)
    assert not recorder.counts.any()
    recorder.snapshot()
    assert not recorder.take().any()


def test_counts_stay_int64_beyond_32_bits():
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu", num_entries=2)
    recorder.begin_step(some_placement(0, empty=False), record=True)
    recorder.counts.fill_(2**40)
    recorder.snapshot()
    assert recorder.take().sum() == LAYERS * SLOTS * 2**40


def test_int32_counts_are_summed_in_int64():
    recorder = LoadRecorder(1, 1, 2, "cpu", dtype=torch.int32)
    placement = Placement([[0, 0]], 1, 2)
    for _ in range(3):
        recorder.begin_step(placement, record=True)
        recorder.counts.fill_(2**31 - 1)
        recorder.flush(placement)
    recorder.snapshot()
    assert recorder.take().tolist() == [[[6 * (2**31 - 1)]]]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recorder_neither_waits_nor_allocates_on_a_device():
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cuda", phases=("prefill", "decode"), num_entries=2)
    model = Model(recorder)

    def cycle(placement, following):
        recorder.begin_step(placement, record=True, phase="prefill")
        recorder.begin_step(placement, record=True, phase="decode")
        recorder.flush(placement)
        recorder.begin_step(following, record=True, phase="decode")
        recorder.snapshot(following)
        return recorder.snapshot_ready()

    for i in range(3):  # the third cycle uploads no new placement, so two new placements follow below
        cycle(PLACEMENTS[i % 2], PLACEMENTS[1 - i % 2])
        recorder.take()
    torch.cuda.synchronize()
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    held = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        product = busy
        for _ in range(20):
            product = product @ busy
        work = torch.cuda.memory_stats()["allocation.all.allocated"] - held
        ready = cycle(PLACEMENTS[2], PLACEMENTS[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not ready, "the snapshot was ready before the work queued ahead of it could be done"
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - held == work
    recorder.take()
    assert recorder.snapshot_ready()
    del model


def test_recorder_errors_name_the_value():
    with pytest.raises(LoadError, match="num_slots is 0; it must be at least 1"):
        LoadRecorder(1, 1, 0, "cpu")
    with pytest.raises(LoadError, match=r"phases is \('all', 'decode'\); allowed are"):
        LoadRecorder(1, 1, 1, "cpu", phases=("all", "decode"))
    with pytest.raises(LoadError, match=r"dtype is torch\.int16"):
        LoadRecorder(1, 1, 1, "cpu", dtype=torch.int16)
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu", phases=("decode",))
    assert not recorder.snapshot_ready()
    with pytest.raises(LoadError, match=r"call snapshot\(\) first"):
        recorder.take()
    with pytest.raises(LoadError, match="knows no placement"):
        recorder.snapshot()
    with pytest.raises(LoadError, match=r"\(1, 2, 2\); the recorder was made for \(3, 6, 10\)"):
        recorder.flush(Placement.initial(1, 2, 1))
    recorder.snapshot(PLACEMENTS[0])
    with pytest.raises(LoadError, match="has not been taken"):
        recorder.snapshot(PLACEMENTS[0])


def test_discarded_snapshot_makes_room_for_the_next() -> None:
    placement = Placement.initial(1, 2, 1)
    recorder = LoadRecorder(1, 2, 2, "cpu")
    recorder.begin_step(placement, record=True)
    recorder.counts.fill_(3)
    recorder.snapshot(placement)
    with pytest.raises(LoadError, match="has not been taken"):
        recorder.snapshot(placement)
    recorder.discard_snapshot()
    assert not recorder.snapshot_ready()
    recorder.counts.fill_(4)
    recorder.snapshot(placement)
    assert recorder.take().tolist() == [[[4, 4]]]


def test_steps_are_counted_by_tokens_per_rank() -> None:
    """Only recorded steps of the present window count. The histograms of ranks are added."""
    recorder = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu", phases=("decode",))
    placement = PLACEMENTS[0]
    for tokens, record, phase in (
        (0.5, True, "decode"),
        (48, True, "decode"),
        (40, True, "decode"),
        (9, False, "decode"),
        (4096, True, "prefill"),
    ):
        recorder.begin_step(placement, record=record, phase=phase, tokens_per_rank=tokens)
    assert not recorder.histogram().any()  # the window is not over
    recorder.snapshot()
    steps, thousandths = recorder.histogram()
    assert {i: int(steps[i]) for i in np.flatnonzero(steps)} == {0: 1, 6: 2}
    assert {i: int(thousandths[i]) for i in np.flatnonzero(thousandths)} == {0: 500, 6: 88_000}
    traffic = Traffic.of_histogram(recorder.histogram() + recorder.histogram())
    assert traffic.tokens[6] == 44
    recorder.take()
    recorder.begin_step(placement, record=True, phase="decode", tokens_per_rank=3)
    recorder.begin_window(placement, 1)
    recorder.snapshot()
    assert not recorder.histogram().any()
    silent = LoadRecorder(LAYERS, EXPERTS, SLOTS, "cpu", contributes=False)
    silent.begin_step(placement, record=True, tokens_per_rank=7)
    silent.snapshot()
    assert not silent.histogram().any()
