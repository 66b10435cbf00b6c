# SPDX-License-Identifier: Apache-2.0
"""Finds settings of the balancer that stand beside ``eplb_config`` in vLLM's ``additional_config``.

``additional_config`` is a dictionary without a schema: vLLM ignores what it does not know there, and other platforms
and plugins keep their settings in it. So a key of ours at the wrong place would be ignored without a word. Looked for
are our settings and old names at the top level or inside another key, misspelt or in another case, those of vLLM's
and vllm-ascend's own EPLB at the top level, and ``eplb_config`` itself misspelt, nested, or with a dot in place of a
brace.

A key that may belong to another program is left alone: ``mode``, ``policy`` and ``transport`` count only beside
settings that turn the balancer on, and misspellings of such short words only cause a remark.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from .messages import MOVED_INTO_EPLB_CONFIG, OF_VLLM, RENAMED, WITHOUT_COUNTERPART, clip, show_value
from .reading import is_something, says_off

OF_NEIGHBOURS = frozenset(
    [
        "SLO_limits_for_dynamic_batch",
        "ascend_compilation_config",
        "ascend_fusion_config",
        "ascend_log_path",
        "ascend_scheduler_config",
        "ascend_warmup_config",
        "batch_job_sched_config",
        "c8_enable_reshape_optim",
        "combine_quant_mode",
        "dp_allreduce_on_npu",
        "draft_window_size",
        "dump_config",
        "dump_config_path",
        "dynamic_spec_config",
        "enable_async_exponential",
        "enable_balance_scheduling",
        "enable_cpu_binding",
        "enable_dsa_cp",
        "enable_flashcomm1",
        "enable_flashcomm2_parallel_size",
        "enable_force_eplb",
        "enable_fused_mc2",
        "enable_hamming_sparse",
        "enable_kv_nz",
        "enable_kvpp",
        "enable_matmul_allreduce",
        "enable_mc2_hierarchy_comm",
        "enable_mlapo",
        "enable_pcp_embedding_lmhead_weight_sharding",
        "enable_pcp_o_proj_weight_sharding",
        "enable_prefill_mc2",
        "enable_reduce_sample",
        "enable_shared_expert_dp",
        "enable_sleep_mode_extra_cleanup",
        "enable_sp_by_pass",
        "enable_sparse_li_c4",
        "enable_sparse_li_c8",
        "enable_sparse_sfa_c8",
        "enable_sparse_sfa_turboquant",
        "enable_transpose_kv_cache_by_block",
        "finegrained_tp_config",
        "fuse_allreduce_rms",
        "gdn_prefill_backend",
        "hamming_sparse",
        "kda_decode_backend",
        "kda_prefill_backend",
        "kda_prefill_checkpoint",
        "kda_spec_decode_backend",
        "kvpp_config",
        "layer_sharding",
        "mc2_comm_alg",
        "mega_moe_max_tokens",
        "mix_placement",
        "mlapo_keep_prefill_weights",
        "msmonitor_use_daemon",
        "multistream_dsv4_dsa_overlap",
        "multistream_engram_overlap",
        "multistream_overlap_gate",
        "multistream_overlap_shared_expert",
        "num_head_replica",
        "pa_shape_list",
        "pd_head_ratio",
        "pd_tp_ratio",
        "profiling_chunk_config",
        "recompute_scheduler_enable",
        "refresh",
        "rejection_sampler_config",
        "rl_config",
        "scheduler_config",
        "sfa_dcp_force_tmajor_restore",
        "short_request_first_config",
        "sparse_kv_offload_config",
        "weight_nz_mode",
        "weight_prefetch_config",
        "xlite_graph_config",
    ]
)
"""Top-level keys of vllm-ascend 0.23.0.post1 and 0.30.0rc2 and of vLLM, read from their sources."""


SHORT = 8
"""A name with fewer letters is a common word that another program may use as a key."""


COMMON_WORDS = ("window_size", "use_async", "communicator")
"""Settings of vLLM's own EPLB that another program may have as well."""


_MAX_DEPTH = 8


_MAX_KEYS = 10_000


@dataclass(frozen=True)
class Misplaced:
    """A key that is not read at its place.

    Attributes:
        line: the key, and where it belongs.
        weight: "sure" for a key that can only be meant for the balancer; "likely" for a setting of ours that another
            program may have as well; "perhaps" for a key that is only similar.
    """

    line: str
    weight: Literal["sure", "likely", "perhaps"]


def misplaced(additional_config: Mapping[object, object], known: Iterable[str]) -> Iterator[Misplaced]:
    """The keys beside ``eplb_config`` that belong into it.

    Args:
        additional_config: vLLM's dictionary.
        known: names of our settings.
    """
    names = tuple(known)
    for key, value in itertools.islice(additional_config.items(), _MAX_KEYS):
        if key == "eplb_config" or not is_something(value) or says_off(value):
            continue
        found = _judged(key, value, names) if key not in OF_NEIGHBOURS else None
        if found is not None:
            yield found
        else:
            yield from _nested(f"additional_config.{clip(str(key))}", value, names)


def is_name_of_settings(key: object) -> bool:
    """Whether a key is a spelling of ``eplb_config``."""
    name = bare(key).replace("_", "")
    endings = ("", "config", "conf", "cfg", "configs", "settings", "options", "params", "configuration")
    if name in {f"{start}eplb{end}" for start in ("", "ascend", "vllm", "vllmascend", "dynamic") for end in endings}:
        return name != "dynamiceplb"
    return len(name) >= SHORT and difflib.SequenceMatcher(None, name, "eplbconfig").ratio() >= 0.8


def bare(key: object) -> str:
    """A key in the spelling of our names: lower case, words divided by underscores."""
    text = key[:200].strip().lstrip("-") if isinstance(key, str) else ""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _judged(key: object, value: object, known: tuple[str, ...]) -> Misplaced | None:
    """What is wrong with a key at the top level; None if nothing is."""
    name, shown = bare(key), f"additional_config.{clip(str(key))}"
    if isinstance(key, str) and key in MOVED_INTO_EPLB_CONFIG:
        return Misplaced(f"{shown} is an old name; write it as {_form(MOVED_INTO_EPLB_CONFIG[key], value)}", "sure")
    if is_name_of_settings(key):
        way = 'write its settings as {"eplb_config": {...}}'
        if not isinstance(value, Mapping):
            way = 'write {"eplb_config": {"dynamic_eplb": true}}'
        return Misplaced(f"{shown} is not read: the key is eplb_config; {way}", "sure")
    exact = _ours(name, known)
    if exact is not None:
        weight: Literal["sure", "likely"] = "sure" if len(exact) >= SHORT and exact != "transport" else "likely"
        return Misplaced(f"{shown} is not read there; write it as {_form(exact, value)}", weight)
    theirs = _of_another_balancer(name, value)
    if theirs is not None:
        return Misplaced(f"{shown} is not read by the balancer; {theirs[0]}", theirs[1])
    candidates = {**dict.fromkeys(known), **MOVED_INTO_EPLB_CONFIG}
    near = difflib.get_close_matches(name, [*candidates, *OF_NEIGHBOURS], n=1, cutoff=0.8) if name else []
    if not near or near[0] in OF_NEIGHBOURS:
        return None
    meant = candidates[near[0]] or near[0]
    line = f"{shown} is not read by the balancer; did you mean {_form(meant, value)}?"
    return Misplaced(line, "sure" if len(near[0]) >= SHORT and near[0] != "transport" else "perhaps")


def _of_another_balancer(name: str, value: object) -> tuple[str, Literal["likely", "perhaps"]] | None:
    """What to do with a setting of vLLM's or vllm-ascend's own EPLB, and how sure it is that it is one."""
    name = name.removeprefix("eplb_config_").removeprefix("eplb_")
    meant = OF_VLLM.get(name) or RENAMED.get(name)
    if meant:
        return f"write it as {_form(meant, value)}", "likely"
    if name in WITHOUT_COUNTERPART:
        return WITHOUT_COUNTERPART[name], "perhaps" if name in COMMON_WORDS else "likely"
    return None


def _ours(name: str, known: tuple[str, ...]) -> str | None:
    """The setting that a name at the top level is equal to, with or without ``eplb_config.`` in front of it."""
    if name == "enable_eplb":
        return "dynamic_eplb"
    for prefix in ("", "eplb_config_", "eplb_"):
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and (rest in known or rest in MOVED_INTO_EPLB_CONFIG):
            return MOVED_INTO_EPLB_CONFIG.get(rest, rest)
    return None


def _entries(value: object) -> Iterable[tuple[object, object]]:
    """What a table or list holds, by key or number; nothing for other values."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _nested(where: str, value: object, known: tuple[str, ...]) -> Iterator[Misplaced]:
    """``eplb_config``, or a setting that only we have, inside another key."""
    certain = {name for name in (*known, *MOVED_INTO_EPLB_CONFIG) if "eplb" in name or name.startswith("expert_")}
    queue, seen = [(where, value, 1)], 0
    while queue:
        path, table, depth = queue.pop()
        for key, entry in _entries(table):
            seen += 1
            if seen > _MAX_KEYS:
                return
            inside = f"{path}.{clip(str(key))}"
            if not is_something(entry) or says_off(entry):
                continue
            if isinstance(entry, Mapping) and is_name_of_settings(key):
                yield Misplaced(
                    f'{clip(inside)} is not read there; move it to the top level: {{"eplb_config": {{...}}}}', "sure"
                )
            elif isinstance(key, str) and key in certain:
                name = MOVED_INTO_EPLB_CONFIG.get(key, key)
                yield Misplaced(f"{clip(inside)} is not read there; write it as {_form(name, entry)}", "sure")
            elif isinstance(entry, (Mapping, list, tuple)) and depth < _MAX_DEPTH:
                queue.append((inside, entry, depth + 1))


def _form(name: str, value: object) -> str:
    if name == "dynamic_eplb" and isinstance(value, Mapping):
        value = True
    return f'{{"eplb_config": {{"{name}": {_json(value)}}}}}'


def _json(value: object) -> str:
    return json.dumps(clip(value)) if isinstance(value, str) else show_value(value)


def left_over(vllms_own: object) -> dict[str, object]:
    """The settings in ``--eplb-config`` that differ from vLLM's defaults.

    Args:
        vllms_own: vLLM's ``EPLBConfig``, the same as a dictionary, or None.
    """
    if isinstance(vllms_own, Mapping):
        return {str(key): value for key, value in vllms_own.items()}
    try:
        defaults = vars(type(vllms_own)())
    except TypeError:  # no settings at all, or of a class that has no defaults
        return {}
    return {name: value for name, value in vars(vllms_own).items() if name in defaults and defaults[name] != value}


def moved_from_vllm(settings: Mapping[str, object]) -> str:
    """The same settings in this package's form, without those that it does not have."""
    pairs = {OF_VLLM[name]: value for name, value in settings.items() if OF_VLLM.get(name)}
    inner = ", ".join(f'"{name}": {_json(value)}' for name, value in {"dynamic_eplb": True, **pairs}.items())
    return f'{{"eplb_config": {{{inner}}}}}'
