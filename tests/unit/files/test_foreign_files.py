# SPDX-License-Identifier: Apache-2.0
"""Files in the forms that other tools write: TensorRT-LLM, OmniPlacement, DeepSeek's EPLB, SGLang's .pt.

Cases for maps: the form, its dialects (names of arrays, layer numbers, block or flow lists, JSON for YAML), and values
that a form cannot hold. Cases for loads: dumps of SGLang's recorder in both modes, layers without counts, and counts of
a single rank.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.unit.files.test_expert_map import placement
from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.files.expert_map import FORMS, ExpertMapError, read_expert_map, write_expert_map
from vllm_ascend_eplb.files.traces import TraceError, read_trace

ENDINGS = [
    ("ascend", ".json"), ("sglang", ".json"), ("sglang", ".pt"), ("array", ".json"), ("array", ".npy"),
    ("array", ".npz"), ("trtllm", ".yaml"), ("trtllm", ".yml"), ("omni", ".npy"), ("deepseek", ".npz"),
    ("deepseek", ".pt"),
]  # fmt: skip


def by_rank(made: Placement) -> list[list[list[int]]]:
    """The sorted experts of each rank. OmniPlacement's form holds no more than these."""
    return np.sort(made.physical_to_logical.reshape(made.num_layers, made.num_ranks, -1), axis=2).tolist()


@pytest.mark.parametrize(("form", "ending"), ENDINGS)
def test_every_form_is_written_and_read(tmp_path: Path, form: str, ending: str) -> None:
    """A map is written and read in a form, then written and read again in every other form."""
    if ending == ".pt":
        pytest.importorskip("torch")
    assert {name for name, _ in ENDINGS} == set(FORMS)
    before = placement()
    first = tmp_path / f"first{ending}"
    write_expert_map(first, before, form)  # type: ignore[arg-type]
    found = read_expert_map(first, num_ranks=4, num_experts=8, num_layers=3)
    assert by_rank(found) == by_rank(before)
    assert (found == before) == (form != "omni" or by_rank(before) == before.physical_to_logical.tolist())
    for target_form, other_ending in ENDINGS:
        if other_ending == ".pt" and find_spec("torch") is None:
            continue
        second = tmp_path / f"second_{target_form}{other_ending}"
        write_expert_map(second, found, target_form)  # type: ignore[arg-type]
        assert by_rank(read_expert_map(second, num_ranks=4)) == by_rank(before)
    changed = before.physical_to_logical.copy()
    changed[1, [0, 3]] = changed[1, [3, 0]]
    assert by_rank(Placement(changed, 8, 4)) != by_rank(before)  # the comparison can fail


@pytest.mark.parametrize(
    "text",
    [
        "num_slots: 4\ninitial_global_assignments:\n  3: [0, 1, 2, 0]\n  4: [2, 1,\n      0, 1]\n",
        "initial_global_assignments:\n  4:\n  - 2\n  - 1\n  - 0\n  - 1\n  3:\n  - 0\n  - 1\n  - 2\n  - 0\n"
        "layer_updates_per_iter: 0\nnum_slots: 4\n",
        "# made by a script\n---\nnum_slots: 4\ninitial_global_assignments: {3: [0, 1, 2, 0], 4: [2, 1, 0, 1]}\n",
        'num_slots: 4\ninitial_global_assignments:\n  "3": [0, 1, 2, 0]\n  "4": [2, 1, 0, 1]\n',
        '{"num_slots": 4, "initial_global_assignments": {"3": [0, 1, 2, 0], "4": [2, 1, 0, 1]}}',
    ],
)
@pytest.mark.parametrize("name", ["moe_load_balancer.yaml", "map"])
def test_tensorrt_llm_dialects_are_read(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    found = read_expert_map(tmp_path / name, num_ranks=2)
    assert found.physical_to_logical.tolist() == [[0, 1, 2, 0], [2, 1, 0, 1]]
    assert found.num_experts == 3


def test_tensorrt_llm_layers_keep_their_numbers(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    write_expert_map(tmp_path / "a.yaml", placement(), dense_layers=3)
    value = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert list(value["initial_global_assignments"]) == [3, 4, 5]
    assert (value["num_slots"], value["layer_updates_per_iter"]) == (12, 0)
    write_expert_map(tmp_path / "b.yaml", placement(), layers=[1, 3, 5])
    assert list(yaml.safe_load((tmp_path / "b.yaml").read_text())["initial_global_assignments"]) == [1, 3, 5]
    write_expert_map(tmp_path / "b.json", placement(), "sglang", layers=[1, 3, 5])
    rows = json.loads((tmp_path / "b.json").read_text())["physical_to_logical_map"]
    assert [rows[number] for number in (1, 3, 5)] == placement().physical_to_logical.tolist()
    assert rows[0] == rows[2] == rows[4] == [slot % 8 for slot in range(12)]


BAD_TRTLLM = {
    "no assignments": ("num_slots: 288\nlayer_updates_per_iter: 1\n", "initial_global_assignments must be a table"),
    "slots": ("num_slots: 5\ninitial_global_assignments: {0: [0, 1]}\n", "num_slots is 5, but layers have 2"),
    "a list": ("num_slots: 2\ninitial_global_assignments: [[0, 1]]\n", "must be a table"),
    "ragged": ("initial_global_assignments: {3: [0, 1], 4: [0]}\n", r"layer 1 has 1 slots.*of the map is layer 3"),
    "text": ("initial_global_assignments: {0: [0, one]}\n", r'slot 1 is "one"'),
    "layer": ("initial_global_assignments: {-1: [0, 1]}\n", "has a layer -1"),
    "layer twice": ('initial_global_assignments: {0: [0, 1], "0": [1, 0]}\n', 'has a layer "0"'),
    "truncated": ("num_slots: 4\ninitial_global_assignments:\n  3: [0, 1, 2", "is not YAML"),
    "a date": ("initial_global_assignments: {0: [0, 2001-01-01]}\n", 'slot 1 is "2001-01-01"'),
    "tag": ("num_slots: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    "tab": ("num_slots: 4\n\tinitial_global_assignments: 3\n", "is not YAML"),
    "deep": ("num_slots: " + "[" * 50_000, "nested more than"),
    "deep, dashes": ("num_slots:\n" + "- " * 50_000, "nested more than"),
    "deep, indented": ("num_slots:\n" + "".join(" " * i + "a:\n" for i in range(1, 500)), "nested more than"),
    "bomb": (
        "num_slots: &a [0]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "initial_global_assignments: {0: *c}\n",
        "slot 0 is a list of 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRTLLM)
def test_bad_tensorrt_llm_files_are_refused(tmp_path: Path, case: str) -> None:
    text, message = BAD_TRTLLM[case]
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ExpertMapError, match=message) as caught:
        read_expert_map(tmp_path / "map.yaml", num_ranks=2)
    assert str(caught.value).isprintable()


def test_omni_patterns_are_read(tmp_path: Path) -> None:
    """A pattern is [ranks, layers, experts] of any number type, as an array or in an archive."""
    pattern = np.zeros((2, 1, 4))
    pattern[0, 0, [0, 1, 3]] = 1
    pattern[1, 0, [1, 2, 3]] = 1
    for kind in (np.int32, np.float32, bool):
        np.save(tmp_path / "a.npy", pattern.astype(kind))
        found = read_expert_map(tmp_path / "a.npy")
        assert found.physical_to_logical.tolist() == [[0, 1, 3, 1, 2, 3]]
        assert (found.num_ranks, found.num_experts) == (2, 4)
    np.savez(tmp_path / "a.npz", placement_pattern=pattern)
    assert read_expert_map(tmp_path / "a.npz") == found
    for change, message in (
        ((0, 0, 0, 2), "rank 0, layer 0, expert 0 is 2"),
        ((1, 0, 0, 1), "rank 1 holds 4 experts in layer 0, rank 0 holds 3"),
    ):
        bad = pattern.copy()
        bad[change[:3]] = change[3]
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ExpertMapError, match=message):
            read_expert_map(tmp_path / "bad.npy")
    twice = Placement(np.array([[0, 0, 1, 2]]), 3, 2)
    with pytest.raises(ExpertMapError, match="holds an expert twice"):
        write_expert_map(tmp_path / "twice.npy", twice, "omni")


def deepseek() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result of ``rebalance_experts`` for 3 experts in 4 slots."""
    return np.array([[2, 0, 1, 2]]), np.array([[[1, -1], [2, -1], [0, 3]]]), np.array([[1, 1, 2]])


@pytest.mark.parametrize("names", [("phy2log", "log2phy", "logcnt"), ("arr_0", "arr_1", "arr_2")])
def test_deepseeks_three_arrays_are_read(tmp_path: Path, names: tuple[str, str, str]) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(names, deepseek(), strict=True)))
    assert read_expert_map(tmp_path / "a.npz", num_ranks=2).physical_to_logical.tolist() == [[2, 0, 1, 2]]
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(array) for array in deepseek()]
    for value in (tuple(tensors), tensors, dict(zip(("phy2log", "log2phy", "logcnt"), tensors, strict=True))):
        torch.save(value, tmp_path / "a.pt")
        assert read_expert_map(tmp_path / "a.pt", num_ranks=2).physical_to_logical.tolist() == [[2, 0, 1, 2]]
    write_expert_map(tmp_path / "b.npz", read_expert_map(tmp_path / "a.pt", num_ranks=2), "deepseek")
    with np.load(tmp_path / "b.npz") as archive:
        for name, array in zip(("phy2log", "log2phy", "logcnt"), deepseek(), strict=True):
            assert archive[name].tolist() == array.tolist()


@pytest.mark.parametrize(
    ("which", "at", "value", "message"),
    [
        ("logcnt", (0, 0), 2, "logcnt does not count the copies in phy2log"),
        ("log2phy", (0, 0, 0), 3, "log2phy does not name the slots in phy2log"),
        ("log2phy", (0, 0, 1), 2, "log2phy does not name"),
        ("phy2log", (0, 0), 5, "phy2log has expert 5, logcnt is for 3 experts"),
    ],
)
def test_deepseeks_arrays_of_different_plans_are_refused(
    tmp_path: Path, which: str, at: tuple[int, ...], value: int, message: str
) -> None:
    arrays = dict(zip(("phy2log", "log2phy", "logcnt"), (array.copy() for array in deepseek()), strict=True))
    arrays[which][at] = value
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ExpertMapError, match=message):
        read_expert_map(tmp_path / "a.npz", num_ranks=2)


# --- loads -----------------------------------------------------------------------------------------------------------


def test_dumps_of_sglangs_recorder_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"rank": 0, "logical_count": torch.ones(4, 8, 16)}, tmp_path / "d.pt")
    found = read_trace(tmp_path / "d.pt")
    assert found.load.shape == (4, 8, 16)
    assert (found.load == 1).all()
    assert found.remarks == ()
    counts = torch.zeros(1000, 5, 16, dtype=torch.int32)  # a buffer with three steps, for a model with dense layers
    counts[:3, [1, 2, 4]] = torch.arange(16, dtype=torch.int32) + 1
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / "e.pt")
    found = read_trace(tmp_path / "e.pt")
    assert found.load.shape == (3, 3, 16)
    assert (found.layers, found.skipped) == ((1, 2, 4), (0, 3))
    for kind in (torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        torch.save(
            {"logical_count": torch.ones(8, 16, dtype=kind, requires_grad=kind.is_floating_point)}, tmp_path / "f"
        )
        assert read_trace(tmp_path / "f").load.shape == (1, 8, 16)


def test_sglangs_records_of_passes_are_read(tmp_path: Path) -> None:
    """The modes per_pass and per_token record counts by slot; the map in the file gives the experts."""
    torch = pytest.importorskip("torch")
    slots = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 2]])
    records = [
        {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "global_physical_count": torch.tensor(counts)}
        for number, counts in ((7, [[1, 2, 3, 4], [1, 1, 1, 1]]), (8, [[0, 0, 1, 0], [5, 0, 0, 5]]))
    ]
    records.append({**records[1], "rank": 1})
    torch.save({"records": records, "last_physical_to_logical_map": slots}, tmp_path / "d.pt")
    assert read_trace(tmp_path / "d.pt").load.tolist() == [
        [[5.0, 2.0, 3.0], [1.0, 1.0, 2.0]],
        [[0.0, 0.0, 2.0], [0.0, 0.0, 20.0]],
    ]
    assert read_expert_map(tmp_path / "d.pt", num_ranks=2).physical_to_logical.tolist() == slots.tolist()
    del records[0]["global_physical_count"]
    torch.save({"records": records, "last_physical_to_logical_map": slots}, tmp_path / "d.pt")
    with pytest.raises(TraceError, match="record 0 has no global_physical_count"):
        read_trace(tmp_path / "d.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_objects_in_a_torch_file_are_not_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": Evil()}, tmp_path / "evil.pt")
    for read, error in ((read_trace, TraceError), (read_expert_map, ExpertMapError)):
        with pytest.raises(error, match="weights_only=True") as caught:
            read(tmp_path / "evil.pt")
        assert str(caught.value).isprintable()
    assert "executed" not in capfd.readouterr().out


def test_view_that_claims_much_takes_no_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": torch.ones(1).expand(100_000, 1000, 1000)}, tmp_path / "a.pt")
    with pytest.raises(TraceError, match="tensors of 100000000000 numbers"):
        read_trace(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 4096


def test_only_torch_files_need_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": torch.ones(2, 4)}, tmp_path / "a.pt")
    write_expert_map(tmp_path / "b.yaml", placement())
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        "from vllm_ascend_eplb.files.expert_map import read_expert_map\n"
        "from vllm_ascend_eplb.files.traces import TraceError, read_trace\n"
        f"read_expert_map({str(tmp_path / 'b.yaml')!r}, num_ranks=4)\n"
        f"try: read_trace({str(tmp_path / 'a.pt')!r})\nexcept TraceError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "for which torch is needed; pip install torch" in done.stdout


@pytest.mark.parametrize("empty", [(0, 1, 2), (3,), (2, 5, 7), (7,), (0, 4, 7)])
def test_layers_without_counts_are_named_and_left_out(tmp_path: Path, empty: tuple[int, ...]) -> None:
    load = np.random.default_rng(0).integers(1, 100, (4, 8, 16)).astype(float)
    load[:, list(empty)] = 0
    np.save(tmp_path / "a.npy", load)
    found = read_trace(tmp_path / "a.npy")
    kept = [layer for layer in range(8) if layer not in empty]
    assert (found.skipped, found.layers, found.file_layers) == (empty, tuple(kept), 8)
    assert np.array_equal(found.load, load[:, kept])
    assert np.array_equal(found.of_all_layers(), load)
    whole = Placement.initial(8, 16, 4, 4)
    part = found.of_layers_with_load(whole)
    assert part.physical_to_logical.tolist() == whole.physical_to_logical[kept].tolist()
    assert np.isfinite(part.par(found.load.sum(axis=0))).all()
    assert found.of_layers_with_load(part) is part


def one_rank(kind: str) -> np.ndarray:
    """Counts of 64 experts as seen by one of four ranks."""
    rng = np.random.default_rng(1)
    load = np.zeros((3, 6, 64))
    for layer in range(6):
        own = np.arange(16) if kind == "first" else np.arange(48, 64) if kind == "last" else rng.permutation(64)[:20]
        load[:, layer, own] = rng.integers(50, 100, (3, len(own)))
    return load


@pytest.mark.parametrize("kind", ["first", "last", "of a placement"])
def test_counts_of_one_rank_are_remarked_on(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "a.npy", one_rank(kind))
    (line,) = read_trace(tmp_path / "a.npy").remarks
    assert "looks like the counts of one rank" in line
    assert line.isprintable()


def test_counts_of_all_ranks_are_not_remarked_on(tmp_path: Path) -> None:
    """Negative control: skewed loads, few tokens and few experts give no remark."""
    rng = np.random.default_rng(2)
    for load in (
        sum(np.roll(one_rank("first"), shift, axis=2) for shift in (0, 16, 40)),
        rng.zipf(1.5, (2, 6, 64)).astype(float),
        (rng.random((1, 6, 64)) < 0.2).astype(float),  # 13 tokens in a layer
        np.array([[[1.0, 0.0]]]),
    ):
        np.save(tmp_path / "a.npy", load)
        assert read_trace(tmp_path / "a.npy").remarks == ()


def test_npy_bytes_are_as_numpy_writes_them(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, placement().physical_to_logical)
    write_expert_map(tmp_path / "a.npy", placement())
    assert (tmp_path / "a.npy").read_bytes() == stream.getvalue()


def test_trtllm_settings_of_the_server_are_read(tmp_path: Path) -> None:
    """The server's settings may contain the balancer's settings, or name the file of the map."""
    pytest.importorskip("yaml")
    inner = "num_slots: 4\n    initial_global_assignments:\n      3: [0, 1, 2, 3]\n"
    for around in ("moe_config:\n  load_balancer:\n    ", "moe_config:\n  moe_load_balancer:\n    "):
        (tmp_path / "extra.yaml").write_text(around + inner)
        found = read_expert_map(tmp_path / "extra.yaml", num_ranks=2)
        assert found.physical_to_logical.tolist() == [[0, 1, 2, 3]]
    (tmp_path / "extra.yaml").write_text("moe_config:\n  load_balancer: ./moe_load_balancer.yaml\n")
    with pytest.raises(ExpertMapError, match=r"names the file of the map, ./moe_load_balancer.yaml; give that file"):
        read_expert_map(tmp_path / "extra.yaml", num_ranks=2)


@pytest.mark.parametrize(
    ("count", "said"),
    [("'4'", "write the number 4 without quotes"), ("4.0", "without a decimal"), ("5", "is 5, but layers")],
)
def test_trtllm_bad_number_of_slots_names_the_cause(tmp_path: Path, count: str, said: str) -> None:
    pytest.importorskip("yaml")
    text = f"num_slots: {count}\ninitial_global_assignments:\n  3: [0, 1, 2, 3]\n"
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(ExpertMapError, match=said):
        read_expert_map(tmp_path / "map.yaml", num_ranks=2)
