# SPDX-License-Identifier: Apache-2.0
"""Expert maps: every form is written and read back, and every bad file gives one clear line.

One file, because the bad files are variants of the good forms.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import pickle
import stat
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map, to_ascend, write_expert_map
from vllm_ascend_eplb.files.traces import TraceError, read_trace

ASCEND = {
    "moe_layer_count": 1,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]},
                {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]},
            ],
        }
    ],
}
"""The example of vllm-ascend's documentation."""


def placement(layers: int = 3, experts: int = 8, ranks: int = 4, redundant: int = 4, seed: int = 0) -> Placement:
    """A random placement in which no rank has two copies of an expert."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        order = random.permutation(experts)
        rows.append(np.concatenate([order, order[(np.arange(redundant) + 1) % experts]]))
    slots = np.array(rows, dtype=np.int32)
    # deal the slots out in turn, so that two copies of an expert are on different ranks
    per_rank = slots.shape[1] // ranks
    dealt = slots.reshape(layers, per_rank, ranks).transpose(0, 2, 1).reshape(layers, -1)
    made = Placement(dealt, experts, ranks)
    assert made.num_duplicates == 0
    return made


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.json", "ascend"), ("a.json", "sglang"), ("a.npy", None), ("a.npz", None), ("a.json", "array")],
)
def test_written_map_is_read_back(tmp_path: Path, name: str, form: str | None) -> None:
    before = placement()
    write_expert_map(tmp_path / name, before, form)  # type: ignore[arg-type]
    assert read_expert_map(tmp_path / name, num_layers=3, num_experts=8, num_ranks=4) == before
    assert os.listdir(tmp_path) == [name]  # no temporary file is left


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**16))
def test_any_written_placement_is_read_back(layers: int, per_rank: int, spare: int, seed: int) -> None:
    """Without fsync, which only the tests of writing need."""
    ranks = 4
    before = placement(layers, per_rank * ranks, ranks, min(spare, per_rank) * ranks and ranks, seed)
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        for form in ("ascend", "sglang", "array"):
            path = Path(folder) / f"{form}.json"
            write_expert_map(path, before, form, dense_layers=3)  # type: ignore[arg-type]
            assert read_expert_map(path, num_ranks=ranks, dense_layers=3 if form == "sglang" else 0) == before


def test_example_of_vllm_ascend_is_read(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(ASCEND))
    found = read_expert_map(tmp_path / "map.json")
    assert found.physical_to_logical.tolist() == [[7, 2, 0, 3, 5, 6, 1, 4, 7, 2]]
    assert (found.num_experts, found.num_ranks) == (8, 2)
    assert to_ascend(found) == ASCEND
    write_expert_map(tmp_path / "again.json", found)
    assert json.loads((tmp_path / "again.json").read_text()) == ASCEND


def test_ids_may_be_missing_or_begin_anywhere(tmp_path: Path) -> None:
    """vllm-ascend's loader uses the order of the lists and reads no ids, so we do the same. A map whose ids contradict
    the order is refused, because two readers would disagree."""
    before = placement()
    for change in (
        lambda entry, key: entry.pop(key),
        lambda entry, key: entry.update({key: entry[key] + 3}),
        lambda entry, key: entry.update({key: 2 * entry[key]}),
        lambda entry, key: entry.update({key: None}),
        lambda entry, key: entry.update({key: f"model.layers.{entry[key]}"}),
    ):
        value = to_ascend(before)
        for layer in value["layer_list"]:
            change(layer, "layer_id")
            for device in layer["device_list"]:
                change(device, "device_id")
            del layer["device_count"]
        (tmp_path / "map.json").write_text(json.dumps(value))
        assert read_expert_map(tmp_path / "map.json") == before
    example = '{"moe_layer_count":1,"layer_list":[{"device_count":2,"device_list":[{"device_expert":[0,1]},'
    (tmp_path / "map.json").write_text(example + '{"device_expert":[2,3]}]}]}')
    assert read_expert_map(tmp_path / "map.json").physical_to_logical.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("which", ["layer", "device"])
def test_ids_against_the_order_are_refused(tmp_path: Path, which: str) -> None:
    value = to_ascend(placement())
    for layer in value["layer_list"]:
        layer["device_list"].reverse() if which == "device" else None
    if which == "layer":
        value["layer_list"].reverse()
    (tmp_path / "map.json").write_text(json.dumps(value))
    with pytest.raises(ExpertMapError, match=rf"{which}_id \d stands after \d.*sort it by id"):
        read_expert_map(tmp_path / "map.json")


def test_sglang_counts_layers_without_experts(tmp_path: Path) -> None:
    before = placement()
    write_expert_map(tmp_path / "map.json", before, "sglang", dense_layers=3)
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert len(rows) == 6
    assert rows[0] == [slot % 8 for slot in range(12)]
    assert read_expert_map(tmp_path / "map.json", num_ranks=4, dense_layers=3) == before
    with pytest.raises(ExpertMapError, match=r"6 MoE layers, the model has 3.*without experts"):
        read_expert_map(tmp_path / "map.json", num_ranks=4, num_layers=3)


@pytest.mark.parametrize("name", ["map.json", "map.pt"])
@pytest.mark.parametrize("dense", [[1], [0, 2, 4], [0, 1, 2], (3,), {5, 1}])
def test_sglang_layers_without_experts_between_others(tmp_path: Path, name: str, dense: Collection[int]) -> None:
    """Control: without the numbers of these layers the same file is refused."""
    if name.endswith(".pt"):
        pytest.importorskip("torch")
    before = placement(layers=4)
    write_expert_map(tmp_path / name, before, "sglang", dense_layers=dense)
    assert read_expert_map(tmp_path / name, num_ranks=4, num_layers=4, dense_layers=dense) == before
    with pytest.raises(ExpertMapError, match="give the number of layers without experts"):
        read_expert_map(tmp_path / name, num_ranks=4, num_layers=4)


@pytest.mark.parametrize(
    ("dense", "said"), [([9], "layer 9"), (-1, "-1"), ([-2], "-2"), (7, "7 of them"), (range(7), "7 of")]
)
def test_bad_numbers_of_layers_without_experts_are_refused(
    tmp_path: Path, dense: int | Collection[int], said: str
) -> None:
    write_expert_map(tmp_path / "map.json", placement(), "sglang", dense_layers=3)
    with pytest.raises(ExpertMapError, match=said):
        read_expert_map(tmp_path / "map.json", num_ranks=4, dense_layers=dense)
    if said in ("layer 9", "-1", "-2"):
        with pytest.raises(ExpertMapError, match=said):
            write_expert_map(tmp_path / "out.json", placement(), "sglang", dense_layers=dense)


OTHER_KINDS = {
    "map.json.gz": (gzip.compress(b"{}"), "compressed by gzip"),
    "map.json": (pickle.dumps([[0, 1]]), "a pickle or torch.save's form of old"),
    "map.bz2": (bz2.compress(b"{}"), "compressed by bzip2"),
    "map.xz": (lzma.compress(b"{}"), "compressed by xz"),
    "map.h5": (b"\x89HDF\r\n\x1a\n" + bytes(8), "is HDF5"),
    "map.parquet": (b"PAR1" + bytes(8), "is Parquet"),
    "numbers.csv": (b"0,1,2,3\n3,2,1,0\n", "a table of text"),
    "names.txt": (b"layer;slot;expert\n0;0;1\n", "a table of text"),
    "tabs.tsv": (b"\xef\xbb\xbf0\t1\n1\t0\n", "a table of text"),
    "floats.dat": (b"-1.5, 2e3\n", "a table of text"),
    "quoted.csv": (b'"layer","expert"\n"0","1"\n', "a table of text"),
}
"""Files of other kinds: their first bytes, and the error."""


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_files_of_another_kind_are_named(tmp_path: Path, name: str) -> None:
    """The kind is named in the errors of a map and of loads. Control: JSON with commas is none of these kinds
    (test_written_map_is_read_back, test_bad_values_are_named)."""
    data, said = OTHER_KINDS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ExpertMapError, match=said):
        read_expert_map(tmp_path / name, num_ranks=2)
    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path / name)


def _changed(**changes: object) -> dict[str, object]:
    return {**ASCEND, **changes}


def _with_experts(first: object, second: object = (6, 1, 4, 7, 2)) -> dict[str, object]:
    value = json.loads(json.dumps(ASCEND))
    devices = value["layer_list"][0]["device_list"]
    devices[0]["device_expert"], devices[1]["device_expert"] = first, second
    return value


BAD_VALUES = {
    "twice on a device": (_with_experts([7, 2, 7, 3, 5], [6, 1, 4, 0, 2]), "layer 0, device 0 holds expert 7 twice"),
    "missing expert": (_with_experts([7, 2, 1, 3, 5]), r"layer 0 has no copy of expert 0"),
    "id too large": (_with_experts([7, 2, 0, 3, 99999]), r"layer 0, device 0, slot 4 is 99999"),
    "id negative": (_with_experts([7, 2, -1, 3, 5]), r"layer 0, device 0, slot 2 is -1"),
    "id a float": (_with_experts([7, 2, 0.0, 3, 5]), r"slot 2 is 0\.0; .* without a decimal point"),
    "id a boolean": (_with_experts([7, 2, False, 3, 5]), r"slot 2 is false"),
    "id a string": (_with_experts([7, 2, "0", 3, 5]), r"slot 2 is \"0\"; .* written without quotes"),
    "id huge": (_with_experts([7, 2, 10**300, 3, 5]), r"slot 2 is a number of more than 40 digits"),
    "uneven devices": (_with_experts([7, 2, 0, 3, 5], [6, 1, 4, 7]), r"device 1 has 4 slots.*has 5"),
    "no slots": (_with_experts([]), r"device 0: device_expert must be a list"),
    "no list": (_with_experts(7), r"device_expert must be a list of expert ids; it is 7"),
    "wrong layer count": (_changed(moe_layer_count=2), r"moe_layer_count is 2, but layer_list has 1"),
    "no layers": (_changed(layer_list=[], moe_layer_count=0), r"layer_list must be a list"),
    "layer no object": (_changed(layer_list=[3]), r"layer_list\[0\] is 3"),
    "layer text": (_changed(layer_list=["a"]), r'layer_list\[0\] is "a"; expected an object'),
    "count as text": (_changed(moe_layer_count="1"), r'count is "1", text; write the number 1 without quotes'),
    "count as float": (_changed(moe_layer_count=1.0), r"moe_layer_count is 1.0; write 1 without a decimal point"),
    "devices as text": (
        _changed(layer_list=[{**ASCEND["layer_list"][0], "device_count": "2"}]), r"write the number 2 without quotes"
    ),
    "no layer count": ({"layer_list": ASCEND["layer_list"]}, r"moe_layer_count is missing or null.*write the number 1"),
    "layer twice": (_changed(moe_layer_count=2, layer_list=ASCEND["layer_list"] * 2), r"layer 0 stands twice"),
    "device count": (_changed(layer_list=[{**ASCEND["layer_list"][0], "device_count": 3}]), r"device_count is 3, but"),
    "other JSON": ({"hello": 1}, r"not an expert map: expected"),
    "a number": (3, r"not an expert map"),
    "loads": ({"logical_count": [[1]]}, r"holds loads"),
    "ragged rows": ([[0, 1], [0]], r"layer 1 has 1 slots, layer 0 has 2"),
    "row no list": ([[0, 1], 5], r"layer 1 must be a list"),
    "fewer slots than experts": ([[0, 1], [0, 9]], r"fewer than 10 experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_named(tmp_path: Path, case: str) -> None:
    value, message = BAD_VALUES[case]
    (tmp_path / "map.json").write_text(json.dumps(value))
    with pytest.raises(ExpertMapError, match=message) as caught:
        read_expert_map(tmp_path / "map.json", num_ranks=2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_duplicates_may_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(_with_experts([7, 2, 7, 3, 5], [6, 1, 4, 0, 2])))
    assert read_expert_map(tmp_path / "map.json", allow_duplicates=True).num_duplicates == 1


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _npy_header(shape: str, descr: str = "<i8") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def _npz(**arrays: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


GOOD = json.dumps(ASCEND).encode()
BAD_BYTES = {
    "empty": (b"", "is empty"),
    "truncated": (GOOD[: len(GOOD) // 2], "is not JSON"),
    "zeros": (b"\0" * 4096, "is not JSON"),
    "not UTF-8": (b"\xff\xfe\xff", "is not JSON"),
    "NaN": (GOOD.replace(b"[7,", b"[NaN,"), "NaN is not a JSON number"),
    "infinity": (GOOD.replace(b"[7,", b"[-Infinity,"), "-Infinity is not a JSON number"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested 100000 levels deep"),
    "deep, hidden": (b'"' + b"]" * 5000 + b'"' + b"[" * 4000, "is not JSON"),
    "key twice": (GOOD.replace(b'"layer_id": 0', b'"layer_id": 0, "layer_id": 0'), "'layer_id' stands twice"),
    "many digits": (GOOD.replace(b"[7,", b"[" + b"7" * 10_000 + b","), "is not JSON"),
    "npy that claims much": (_npy_header("(1000000, 1000000)"), "claims shape"),
    "npy of objects": (_npy_header("(1, 1)", "|O"), "array of numbers"),
    "npy negative": (_npy_header("(-1, 2)") + b"\0" * 16, "claims shape|no NumPy array"),
    "npy truncated": (_npy(np.zeros((2, 4)))[:-8], "claims shape"),
    "npy of NaN": (_npy(np.array([[0.0, np.nan]])), "layer 0, slot 1 is nan"),
    "npy of one dimension": (_npy(np.arange(4)), "expected"),
    "npz damaged": (_npz(physical_to_logical=_npy(np.zeros((1, 4), dtype=int)))[:60], "not an .npz archive|damaged"),
    "npz of other things": (_npz(a=_npy(np.zeros(3)), b=_npy(np.zeros(3))), "has no array physical_to_logical"),
    "npz with ranks of text": (
        _npz(physical_to_logical=_npy(np.array([[0, 1]])), num_ranks=_npy(np.array([2.5]))),
        "num_ranks must be one integer",
    ),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_bytes_are_refused_with_the_cause(tmp_path: Path, case: str) -> None:
    data, message = BAD_BYTES[case]
    (tmp_path / "map").write_bytes(data)
    with pytest.raises(ExpertMapError, match=message) as caught:
        read_expert_map(tmp_path / "map", num_ranks=2)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_text_of_too_many_lists_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ascend_eplb.files.disk.MAX_JSON_CONTAINERS", 1000)
    (tmp_path / "map.json").write_bytes(b"[" + b"[]," * 1000 + b"[]]")
    with pytest.raises(ExpertMapError, match="1000 values; allowed"):
        read_expert_map(tmp_path / "map.json")


def test_gigabyte_of_zeros_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "map.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ExpertMapError, match="has 1073741824 bytes"):
        read_expert_map(tmp_path / "map.json")


def test_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    data = bytearray(_npz(physical_to_logical=_npy_header("(40000, 40000)") + b"\0" * (8 << 20)))
    (tmp_path / "map.npz").write_bytes(data)
    with pytest.raises(ExpertMapError, match="claims shape"):
        read_expert_map(tmp_path / "map.npz", num_ranks=2)


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExpertMapError, match="does not exist"):
        read_expert_map(tmp_path / "nothing.json")
    with pytest.raises(ExpertMapError, match="is a directory"):
        read_expert_map(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExpertMapError, match="symbolic link to nothing"):
        read_expert_map(tmp_path / "dangling")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ExpertMapError, match="cannot be read"):
        read_expert_map(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExpertMapError, match="not a regular file"):
        read_expert_map(tmp_path / "pipe")
    with pytest.raises(ExpertMapError, match="cannot be read"):
        read_expert_map("a\0b")
    with pytest.raises(ExpertMapError, match=r"cannot be read|does not exist"):
        read_expert_map("x" * 5000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_bytes(GOOD)
    (tmp_path / "map.json").chmod(0)
    with pytest.raises(ExpertMapError, match="may not be read"):
        read_expert_map(tmp_path / "map.json")


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_bytes(GOOD)
    (tmp_path / "map.json").symlink_to("real.json")
    assert read_expert_map(tmp_path / "map.json").num_ranks == 2


def test_map_of_another_model_is_refused(tmp_path: Path) -> None:
    write_expert_map(tmp_path / "map.json", placement())
    with pytest.raises(ExpertMapError, match="3 MoE layers, the model has 4"):
        read_expert_map(tmp_path / "map.json", num_layers=4)
    with pytest.raises(ExpertMapError, match=r"device \d, slot \d holds expert [67]; the model has experts 0\.\.5"):
        read_expert_map(tmp_path / "map.json", num_experts=6)
    with pytest.raises(ExpertMapError, match="no copy of expert 8"):
        read_expert_map(tmp_path / "map.json", num_experts=9)
    with pytest.raises(ExpertMapError, match="is for 4 devices, the server has 8"):
        read_expert_map(tmp_path / "map.json", num_ranks=8)
    write_expert_map(tmp_path / "map.npy", placement())
    with pytest.raises(ExpertMapError, match="does not say how many ranks"):
        read_expert_map(tmp_path / "map.npy")
    with pytest.raises(ExpertMapError, match="12 slots per layer, which 5 ranks"):
        read_expert_map(tmp_path / "map.npy", num_ranks=5)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, placement(seed=1))
    path.chmod(0o640)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ExpertMapError, match="No space left"):
        write_expert_map(path, placement(seed=2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["map.json"]
    monkeypatch.undo()
    write_expert_map(path, placement(seed=2))
    assert path.read_bytes() != before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExpertMapError, match=r"folder of .* does not exist"):
        write_expert_map(tmp_path / "no" / "map.json", placement())
    with pytest.raises(ExpertMapError, match="is a directory"):
        write_expert_map(tmp_path, placement())
    (tmp_path / "link.json").symlink_to("real.json")
    with pytest.raises(ExpertMapError, match="symbolic link"):
        write_expert_map(tmp_path / "link.json", placement())
    assert not (tmp_path / "real.json").exists()
    with pytest.raises(ExpertMapError, match="layer 0, slot 1 is empty"):
        write_expert_map(tmp_path / "map.json", Placement([[0, -1]], 1, 2))


@settings(deadline=None, max_examples=40)
@given(st.binary(max_size=300))
def test_any_bytes_give_an_expert_map_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for start in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b'{"layer_list": ', b'{"physical_to_logical_map": '):
            path = Path(folder) / "map"
            path.write_bytes(start + data)
            with pytest.raises(ExpertMapError):
                read_expert_map(path, num_ranks=2, num_experts=7)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_changed_byte_gives_a_map_or_an_error(position: int, value: int) -> None:
    data = bytearray(GOOD)
    data[position % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.json"
        path.write_bytes(data)
        with contextlib.suppress(ExpertMapError):
            assert read_expert_map(path, num_experts=8, num_ranks=2).num_slots == 10
