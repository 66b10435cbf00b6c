# SPDX-License-Identifier: Apache-2.0
"""What the nightly workflow runs on real NPUs, in the manner of vllm-ascend's own CI: a server with balancing off and
one with balancing on give the same text. Beyond that CI, experts moved, PAR fell, answers to arithmetic questions are
as often right, and wrong weights change the text. The same commands run on emulated NPUs.

Text is compared token by token in float32, which NPUs do not serve and emulated ones do. In other dtypes it is compared
by share: sums are rounded, and their order depends on the placement.

Environment variables:

    NPU_TEST_MODEL      a path or a name, or one of tiny-moe (the default) and tiny-moe-w8a8: examples/tiny_moe, the
                        second with experts in W8A8
    NPU_TEST_DTYPE      float32, bfloat16 or float16; float32 for tiny-moe on emulated NPUs, otherwise the model's own
    NPU_TEST_RANKS      tensor-parallel size; 2
    NPU_TEST_ENGINES    data-parallel size; 1
    NPU_TEST_RUNNER     V1 or V2: the model runner; V1
    NPU_TEST_QUESTIONS  a file in the form of GSM8K's test.jsonl, one object a line with question and answer, which ends
                        in "#### NUMBER"; without it accuracy is not measured
    NPU_TEST_ACCURACY   the least share of right answers; 0
    NPU_TEST_OUTPUT     an empty or new folder for logs, statistics, texts and accuracy; a temporary one
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.demo.server import MODEL
from vllm_ascend_eplb.observe.stats import EplbStats

from . import npus, serving

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not npus.REAL and bool(serving.MISSING), reason=serving.MISSING),
]
SETTINGS: dict[str, object] = {
    "dynamic_eplb": True,
    "expert_heat_collection_interval": 40,
    "algorithm_execution_interval": 5,
    "min_gain": 0.0,
    "target_par": 1.0,
    "calibrate": False,
}
NAME = os.environ.get("NPU_TEST_MODEL", "tiny-moe")
RANKS, ENGINES = (int(os.environ.get(f"NPU_TEST_{name}", default)) for name, default in (("RANKS", 2), ("ENGINES", 1)))
QUESTIONS = os.environ.get("NPU_TEST_QUESTIONS", "")
TINY = NAME.startswith("tiny-moe")
ROUNDS, TEXT_TOKENS, ANSWER_TOKENS = 4, 48, 256
OWN = {"tiny-moe": "auto" if npus.REAL else "float32", "tiny-moe-w8a8": "float16"}
DTYPE = os.environ.get("NPU_TEST_DTYPE") or OWN.get(NAME, "auto")
LEAST, MOST = 0.97, 0.95
"""The share of equal tokens where sums are rounded: at least LEAST with the right weights, at most MOST with wrong
ones."""


@dataclass
class Run:
    """What a server answered.

    Attributes:
        texts: token ids of each prompt of each batch, round by round.
        right: for each question, whether the answer was right.
        stats: the balancer's last report; None without balancing.
        control: the least share of equal tokens once weights stay where they are while maps change.
    """

    texts: list[list[list[int]]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    stats: EplbStats | None = None
    control: float = 1.0


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("NPU_TEST_OUTPUT") or tmp_path_factory.mktemp("output"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


@pytest.fixture(scope="module")
def runs(output: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """With balancing off, and on."""
    model = str(MODEL) if TINY else NAME
    if NAME == "tiny-moe-w8a8":
        made = tmp_path_factory.mktemp("model") / "w8a8"
        serving.quantised_model(made)
        model = str(made)
    on = {**SETTINGS, "num_redundant_experts": RANKS * ENGINES}
    off = run(output / "off", model, None, [])
    return off, run(output / "on", model, on, off.texts)


def run(folder: Path, model: str, settings: dict[str, object] | None, want: list[list[list[int]]]) -> Run:
    """Ask a server. The control compares with ``want``."""
    folder.mkdir()
    arguments = ("--data-parallel-size", str(ENGINES)) if ENGINES > 1 else ()
    if not TINY:
        arguments = (*arguments, "--max-model-len", "2048")  # the last one counts
    server = serving.NpuServer(
        settings, folder, RANKS, dtype=DTYPE, model=model, probe=TINY, arguments=arguments
    ).started()
    found, batches = Run(), serving.prompts(4)
    try:
        for _ in range(ROUNDS):
            found.texts += [server.complete(batch, TEXT_TOKENS) for batch in batches]
        found.right = [
            is_right(answer, known)
            for texts, answers in questions(QUESTIONS, serving.MAX_SEQUENCES)
            for answer, known in zip(server.complete_text(texts, ANSWER_TOKENS), answers, strict=True)
        ]
        found.stats = server.stats()
        if TINY and settings is not None:  # it keeps a copy of all experts
            server.call("probe_freeze_weights")
            for number in range(40):
                got = server.complete(batches[number % len(batches)], TEXT_TOKENS)
                pairs = list(zip(got, want[number % len(batches)], strict=True))
                found.control = min(found.control, serving.agreement(pairs, TEXT_TOKENS))
                if found.control <= MOST:
                    break
    finally:
        server.stop()
    share = sum(found.right) / len(found.right) if found.right else None
    answered = {"texts": found.texts, "accuracy": share, "questions": len(found.right), "control": found.control}
    (folder / "answers.json").write_text(json.dumps(answered))
    return found


def questions(path: str, most: int) -> Iterator[tuple[list[str], list[str]]]:
    """Prompts and known answers of a file, at most ``most`` at a time; none without a file."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for first in range(0, len(lines), most):
        items = [json.loads(line) for line in lines[first : first + most]]
        yield (
            [f"Question: {item['question']}\nAnswer: Step by step," for item in items],
            [item["answer"] for item in items],
        )


def is_right(answer: str, known: str) -> bool:
    """Whether the last number before the next question is the one behind the ``####`` of the known answer."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.split("Question:")[0].replace(",", ""))
    return bool(numbers) and float(numbers[-1]) == float(known.rpartition("####")[2].replace(",", ""))


def test_text_is_the_same_while_experts_move(runs: tuple[Run, Run]) -> None:
    off, on = runs
    if DTYPE == "float32":
        assert off.texts == on.texts
    else:
        pairs = [pair for a, b in zip(on.texts, off.texts, strict=True) for pair in zip(a, b, strict=True)]
        assert serving.agreement(pairs, TEXT_TOKENS) >= LEAST


def test_experts_move_and_par_falls(runs: tuple[Run, Run]) -> None:
    """PAR of equal windows with the placement in force and with the start placement."""
    assert runs[0].stats is None
    stats = runs[1].stats
    assert stats is not None
    assert stats.experts_moved > 0
    assert stats.cycles_failed == 0
    later = [cycle for cycle in stats.cycles if cycle.par is not None and cycle.par_start is not None][1:]
    assert sum(cycle.par.mean for cycle in later) < sum(cycle.par_start.mean for cycle in later)


@pytest.mark.skipif(not TINY, reason="the control keeps a copy of all experts, for which a large model leaves no room")
def test_weights_that_did_not_move_change_text(runs: tuple[Run, Run]) -> None:
    """Negative control."""
    assert runs[1].control <= MOST


@pytest.mark.skipif(not QUESTIONS, reason="no data set: NPU_TEST_QUESTIONS names none")
def test_accuracy_is_kept(runs: tuple[Run, Run]) -> None:
    """Not below that without balancing by more than two standard errors of the difference."""
    off, on = (sum(run.right) / len(run.right) for run in runs)
    assert on >= float(os.environ.get("NPU_TEST_ACCURACY", "0"))
    changed = [a - b for a, b in zip(runs[0].right, runs[1].right, strict=True)]
    assert off - on <= 2 * math.sqrt(sum(change * change for change in changed)) / len(changed)


def test_answers_are_judged_by_their_last_number() -> None:
    known = "She has 3 + 4 = 7 of them.\n#### 1,007"
    assert is_right(" 1000 and 7 are 1,007.", known)
    assert is_right(" It is 1007.0.\nQuestion: What are 2 and 2? 4", known)
    assert not is_right(" 1007, and then 8", known)
    assert not is_right(" I do not know.", known)
