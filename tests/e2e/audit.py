# SPDX-License-Identifier: Apache-2.0
"""Record every step of a server's workers. Every process loads this module as it starts, so it imports little."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

AUDIT = "EPLB_TEST_AUDIT"
"""Variable with the folder of the records. They are files, because a test cannot call a worker in a server."""


FIRST = "import audit\naudit.audit_steps()\n"
"""What the processes of an audited server begin with."""

Step = tuple[int, bool, list[int]]
"""Of a step of a worker: scheduled tokens, whether they are to be recorded, and the recorder's counts per layer."""


def audited_steps(folder: Path) -> list[list[Step]]:
    """The steps of every worker; a line that is being written is left out."""
    lines = [[line for line in path.read_text().splitlines() if line.endswith("]")] for path in folder.iterdir()]
    return [[tuple(json.loads(line)) for line in of_worker] for of_worker in lines]


def audit_steps() -> None:
    """Call this as a process starts. Every worker then writes a line of JSON per step: the scheduled tokens, true if
    they are to be recorded, and the recorder's counts per layer."""
    from vllm_ascend_eplb.adaptors.post_import import after_import

    scheduled = [0]
    folder = Path(os.environ[AUDIT])

    def watch_runner(module: Any) -> None:
        execute, dummy = module.GPUModelRunner.execute_model, module.GPUModelRunner._dummy_run

        def watched_execute(self: Any, scheduler_output: Any, *rest: Any, **names: Any) -> Any:
            scheduled[0] = scheduler_output.total_num_scheduled_tokens
            return execute(self, scheduler_output, *rest, **names)

        def watched_dummy(self: Any, *rest: Any, **names: Any) -> Any:
            scheduled[0] = 0
            return dummy(self, *rest, **names)

        module.GPUModelRunner.execute_model, module.GPUModelRunner._dummy_run = watched_execute, watched_dummy

    def watch_state(module: Any) -> None:
        before, step = module.VllmEplbState.forward_before, module.VllmEplbState.step

        def sums(self: Any) -> Any:
            return self.updator.parts.recorder.counts.sum(dim=1)

        def watched_before(self: Any, **names: Any) -> None:
            before(self, **names)
            self.audited = sums(self) if self._began else None

        def watched_step(self: Any, *rest: Any, **names: Any) -> None:
            if self._began and getattr(self, "audited", None) is not None:
                line = [scheduled[0], bool(self.should_record_tensor), (sums(self) - self.audited).tolist()]
                with (folder / str(os.getpid())).open("a") as lines:  # workers may be forked
                    lines.write(json.dumps(line) + "\n")
            step(self, *rest, **names)

        module.VllmEplbState.forward_before, module.VllmEplbState.step = watched_before, watched_step

    after_import("vllm.v1.worker.gpu_model_runner", watch_runner)
    after_import("vllm_ascend_eplb.adaptors.vllm.state", watch_state)
