# SPDX-License-Identifier: Apache-2.0
"""What is known of time on this server: what a layer takes, and how fast experts travel. Learned once, at start-up."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field

import numpy as np

from ..agreement.exchange import exchange_bytes
from ..files.disk import read_bounded, write_atomic
from ..files.map_recorder import load_path
from ..files.traces import read_trace
from ..planning.payoff import MoveRates
from ..settings.config import EplbConfig
from ..transfer.loader import D2DExpertWeightLoader
from ..values.placement import Placement, peak_to_average
from ..values.step_cost import FloatArray, StepCost, StepCostError
from .calibration import NOISY, CalibrationError, LayerRuns, calibrate, describe, time_shares
from .served_model import EplbAdaptor

logger = logging.getLogger("vllm.eplb")

MOST_FILE_BYTES = 1 << 20

SKEW_POINTS = 257
"""Quantiles that a recorded load is told by."""

TIMED_LAYERS = 3
"""Layers of a recorded load that are timed, at even quantiles of their PAR."""

LEAST_LOAD = 1e-3
"""Of an expert over its layer's mean: one that nobody asked for may be asked for, after all."""


@dataclass(frozen=True)
class Times:
    """Attributes:
    cost: of an MoE layer. rates: of experts on their way.
    """

    cost: StepCost = field(default_factory=StepCost.proportional)
    rates: MoveRates = field(default_factory=MoveRates)


def learn_times(adaptor: EplbAdaptor, config: EplbConfig, loader: D2DExpertWeightLoader) -> Times:
    """Measures what is not read from ``calibration_path``; all ranks together. Blocks for some seconds.

    Where layers cannot be timed, or are not to be, their time is taken to follow the tokens of the busiest rank, which
    the log says.
    """
    told = adaptor.rank == 0
    if not config.calibrate:
        return Times()
    runs = adaptor.layer_runs()
    if runs is None:
        if told:
            logger.info(
                "%s: MoE layers cannot be timed on %s by this version; plans are weighed by PAR, not by milliseconds",
                adaptor.title,
                adaptor.device.type,
            )
        return Times()
    load = _recorded_load(adaptor, config)
    kept = cost = _read(adaptor, config, runs)
    if kept is None or kept.noise > NOISY:  # a noisy start does not decide for all that follow
        try:
            cost = _measure(adaptor, runs, load)
        except CalibrationError as error:
            if told:
                logger.warning("%s: MoE layers were not timed, plans are weighed by PAR: %s", adaptor.title, error)
            return Times()
        if kept is not None:
            cost = kept.best_of(cost)
        if told and config.calibration_path is not None:
            _write(config.calibration_path, cost, adaptor.title)
    assert cost is not None
    if told:
        logger.info("%s", describe(cost, f"{adaptor.title}: cost of an MoE layer"))
        if cost.noise > NOISY:
            logger.warning(
                "%s: this machine was busy while layers were timed: measurements differ by %.0f %%, so a plan must "
                "save more than that. Start again when it is idle, or set calibration_path: the next start then "
                "measures again and keeps the shorter times.",
                adaptor.title,
                100 * cost.noise,
            )
    _time_recorded(adaptor, runs, cost, load)
    receive, commit = loader.measure_rates()
    return Times(cost, MoveRates(receive, commit))


def _measure(adaptor: EplbAdaptor, runs: LayerRuns, load: FloatArray | None) -> StepCost:
    placement = adaptor.placement
    return calibrate(
        runs,
        num_ranks=placement.num_ranks,
        rank=adaptor.rank,
        slots_per_rank=placement.slots_per_rank,
        num_experts=placement.num_experts,
        group=adaptor.control_group,
        device=adaptor.device,
        skew=_skew(adaptor, load),
    )


def _recorded_load(adaptor: EplbAdaptor, config: EplbConfig) -> FloatArray | None:
    """[L, E] on EP rank 0: the load that stands beside the map that the server starts from, or beside the one that it
    records; None on the other ranks, and where there is none."""
    for path in (config.expert_map_path, config.expert_map_record_path):
        if adaptor.rank != 0 or path is None or not load_path(path).exists():
            continue
        try:
            return np.asarray(read_trace(load_path(path)).load.sum(axis=0))
        except (OSError, ValueError) as error:
            logger.warning("%s: layers are timed without the recorded load: %s", adaptor.title, error)
    return None


def _skew(adaptor: EplbAdaptor, load: FloatArray | None) -> FloatArray | None:
    """Loads of experts over their layer's mean, as quantiles, the same on all ranks; None where there is no load."""
    found = b""
    if load is not None:
        relative = np.maximum(load / load.mean(axis=1, keepdims=True), LEAST_LOAD)
        found = np.quantile(relative, np.linspace(0.0, 1.0, SKEW_POINTS)).tobytes()
    found = exchange_bytes(adaptor.control_group, adaptor.placement.num_ranks, found)[0]
    return np.frombuffer(found) if found else None


def _time_recorded(adaptor: EplbAdaptor, runs: LayerRuns, cost: StepCost, load: FloatArray | None) -> None:
    """Says what balancing the recorded load would bring, each placement timed by its own counts, and how far the times
    by PAR are from that; all ranks together."""
    placement, found = adaptor.placement, b""
    if load is not None and load.shape == (placement.num_layers, placement.num_experts):
        try:
            found = _shares(adaptor, load).tobytes()
        except Exception as error:  # only a line of the log is lost
            logger.warning("%s: the recorded load cannot be planned for: %s", adaptor.title, error)
    found = exchange_bytes(adaptor.control_group, placement.num_ranks, found)[0]
    if not found:
        return
    shares = np.frombuffer(found).reshape(-1, placement.num_slots)
    few, many = min(cost.tokens, key=lambda count: abs(count - 64)), cost.tokens[-1]
    tokens = sorted({int(few), int(many)})
    ranks = placement.num_ranks
    took = time_shares(
        runs, shares, tokens, num_ranks=ranks, rank=adaptor.rank, group=adaptor.control_group, device=adaptor.device
    )
    if adaptor.rank != 0:
        return
    par = peak_to_average(shares.reshape(len(shares), ranks, -1).sum(axis=2))
    expected = cost.layer_ms(tokens, par[:, None], placement.slots_per_rank)
    now, balanced, now_by_par, balanced_by_par = (
        half.mean(axis=0) for times in (took, expected) for half in np.split(times, 2)
    )
    logger.info(
        "%s: with the load that was recorded last, timed by its own counts, %s",
        adaptor.title,
        "; ".join(
            f"at {count:,} tokens per rank a layer takes {now[i]:.3f} ms, {balanced[i]:.3f} ms balanced "
            f"({now_by_par[i]:.3f} and {balanced_by_par[i]:.3f} ms by PAR)"
            for i, count in enumerate(tokens)
        ),
    )


def _shares(adaptor: EplbAdaptor, load: FloatArray) -> FloatArray:
    """[2, layers, P]: parts of a layer's pairs by slot, with the placement in force and balanced for ``load``."""
    from ..planning import plan

    placement = adaptor.placement
    made = plan(load, placement, placement.num_ranks, adaptor.topology.num_blocks, adaptor.num_groups)
    after = Placement(made.physical_to_logical, placement.num_experts, placement.num_ranks)
    order = np.argsort(placement.par(load))
    chosen = order[(2 * np.arange(TIMED_LAYERS) + 1) * len(order) // (2 * TIMED_LAYERS)]
    by_slot = np.stack([part.slot_load(load)[chosen] for part in (placement, after)])
    return np.asarray(by_slot / by_slot.sum(axis=2, keepdims=True))


def _read(adaptor: EplbAdaptor, config: EplbConfig, runs: LayerRuns) -> StepCost | None:
    """What the file says, as EP rank 0 reads it; None where there is none, or it is of something else."""
    text = b""
    path = config.calibration_path
    if adaptor.rank == 0 and path is not None and os.path.exists(path):
        try:
            text = read_bounded(path, MOST_FILE_BYTES, "step cost")
            subject = StepCost.from_json(text).subject
            if subject != runs.subject:
                logger.warning(
                    "%s: %s was measured for another server (%s) and is replaced", adaptor.title, path, subject
                )
                text = b""
        except (OSError, ValueError) as error:
            logger.warning("%s: %s is not used, and replaced: %s", adaptor.title, path, error)
            text = b""
    text = exchange_bytes(adaptor.control_group, adaptor.placement.num_ranks, text)[0]
    try:
        return StepCost.from_json(text) if text else None
    except StepCostError:
        return None


def _write(path: str, cost: StepCost, title: str) -> None:
    try:
        write_atomic(path, cost.to_json().encode())
    except (OSError, ValueError) as error:
        logger.warning("%s: the times of MoE layers cannot be written to %s: %s", title, path, error)
