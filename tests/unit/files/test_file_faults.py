# SPDX-License-Identifier: Apache-2.0
"""Files under real faults: a full disk, two writers, and headers that claim more data than the file has."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from vllm_ascend_eplb.files.disk import FileError, write_atomic, write_private
from vllm_ascend_eplb.files.expert_map import read_expert_map

PACKAGE = Path(__file__).parents[3] / "vllm_ascend_eplb"

FULL_DISK = """
import ctypes, logging, os, sys, threading
from pathlib import Path
import numpy as np
from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.agreement.channel import FlightRecorder
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map, write_expert_map
from vllm_ascend_eplb.files.map_recorder import MapRecorder
from vllm_ascend_eplb.observe.stats import EplbStats
from vllm_ascend_eplb.observe.stats_file import StatsFile, read_stats

folder = Path(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=96k") == 0, os.strerror(ctypes.get_errno())
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
for name in ("vllm.eplb", "vllm_ascend_eplb"):
    logging.getLogger(name).addHandler(handler)

small, large = Placement.initial(1, 8, 4, 8), Placement.initial(200, 64, 4, 64)
path, stats = folder / "map.json", StatsFile(folder / "stats.json", min_interval=0.0)
write_expert_map(path, small)
stats.write(EplbStats(step=1))
(folder / "ballast").write_bytes(b"x" * (60 << 10))
try:
    write_expert_map(path, large)  # 100 KiB and more
    print("written on a full disk")
except ExpertMapError as error:
    print("ERROR", error)
assert read_expert_map(path) == small, "half a file"
recorder = MapRecorder(path)


def after_each_write(writer):
    "Returns a function that waits until the writer's thread has tried to write once more."
    write, tried = writer.write, threading.Semaphore(0)

    def counted(*arguments):
        try:
            write(*arguments)
        finally:
            tried.release()

    writer.write = counted
    return lambda: tried.acquire(timeout=60) or sys.exit("nothing was written")


recorded, published = after_each_write(recorder), after_each_write(stats)
for _ in range(3):
    recorder.record(large, np.ones((200, 64), dtype=np.int64))
    recorded()
(folder / "more").write_bytes(b"")
with open(folder / "rest", "wb", buffering=0) as rest:  # to the last byte
    try:
        while True:
            rest.write(b"x" * 512)
    except OSError:
        pass
for step in range(2, 5):
    stats.publish(EplbStats(step=step))
    published()
assert read_stats(stats.path).step == 1
try:
    FlightRecorder().dump(folder / "flight.json", reason="x" * 5000)
except OSError:
    print("FLIGHT")
(folder / "ballast").unlink()
(folder / "rest").unlink()
recorder.record(small)
recorder.close()
stats.publish(EplbStats(step=9))
stats.close()
assert read_expert_map(path) == small
assert read_stats(stats.path).step == 9
left = sorted(os.listdir(folder))
print("LEFT", left)
print("LINES", *(sum(part in line for line in lines) for part in ("not recorded", "statistics cannot")))
"""


def test_full_disk_leaves_whole_files_and_a_line_for_each(tmp_path: Path) -> None:
    program = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), *program]
    if shutil.which("unshare") is None or subprocess.run([*command[: -len(program)], "true"]).returncode:
        pytest.skip("a small disk cannot be mounted on this machine")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "No space left on device" in said[0]
    assert str(tmp_path / "map.json") in said[0]
    left = next(line for line in said if line.startswith("LEFT"))
    assert not [name for name in json.loads(left[5:].replace("'", '"')) if name.startswith(".")], left
    assert "LINES 1 1" in said


RECORD = """
import sys
from pathlib import Path
import numpy as np
from vllm_ascend_eplb import Placement
from vllm_ascend_eplb.files.map_recorder import MapRecorder
recorder = MapRecorder(sys.argv[1])
for number in range(150):
    row = np.roll(np.arange(64) % 48, int(sys.argv[2]) + 2 * number)
    recorder.record(Placement(np.tile(row, (40, 1)), 48, 4), np.full((40, 48), number))
    if number % 10 == 0:
        import time; time.sleep(0.01)
recorder.close()
print("DONE")
"""


@pytest.mark.parametrize("written", ["for everybody", "for the owner"])
def test_writer_killed_in_the_midst_leaves_only_the_old_file(written: str, tmp_path: Path) -> None:
    target = tmp_path / "map.json"
    target.write_text("old")
    child = os.fork()
    if child == 0:
        with mock.patch("os.fchmod", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            write(written, target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert contents(tmp_path) == {"map.json": "old"}
    write(written, target)
    assert contents(tmp_path) == {"map.json": "new"}


@pytest.mark.parametrize("written", ["for everybody", "for the owner"])
@pytest.mark.parametrize("lacking", ["unnamed files", "links from /proc"])
def test_file_system_that_lacks(lacking: str, written: str, tmp_path: Path) -> None:
    target, opened = tmp_path / "map.json", os.open
    target.write_text("old")
    lacks = OSError(errno.EOPNOTSUPP, "Operation not supported")

    def named_only(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise lacks
        return opened(path, flags, *rest)

    with mock.patch("os.open", named_only) if "unnamed" in lacking else mock.patch("os.link", side_effect=lacks):
        broken_disk = mock.patch("os.fchmod", side_effect=OSError(errno.EIO, "Input/output error"))
        with broken_disk, pytest.raises((OSError, FileError), match="Input/output error"):
            write(written, target)
        assert contents(tmp_path) == {"map.json": "old"}
        write(written, target)
    assert contents(tmp_path) == {"map.json": "new"}


def write(written: str, target: Path) -> None:
    if written == "for everybody":
        mode = stat.S_IMODE(target.stat().st_mode)
        write_atomic(target, b"new")
        assert stat.S_IMODE(target.stat().st_mode) == mode
    else:
        write_private(target, "new")
        assert stat.S_IMODE(target.stat().st_mode) == 0o600


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_two_servers_never_leave_a_part_of_a_shared_file(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD, str(path), str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in (0, 1)
    ]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            placement = read_expert_map(path, num_layers=40, num_experts=48, num_ranks=4, allow_duplicates=True)
            assert (placement.physical_to_logical == placement.physical_to_logical[0]).all()
            reads += 1
    assert [writer.communicate()[0].strip() for writer in writers] == ["DONE", "DONE"]
    assert reads > 0
    assert sorted(os.listdir(tmp_path)) == ["map.json", "map.load.npz"]


def npy(shape: str, dtype: str = "<i8", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def npz(**arrays: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def claims_size(archive: bytes) -> bytes:
    """The archive with a directory that says that the member has 3 GB when unpacked."""
    at = archive.rindex(b"PK\x01\x02") + 24
    return archive[:at] + (3 << 30).to_bytes(4, "little") + archive[at + 4 :]


SLOTS = np.tile(np.arange(4), (2, 1)).astype("<i8")
HOSTILE = {
    "shape of a petabyte": npy("(1000000, 1000000000)"),
    "shape beyond 64 bits": npy("(99999999999999999999, 99999999999999999999)"),
    "one long dimension": npy("(1, 10000000000000)"),
    "giant items": npy("(1, 1)", "<U99999999"),
    "petabyte in an archive": npz(physical_to_logical=npy("(1000000, 1000000000)")),
    "archive that claims 3 GB": claims_size(npz(physical_to_logical=npy("(2, 4)", data=SLOTS.tobytes()))),
    "experts beyond reason": npz(
        physical_to_logical=npy("(2, 4)", data=SLOTS.tobytes()),
        num_experts=npy("()", data=(10**15).to_bytes(8, "little")),
    ),
    "ranks beyond reason": npz(
        physical_to_logical=npy("(2, 4)", data=SLOTS.tobytes()),
        num_ranks=npy("()", data=(10**15).to_bytes(8, "little")),
    ),
    "an expert's number beyond reason": json.dumps([[0, 10**9]]).encode(),
    "counts beyond reason": json.dumps(
        {"moe_layer_count": 10**12, "layer_list": [{"layer_id": 0, "device_count": 10**12, "device_list": []}]}
    ).encode(),
}

READ = """
import resource, sys
from vllm_ascend_eplb.files.expert_map import ExpertMapError, read_expert_map
from vllm_ascend_eplb.files.traces import TraceError, read_trace
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20),) * 2)
for path in sys.argv[1:]:
    for read, arguments, error in ((read_expert_map, {"num_ranks": 2}, ExpertMapError), (read_trace, {}, TraceError)):
        try:
            read(path, **arguments)
            print("READ", path)
        except error as said:
            assert "\\n" not in str(said), said
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print("GROWN", grown >> 10)
"""


def test_numbers_in_a_file_take_no_memory(tmp_path: Path) -> None:
    for name, data in HOSTILE.items():
        (tmp_path / name.replace(" ", "-")).write_bytes(data)
    paths = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1].removeprefix("GROWN "))
    assert grown < 64, f"{grown} MiB for files of a few hundred bytes"
    maps = [line for line in done.stdout.splitlines() if line.startswith("READ") and "beyond" not in line]
    assert maps == []


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


FROM_OUR_OWN_RANKS = {"pull.py: pickle.loads"}
"""Handles of device memory. Ranks of a server on a host exchange them at start-up over the engine's own group."""


def test_package_never_executes_or_unpickles_a_file() -> None:
    """The planner's queues also use pickle, over pipes between parent and child; test_process.py tests those."""
    forbidden = {"eval", "exec", "compile", "pickle.loads", "pickle.load", "torch.load", "marshal.loads", "yaml.load"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            if f"{path.name}: {name}" in FROM_OUR_OWN_RANKS:
                continue
            if name == "torch.load" and "weights_only=True" in ast.unparse(call):
                continue  # reads tensors, numbers, text and containers only
            if name in forbidden or name.endswith(("all_gather_object", "broadcast_object_list", "recv_object_list")):
                found.append(f"{path.name}:{call.lineno}: {name}")
            if name.endswith(("np.load", "read_array")):
                allowed = [keyword for keyword in call.keywords if keyword.arg == "allow_pickle"]
                if not allowed or not isinstance(allowed[0].value, ast.Constant) or allowed[0].value.value is not False:
                    found.append(f"{path.name}:{call.lineno}: {name} may unpickle")
    assert found == []


def test_search_for_calls_finds_planted_ones() -> None:
    planted = "import torch.distributed as dist\ndist.all_gather_object([], 1)\nnp.load(x)\neval('1')\n"
    assert [name for name, _ in calls(ast.parse(planted))] == ["dist.all_gather_object", "np.load", "eval"]
