# SPDX-License-Identifier: Apache-2.0
"""Stand-in for triton.language.extra.cann.extension of triton-ascend, which vllm-ascend imports; with two changes of
Triton's interpreter:

* A comparison gives booleans. In Triton 3.6.0 a broadcast comparison of scalars keeps the type of its operands.
* Only changed arguments are written back. The interpreter writes back all arguments, also while another stream reads
  them; a compiled kernel does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _missing(name: str) -> Callable[..., Any]:
    def refuse(*unused: Any, **unused_too: Any) -> Any:
        raise NotImplementedError(f"not emulated: {name} of triton-ascend")

    return refuse


insert_slice = _missing("insert_slice")
extract_slice = _missing("extract_slice")


def get_element(src: Any, indice: Sequence[Any], **unused: Any) -> Any:
    """The element of a tensor at an index of numbers or scalars."""
    index = tuple(int(part.handle.data.item()) if isinstance(part, tl.tensor) else int(part) for part in indice)
    element = np.array([src.handle.data[index]])
    return tl.tensor(interpreter.TensorHandle(element, src.dtype.scalar), src.dtype.scalar)


_COMPARISONS = {
    "LT": np.less,
    "GT": np.greater,
    "LE": np.less_equal,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _comparison(compare: Callable[..., Any]) -> Callable[..., Any]:
    def compared(builder: Any, left: Any, right: Any) -> Any:
        return interpreter.TensorHandle(np.asarray(compare(left.data, right.data), dtype=np.bool_), tl.int1)

    return compared


for _name in dir(interpreter.InterpreterBuilder):
    if _name.startswith(("create_icmp", "create_fcmp")):
        setattr(interpreter.InterpreterBuilder, _name, _comparison(_COMPARISONS[_name[-2:]]))


def _contents(tensor: torch.Tensor) -> np.ndarray:
    """uint8: the memory of a tensor on the host, as a view."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()


_to_host = interpreter.GridExecutor._init_args_hst


def _to_host_and_remember(self: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    hosts, host_options = _to_host(self, args, options)
    self._before = {}
    for host in (*hosts, *host_options.values()):
        if hasattr(host, "data_ptr") and host.untyped_storage().nbytes():
            self._before.setdefault(host.untyped_storage().data_ptr(), _contents(host).copy())
    return hosts, host_options


def _write_back_what_changed(
    self: Any, args: Any, hosts: Any, options: dict[str, Any], host_options: dict[str, Any]
) -> None:
    for device, host in zip((*args, *options.values()), (*hosts, *host_options.values()), strict=True):
        if not hasattr(device, "data_ptr"):
            continue
        before = self._before.pop(host.untyped_storage().data_ptr(), None)
        if before is not None and not np.array_equal(before, _contents(host)):
            device.untyped_storage().copy_(host.untyped_storage())


interpreter.GridExecutor._init_args_hst = _to_host_and_remember
interpreter.GridExecutor._restore_args_dev = _write_back_what_changed
