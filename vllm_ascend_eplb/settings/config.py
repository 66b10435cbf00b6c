# SPDX-License-Identifier: Apache-2.0
"""Configuration: what stands in ``additional_config["eplb_config"]``, parsed once into a typed, checked object.

The keys that vllm-ascend knows keep its names and defaults; the others are this package's own, in the same dictionary.
A value is never coerced: ``"true"`` is no boolean and ``600.0`` is no integer, because a setting that is silently read
as something else is found out in production.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..files.disk import show
from ..files.expert_map import ExpertMapError, read_expert_map
from ..values.placement import Placement
from .fit import check_record_path
from .messages import (
    MOVED_INTO_EPLB_CONFIG,
    OF_OTHERS,
    EplbConfigError,
    allowed_of,
    bad_value,
    kind_of,
    show_value,
    to_json,
    unknown_key,
)

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
        description="slots per layer beyond one for each expert, over all ranks; left out, that of `expert_map_path`",
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
        default=1.02,
        ge=1.0,
        le=10.0,
        description="peak-to-average ratio of rank load at which a layer is good enough; 1.0 is perfect",
    )
    planner_effort: Literal["fast", "thorough"] = Field(
        default="thorough", description="how long the planner searches for a plan with fewer moves"
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
    min_gain: float = Field(
        default=0.01,
        ge=0.0,
        le=1.0,
        description="least predicted gain of a plan, as a fraction of MoE time, net of its transfers; of the mean PAR "
        "where that time is not measured (0.01: from 1.20 to 1.188)",
    )
    calibrate: bool = Field(
        default=True,
        description="measures the time of MoE layers at start-up, about 5 s, to weigh plans in milliseconds; false "
        "weighs them by PAR",
    )
    calibration_path: str | None = Field(
        default=None,
        min_length=1,
        description="file with the measured times; written if missing or of another model, server or device",
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
        for old, new in MOVED_INTO_EPLB_CONFIG.items():
            if old in additional_config:
                raise EplbConfigError(
                    f"additional_config.{old} is an old name; write it as "
                    f'{{"eplb_config": {{"{new}": {show_value(additional_config[old])}}}}}'
                )
        if "eplb_config" not in additional_config:
            return cls()
        settings = additional_config["eplb_config"]
        if not isinstance(settings, Mapping):
            raise EplbConfigError(
                f"additional_config.eplb_config = {show_value(settings)} is {kind_of(settings)}; it must be a "
                f'dictionary such as {{"dynamic_eplb": true}}, or left out'
            )
        if settings and settings.keys() <= OF_OTHERS:
            return cls()
        for key in settings:
            if key not in cls.model_fields:
                raise EplbConfigError(unknown_key(key, tuple(cls.model_fields)))
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            key = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
            raise EplbConfigError(bad_value(key, settings[key], cls.model_fields[key])) from None

    @property
    def active(self) -> bool:
        """Whether the package does anything at all."""
        return self.dynamic or self.expert_map_path is not None

    @property
    def dynamic(self) -> bool:
        """Whether load is counted and plans are made. A map to record turns it on, as it does in vllm-ascend; a map to
        start from alone is a placement that stays."""
        return self.dynamic_eplb or self.expert_map_record_path is not None

    @property
    def policy_name(self) -> PolicyName:
        """The policy to use: ``policy``, or the one that ``eplb_policy_type`` stands for."""
        return self.policy if self.policy is not None else _POLICY_OF_TYPE[self.eplb_policy_type]

    @property
    def load_entries(self) -> int:
        """Entries of the load series that the policy is given: several where it weighs how load varies."""
        return SERIES_ENTRIES if self.policy is None and self.eplb_policy_type == 3 else 1

    def check_serving(
        self,
        *,
        num_experts: int | None,
        ep_size: int,
        expert_parallel: bool,
        vllm_eplb: bool = False,
        num_layers: int | None = None,
    ) -> int:
        """Checks the settings against the model and the server they are meant for. Does nothing unless ``active``.

        Args:
            num_experts: logical experts in each MoE layer, E; None or 0 for a model without MoE layers.
            ep_size: ranks of the expert-parallel group, R.
            expert_parallel: whether vLLM's ``--enable-expert-parallel`` is given.
            vllm_eplb: whether vLLM's own ``--enable-eplb`` is given.
            num_layers: MoE layers, L; None where that is not known, then only the workers compare it with a map's.

        Returns:
            Redundant experts per layer: ``num_redundant_experts``, or those of the map to start from.

        Raises:
            EplbConfigError: what cannot work, and the way out.
        """
        if not self.active:
            return self.num_redundant_experts
        if vllm_eplb:
            raise EplbConfigError(
                "--enable-eplb turns on vLLM's own balancer, and eplb_config turns on this one; only one may run: "
                "leave out --enable-eplb, or eplb_config"
            )
        if not num_experts:
            raise EplbConfigError(
                "eplb_config is given for a model without experts (no MoE layers found in its configuration); leave "
                "eplb_config out, or serve a Mixture-of-Experts model"
            )
        if not expert_parallel:
            raise EplbConfigError(
                "eplb_config needs expert parallelism, which is off; add --enable-expert-parallel, or leave "
                "eplb_config out"
            )
        if ep_size < 2:
            raise EplbConfigError(
                f"the expert-parallel size is {ep_size}; balancing needs 2 or more ranks: raise "
                f"--tensor-parallel-size or --data-parallel-size, or leave eplb_config out"
            )
        start = self.read_start_placement(num_layers=num_layers, num_experts=num_experts, num_ranks=ep_size)
        redundant = self.num_redundant_experts
        if start is None:
            self._check_redundancy(num_experts, ep_size)
        else:
            redundant = start.num_slots - num_experts
        self._check_speed(ep_size)
        if self.expert_map_record_path is not None:
            check_record_path(self.expert_map_record_path)
        return redundant

    def read_start_placement(self, *, num_layers: int | None, num_experts: int, num_ranks: int) -> Placement | None:
        """The placement of ``expert_map_path``, checked against the model; None where no map is given.

        Args:
            num_layers: MoE layers, L; None accepts any number.
            num_experts: logical experts per layer, E.
            num_ranks: ranks of the expert-parallel group, R.

        Raises:
            EplbConfigError: the file is no map, or not one for this model and server; names layer, device and slot.
        """
        if self.expert_map_path is None:
            return None
        where = "eplb_config.expert_map_path"
        try:
            # what another balancer wrote may hold an expert twice on a device: that wastes a slot, and serves all right
            placement = read_expert_map(
                self.expert_map_path,
                num_layers=num_layers,
                num_experts=num_experts,
                num_ranks=num_ranks,
                allow_duplicates=True,
            )
        except ExpertMapError as error:
            raise EplbConfigError(f"{where}: {error}") from None
        name = show(self.expert_map_path)
        redundant, most = placement.num_slots - num_experts, num_experts * (num_ranks - 1)
        if redundant > most:
            raise EplbConfigError(
                f"{where}: {name} has {placement.num_slots} slots per layer, more than {num_experts + most}, which "
                f"hold each of {num_experts} experts on each of {num_ranks} ranks; use a map with at most {most} "
                f"redundant experts"
            )
        if "num_redundant_experts" in self.model_fields_set and self.num_redundant_experts != redundant:
            raise EplbConfigError(
                f"{where}: {name} has {redundant} redundant experts per layer, eplb_config.num_redundant_experts is "
                f"{self.num_redundant_experts}; leave the number out, or use a map made for it"
            )
        return placement

    def _check_speed(self, ep_size: int) -> None:
        if self.rank_speed is None:
            return
        if len(self.rank_speed) != ep_size:
            raise EplbConfigError(
                f"eplb_config.rank_speed has {len(self.rank_speed)} numbers, the expert-parallel size is {ep_size}; "
                "give one for each rank, or leave it out"
            )
        if self.policy_name != "incremental" or self.weighted_dispatch:
            other = "weighted_dispatch" if self.weighted_dispatch else f"the policy {self.policy_name}"
            raise EplbConfigError(
                f"eplb_config.rank_speed = {show_value(self.rank_speed)} is not supported together with {other}; "
                'leave one of the two out (allowed: "policy": "incremental" without "weighted_dispatch")'
            )

    def _check_redundancy(self, num_experts: int, ep_size: int) -> None:
        redundant, most = self.num_redundant_experts, num_experts * (ep_size - 1)
        if redundant > most:
            raise EplbConfigError(
                f"eplb_config.num_redundant_experts = {redundant} is more than {most}, which puts each of "
                f"{num_experts} experts on each of {ep_size} ranks; allowed are {most % ep_size}..{most} "
                f"in steps of {ep_size}"
            )
        excess = (num_experts + redundant) % ep_size
        if excess:
            lower, upper = redundant - excess, redundant - excess + ep_size
            works = f"{lower} or {upper}" if lower >= 0 else f"{upper}"
            raise EplbConfigError(
                f"eplb_config.num_redundant_experts = {redundant}: {num_experts} experts + {redundant} cannot be "
                f"shared evenly by {ep_size} ranks; nearest that works: {works}"
            )


def settings_table() -> str:
    """All settings as a Markdown table: key, default, allowed, meaning."""
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for name, field in EplbConfig.model_fields.items():
        allowed = allowed_of(field).replace("|", "\\|")
        rows.append(f"| `{name}` | {to_json(field.default)} | {allowed} | {field.description} |")
    return "\n".join(rows) + "\n"
