# SPDX-License-Identifier: Apache-2.0
"""EplbConfig: the contents of ``additional_config["eplb_config"]``, parsed once into a typed, checked object.

vllm-ascend's keys keep their names and defaults; the other keys are this package's own, in the same dictionary. Values
are accepted in every form that vLLM and vllm-ascend accept, unless the form is ambiguous (reading.py). Settings that
stand beside ``eplb_config`` by mistake are refused (beside.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..values.defaults import EFFORT, TARGET_PAR
from .beside import misplaced
from .messages import (
    OF_OTHERS,
    EplbConfigError,
    allowed_of,
    bad_value,
    kind_of,
    show_value,
    to_json,
    unknown_key,
)
from .reading import PATHS, is_something, says_off, taken, taken_path

SERIES_ENTRIES = 8
"""Entries of the load series for a policy that weighs how load varies (eplb_policy_type 3)."""


PolicyName = Literal["incremental", "default", "random"]


_POLICY_OF_TYPE: tuple[PolicyName, ...] = ("random", "default", "incremental", "incremental")


class EplbConfig(BaseModel):
    """The balancer's settings. Build it with :meth:`from_additional_config`; it never changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # --- vllm-ascend's keys, with its defaults -----------------------------------------------------------------------
    dynamic_eplb: bool = Field(default=False, description="turns the balancer on")
    expert_map_path: str | None = Field(
        default=None,
        min_length=1,
        description="map file by which the weights are loaded; without `dynamic_eplb` that is a static placement",
    )
    expert_map_record_path: str | None = Field(
        default=None,
        min_length=1,
        description="map file for the placement in force, written after each cycle, its load beside it; turns "
        "`dynamic_eplb` on",
    )
    expert_heat_collection_interval: int = Field(
        default=600, ge=1, le=10_000_000, description="steps for which load is collected before each plan"
    )
    algorithm_execution_interval: int = Field(
        default=50,
        ge=1,
        le=10_000_000,
        description="earliest start of the transfers, in steps after the load was gathered; a later plan starts later",
    )
    num_redundant_experts: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="slots per layer beyond one for each expert, over all ranks; by default those of `expert_map_path`",
    )
    eplb_policy_type: int = Field(
        default=2,
        ge=0,
        le=3,
        description="policy by vllm-ascend's number: 0 random, 1 default, 2 and 3 incremental; `policy` overrides it",
    )
    eplb_heat_collection_stage: Literal["all", "prefill", "decode"] = Field(
        default="all", description="steps whose tokens are counted"
    )

    # --- this package's own ------------------------------------------------------------------------------------------
    policy: PolicyName | None = Field(
        default=None,
        description="incremental (few moves), default (DeepSeek's, from scratch) or random (for tests); null: by "
        "`eplb_policy_type`",
    )
    mode: Literal["balance", "observe", "sync"] = Field(
        default="balance",
        description="observe plans and reports, and moves nothing; sync rearranges within one step, for tests and "
        "offline jobs",
    )
    target_par: float = Field(
        default=TARGET_PAR,
        ge=1.0,
        le=10.0,
        description="peak-to-average ratio of rank load at which a layer is good enough; 1.0 is perfect",
    )
    planner_effort: Literal["fast", "thorough"] = Field(
        default=EFFORT, description="how long the planner searches for a plan with fewer moves"
    )
    rank_speed: list[Annotated[float, Field(ge=0.1, le=10.0)]] | None = Field(
        default=None,
        min_length=1,
        description="relative speed of each rank, with the policy incremental; PAR is then load over speed; null: all "
        "alike",
    )
    max_moves_per_cycle: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="most experts moved in one cycle, over all layers; null: no limit",
    )
    max_moves_per_rank: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="most experts that a rank receives in one cycle, over all layers; null: no limit",
    )
    max_moves_between_nodes: int | None = Field(
        default=None,
        ge=0,
        le=10_000_000,
        description="most experts received from another node in one cycle, over all layers and ranks; null: no limit",
    )
    price_between_nodes: float = Field(
        default=1.0,
        ge=1.0,
        le=1000.0,
        description="cost of an expert received from another node, in experts received within the node",
    )
    min_gain: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="least predicted gain of a plan, as a fraction of MoE time, net of its transfers; of the mean PAR "
        "where that time is not measured (0.01: from 1.20 to 1.188)",
    )
    calibrate: bool = Field(
        default=True,
        description="measures the time of MoE layers at start-up, about 5 s, 15 s on a busy machine, to weigh plans in "
        "milliseconds; false weighs them by PAR",
    )
    calibration_path: str | None = Field(
        default=None,
        min_length=1,
        description="file with the measured times; written if missing, noisy, or of another model, server or device",
    )
    transfer_buffer_experts: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="staging buffer of each rank, in experts of one layer; null: by the number of slots per rank",
    )
    transfer_budget_mb_per_step: float | None = Field(
        default=None,
        ge=0.001,
        le=1_000_000.0,
        description="most MB (10^6 bytes) that a rank receives per step, at least one group of moves; null: no limit",
    )
    transport: Literal["auto", "gloo", "nccl", "hccl", "pull"] = Field(
        default="auto",
        description="how weights travel: hccl, nccl (devices), gloo (host memory), pull (within a node); auto: the "
        "safest one",
    )
    control_lag: int = Field(
        default=1, ge=1, le=8, description="steps between posting a rank's status and reading the agreed one"
    )
    max_failures: int = Field(
        default=5, ge=1, le=1_000_000, description="failed cycles in a row after which balancing is switched off"
    )
    audit_interval: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="steps in which all slots are compared once with their checksums from start-up; 0: never",
    )
    audit_action: Literal["report", "repair"] = Field(
        default="report",
        description="on damaged slots: report (log and metrics), or repair as well, from good copies on any rank",
    )
    weighted_dispatch: bool = Field(
        default=False,
        description="splits an expert's tokens over its replicas by planned shares, not evenly; needs no transfer",
    )
    log_balancedness_interval: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="steps between log lines on one forward's load, as vLLM computes them; null: none",
    )
    dispatch_table_entries: int = Field(
        default=32, ge=16, le=64, description="entries per expert of the dispatch table: the resolution of the shares"
    )
    allow_unchecked_vllm: bool = Field(
        default=False,
        description="balances also on a version of vLLM or vllm-ascend that this package was not checked against",
    )

    @classmethod
    def from_additional_config(cls, additional_config: object) -> EplbConfig:
        """Reads the settings out of vLLM's ``additional_config``.

        Args:
            additional_config: vLLM's dictionary; None, an object of a platform's own class or a dictionary without
                ``eplb_config`` mean all defaults, that is: off.

        Raises:
            EplbConfigError: a key or value that is not allowed; of several, the first.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        beside = list(misplaced(additional_config, cls.model_fields))
        given = additional_config.get("eplb_config", {})
        if "eplb_config" in additional_config and not is_something(given):  # null, false, empty
            given = {}
        if says_off(given):  # whatever else stands there is no matter of a balancer that is off
            try:
                return cls._checked(given)
            except EplbConfigError:
                return cls()
        for found in beside:
            if found.weight == "sure":
                raise EplbConfigError(found.line)
        if not isinstance(given, Mapping):
            raise EplbConfigError(
                f"additional_config.eplb_config = {show_value(given)} is {kind_of(given)}; it must be a "
                f'dictionary such as {{"dynamic_eplb": true}}, or left out'
            )
        if given and given.keys() <= OF_OTHERS:
            return cls()
        config = cls._checked(given)
        for found in beside:
            if found.weight == "likely" and config.active:
                raise EplbConfigError(found.line)
        return config

    @classmethod
    def _checked(cls, given: Mapping[object, object]) -> EplbConfig:
        """
        Raises:
            EplbConfigError: a key or value that is not allowed.
        """
        values: dict[str, object] = {}
        for key, value in given.items():
            if not isinstance(key, str) or key not in cls.model_fields:
                raise EplbConfigError(unknown_key(key, tuple(cls.model_fields)))
            values[key] = taken_path(value) if key in PATHS else taken(value, cls.model_fields[key])
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            key = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
            raise EplbConfigError(bad_value(key, given[key], values[key], cls.model_fields[key])) from None

    @property
    def active(self) -> bool:
        """True if balancing or a static placement is configured."""
        return self.dynamic or self.expert_map_path is not None

    @property
    def dynamic(self) -> bool:
        """True if load is counted and plans are made. ``expert_map_record_path`` turns this on, as in vllm-ascend;
        ``expert_map_path`` alone is a static placement."""
        return self.dynamic_eplb or self.expert_map_record_path is not None

    @property
    def policy_name(self) -> PolicyName:
        """The policy to use: ``policy``, or the policy with the number ``eplb_policy_type``."""
        return self.policy if self.policy is not None else _POLICY_OF_TYPE[self.eplb_policy_type]

    @property
    def load_entries(self) -> int:
        """Entries of the load series that the policy gets: several if it weighs how load varies."""
        return SERIES_ENTRIES if self.policy is None and self.eplb_policy_type == 3 else 1


def remarks(additional_config: object) -> list[str]:
    """Lines to log about valid settings that may not do what was meant.

    Args:
        additional_config: vLLM's dictionary, from which :class:`EplbConfig` was read without an error.
    """
    if not isinstance(additional_config, Mapping):
        return []
    given = additional_config.get("eplb_config", {})
    if not isinstance(given, Mapping) or says_off(given) or given.keys() <= OF_OTHERS:
        return []
    config = EplbConfig.from_additional_config(additional_config)
    if not config.active:
        names = ", ".join(sorted(config.model_fields_set))
        return [
            f"EPLB is off: eplb_config sets {names}, but not dynamic_eplb; to balance, write "
            '{"eplb_config": {"dynamic_eplb": true, ...}}, and "dynamic_eplb": false to say that it is off'
        ]
    return [
        f"EPLB: {found.line}"
        for found in misplaced(additional_config, EplbConfig.model_fields)
        if found.weight == "perhaps"
    ]


def settings_table() -> str:
    """All settings as a Markdown table: key, default, allowed, meaning."""
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for name, field in EplbConfig.model_fields.items():
        allowed = allowed_of(field).replace("|", "\\|")
        rows.append(f"| `{name}` | {to_json(field.default)} | {allowed} | {field.description} |")
    return "\n".join(rows) + "\n"
