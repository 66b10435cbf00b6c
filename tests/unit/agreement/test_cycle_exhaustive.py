# SPDX-License-Identifier: Apache-2.0
"""Breadth-first search over everything that can happen to 2 or 3 ranks in the cycle.

A world is the state of every rank's transition function, the facts that a rank knows alone (its environment), and the
posted facts that were not read yet. In a step every rank may or may not progress, and a few faults may happen. The
search visits every world that can be reached and checks at every step:

- all ranks are in the same state and do the same things;
- a round is issued only if every rank has prepared it and has a free buffer;
- a round is committed only if it arrived undamaged on every rank;
- nothing is dropped, prepared again or finished while a round is in flight on any rank;
- there is one bulk operation at a time;
- while paused, a cycle begins only if it was ordered;
- every world has a way to the end of the cycle.

Orders of every kind arrive on EP rank 0. The numbers of steps, epochs, cycles and orders only grow, so they are set to
fixed numbers before worlds are compared. Pure functions are called once for equal arguments: a state is part of many
worlds.

One file, because a world, the steps out of it and the invariants are one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import product

import pytest

from vllm_ascend_eplb.agreement.channel import Agreed, Facts
from vllm_ascend_eplb.agreement.phases import Actions, Command, CycleSettings, CycleState, Do, Failure, Phase
from vllm_ascend_eplb.agreement.transition import advance

STEP, EPOCH, CYCLE, ORDER = 1000, 100, 10, 10
OTHER_EXECUTION_STEPS = 3

See = Callable[[Agreed | None, tuple[tuple[Facts, ...], ...], int], Agreed | None]
"""Maps the agreed facts, the posted facts that were not read yet and a rank to the facts that the rank acts on."""

Result = tuple[CycleState, Actions]
Transition = Callable[[CycleState, Agreed | None, CycleSettings], Result]


@dataclass(frozen=True, slots=True)
class Env:
    """The facts that one rank knows alone."""

    ready: int = 0
    bulk: int = 0  # a bulk operation is under way
    plan: int = 0  # EP rank 0: rounds of the plan; -1 for a plan without moves, 0 for no plan yet
    rounds: int = 0
    failure: int = 0
    poisoned: int = 0
    asked: int = 0  # rounds to prepare
    prepared: int = 0
    issued: int = 0
    done: int = 0
    damaged: int = -1  # the oldest round that arrived damaged
    committed: int = 0
    placement: int = 0
    order: Command = Command.NONE  # EP rank 0: arrived and was not obeyed yet
    damage: int = 0  # slots that the audit found damaged


@cache
def facts_of(env: Env, state: CycleState) -> Facts:
    planned = state.phase is Phase.PLAN and env.plan
    return Facts(
        step=state.step,
        epoch=state.epoch,
        placement=env.placement,
        ready=env.ready,
        failure=env.failure,
        poisoned=env.poisoned,
        plan_number=state.cycle if planned else 0,
        plan_length=max(0, env.plan) if planned else 0,
        rounds=env.rounds,
        rounds_ready=env.prepared,
        rounds_done=env.done,
        rounds_intact=env.done if env.damaged < 0 else min(env.done, env.damaged),
        order=state.order + 1 if env.order else 0,
        order_command=int(env.order),
        order_execution_steps=OTHER_EXECUTION_STEPS if env.order is Command.INTERVALS else 0,
        damaged=env.damage if env.ready and state.phase is Phase.AUDIT else 0,
    )


@dataclass(frozen=True, slots=True)
class World:
    states: tuple[CycleState, ...]
    envs: tuple[Env, ...]
    posted: tuple[tuple[Facts, ...], ...]
    faults: int
    orders: int


@dataclass(frozen=True)
class Case:
    ranks: int
    lag: int
    settings: CycleSettings
    rounds: tuple[int, ...]  # plans that the planner may make
    faults: int
    orders: int = 0


class ViolationError(AssertionError):
    """The search reached a state that must never occur."""


def events(env: Env, state: CycleState, rank: int, case: Case, faults: int) -> Iterator[tuple[Env, int]]:
    """The events that may happen on a rank before it posts, as (environment, faults used)."""
    yield env, 0
    if env.bulk:
        yield replace(env, bulk=0), 0
    if state.phase in (Phase.COLLECT, Phase.OFF, Phase.LISTEN):
        return
    fault = faults > 0 and not env.failure
    if state.phase in (Phase.SNAPSHOT, Phase.REDUCE, Phase.BROADCAST) and not env.ready and not env.failure:
        if state.phase is Phase.BROADCAST:
            # A round per buffer is prepared as well; the second round may have to wait for the first one's commit.
            first = min(case.settings.buffers, state.plan_length)
            for prepared in range(min(1, first), first + 1):
                yield replace(env, ready=1, bulk=0, rounds=state.plan_length, asked=first, prepared=prepared), 0
        elif state.phase is Phase.REDUCE:
            yield replace(env, ready=1, bulk=0), 0
        elif not env.bulk:
            yield replace(env, ready=1), 0
        if fault:
            failure = {Phase.SNAPSHOT: Failure.SNAPSHOT, Phase.REDUCE: Failure.REDUCE}.get(
                state.phase, Failure.PLAN_INVALID
            )
            yield replace(env, failure=int(failure)), 1
    if state.phase is Phase.AUDIT and not env.ready and not env.failure and not env.bulk:
        yield replace(env, ready=1), 0
        if faults:
            yield replace(env, ready=1, damage=1), 1
            yield replace(env, failure=int(Failure.AUDIT)), 1
    if state.phase is Phase.PLAN and rank == 0 and not env.plan and not env.failure:
        for rounds in (-1, *case.rounds):
            yield replace(env, plan=rounds), 0
        if fault:
            yield replace(env, failure=int(Failure.PLANNER_DIED)), 1
    if state.phase in (Phase.MOVE, Phase.DRAIN):
        if env.prepared < env.asked and not env.failure:
            yield replace(env, prepared=env.asked), 0
            if fault:
                yield replace(env, failure=int(Failure.PREPARE)), 1
        if env.done < env.issued and not env.poisoned:
            for done in range(env.done + 1, env.issued + 1):
                yield replace(env, done=done), 0
            if faults and env.damaged < 0:
                yield replace(env, done=env.done + 1, damaged=env.done), 1
            if faults:
                yield replace(env, poisoned=1), 1


def perform(actions: Actions, envs: list[Env], state: CycleState, case: Case) -> None:
    """Perform the actions of a state on every rank, and check the invariants over all ranks."""

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ViolationError(f"{what}: {actions} in {state.phase.name} with {envs}")

    for action in actions:
        number = action.round
        in_flight = any(env.done < env.issued for env in envs)
        if action.do is Do.SNAPSHOT:
            require(not state.paused or state.wanted is not Command.NONE, "begun while paused")
            envs[:] = [fresh(env) for env in envs]
        elif action.do is Do.OBEY:
            require(envs[0].order is not Command.NONE, "obeyed without an order")
            envs[0] = replace(envs[0], order=Command.NONE)
        elif action.do is Do.END_AUDIT:
            require(all(env.ready and not env.damage for env in envs), "damage was overlooked")
            envs[:] = [fresh(env) for env in envs]
        elif action.do in (Do.REDUCE, Do.REDUCE_SUMS, Do.BROADCAST):
            require(not any(env.bulk for env in envs), "two bulk operations at a time")
            if action.do is not Do.BROADCAST:
                require(all(env.ready for env in envs), "reduced before all had a snapshot")
            if action.do is Do.REDUCE_SUMS:
                require(any(env.damage for env in envs), "a repair without damage")
                envs[:] = [fresh(env) for env in envs]
            envs[:] = [replace(env, ready=0, bulk=1) for env in envs]
        elif action.do in (Do.REQUEST_PLAN, Do.PLAN_REPAIR):
            require((action.do is Do.PLAN_REPAIR) == state.repair, "a repair planned as a cycle of load")
            require(not envs[0].bulk, "planned before the load was there")
            envs[:] = [replace(env, ready=0) for env in envs]
        elif action.do is Do.PREPARE:
            require(number <= envs[0].asked, "a round is skipped")
            require(all(env.rounds > number for env in envs), "prepared before all knew the rounds")
            if number < envs[0].asked:
                require(not in_flight, "prepared again while in flight")
            envs[:] = [
                replace(
                    env,
                    asked=number + 1,
                    prepared=min(env.prepared, number),
                    issued=min(env.issued, number),
                    done=min(env.done, number),
                    damaged=env.damaged if 0 <= env.damaged < number else -1,
                )
                for env in envs
            ]
        elif action.do is Do.ISSUE:
            require(all(env.prepared > number == env.issued for env in envs), "issued before all were ready")
            require(number - envs[0].committed < case.settings.buffers, "issued into a buffer that is in use")
            envs[:] = [replace(env, issued=number + 1) for env in envs]
        elif action.do is Do.COMMIT:
            require(all(env.done > number == env.committed for env in envs), "committed before all had it")
            require(all(env.damaged != number for env in envs), "damaged weights committed")
            envs[:] = [replace(env, committed=number + 1, placement=env.placement + 1) for env in envs]
        elif action.do in (Do.FINISH, Do.DROP):
            require(not in_flight, "dropped while in flight")
            if action.do is Do.FINISH:
                whole = all(env.committed == state.rounds for env in envs)
                require(whole or bool(case.settings.cut_after), "finished too early")
            envs[:] = [fresh(env) for env in envs]


def fresh(env: Env) -> Env:
    """The environment of a rank outside a cycle."""
    return Env(bulk=env.bulk, poisoned=env.poisoned, placement=env.placement, order=env.order)


def with_orders(world: World) -> Iterator[World]:
    """The worlds with and without a new order on EP rank 0; it replaces an order that was not obeyed yet. Orders are
    read only outside a cycle, so none needs to arrive within one."""
    yield world
    if world.orders and world.states[0].phase in (Phase.COLLECT, Phase.LISTEN):
        for command in set(Command) - {Command.NONE, world.envs[0].order}:
            envs = (replace(world.envs[0], order=command), *world.envs[1:])
            yield replace(world, envs=envs, orders=world.orders - 1)


def step(world: World, case: Case, see: See) -> Iterator[World]:
    """All worlds that may follow."""
    for begun in with_orders(world):
        yield from follow(begun, case, see)


def follow(world: World, case: Case, see: See) -> Iterator[World]:
    """All worlds that may follow without a further order."""
    active = world.states[0].active
    options = [
        list(events(env, state, rank, case, world.faults))
        for rank, (env, state) in enumerate(zip(world.envs, world.states, strict=True))
    ]
    for choice in product(*options):
        used = sum(cost for _, cost in choice)
        if used > world.faults:
            continue
        envs = [env for env, _ in choice]
        posted, agreed = world.posted, None
        if active:
            facts = tuple(map(facts_of, envs, world.states))
            posted = (*posted, facts)
            if len(posted) > case.lag:
                agreed = bounds(posted[0])
                posted = posted[1:]
        results = [
            advanced(advance, state, see(agreed, posted, rank), case.settings)
            for rank, state in enumerate(world.states)
        ]
        states, actions = zip(*results, strict=True)
        if any(state != states[0] for state in states) or any(done != actions[0] for done in actions):
            raise ViolationError(f"ranks part: {[state.phase.name for state in states]}, {actions}, {envs}")
        perform(actions[0], envs, states[0], case)
        if len({env.placement for env in envs}) != 1:
            raise ViolationError(f"ranks hold different placements: {envs}")
        left = posted if states[0].active else ()
        yield normal(World(states, tuple(envs), left, world.faults - used, world.orders), case)


def as_agreed(agreed: Agreed | None, posted: tuple[tuple[Facts, ...], ...], rank: int) -> Agreed | None:
    del posted, rank
    return agreed


@cache
def advanced(transition: Transition, state: CycleState, agreed: Agreed | None, limits: CycleSettings) -> Result:
    return transition(state, agreed, limits)


@cache
def bounds(facts: tuple[Facts, ...]) -> Agreed:
    columns = list(zip(*(astuple(fact) for fact in facts), strict=True))
    return Agreed(Facts(*map(min, columns)), Facts(*map(max, columns)))


def normal(world: World, case: Case) -> World:
    """The same world with fixed numbers of step, epoch, cycle, order and placement."""
    state = world.states[0]
    numbers = state.epoch, state.cycle, state.order
    posted = tuple(tuple(normal_facts(facts, *numbers) for facts in line) for line in world.posted)
    envs = tuple(replace(env, placement=0) if env.placement else env for env in world.envs)
    return World((normal_state(state, case.settings),) * case.ranks, envs, posted, world.faults, world.orders)


@cache
def normal_state(state: CycleState, limits: CycleSettings) -> CycleState:
    age = min(state.step - state.snapshot_at, state.plan_age_limit(limits) + 1)
    moving = min(state.step - state.entered, limits.cut_after) if state.phase is Phase.MOVE else 0
    listens = max(0, min(state.listen_at - state.step, limits.listen_steps))
    return replace(
        state,
        step=STEP,
        epoch=EPOCH,
        cycle=CYCLE,
        entered=STEP - moving,
        snapshot_at=STEP - age if state.active else STEP,
        due=STEP + 1 if state.phase is Phase.COLLECT else STEP,
        listen_at=STEP + listens if limits.listen_steps else 0,
        order=ORDER,
        plan_length=state.plan_length if state.phase is Phase.BROADCAST else 0,
        audit_due=_audit_due(state),
    )


@cache
def normal_facts(facts: Facts, epoch: int, cycle: int, order: int) -> Facts:
    return replace(
        facts,
        step=STEP,
        epoch=EPOCH if facts.epoch == epoch else EPOCH - 1,
        plan_number=CYCLE if facts.plan_number == cycle else 0,
        placement=0,
        order=ORDER + facts.order - order if facts.order else 0,
    )


def _audit_due(state: CycleState) -> int:
    """The audit's due step, normalised: between cycles it only matters if the audit is due before the next cycle."""
    if state.audit_due < 0:
        return -1
    return STEP if state.active or state.audit_due < state.due else STEP + 2


def explore(case: Case, see: See = as_agreed, limit: int = 2_000_000) -> dict[World, list[World]]:
    """All worlds that can be reached, with the worlds that may follow."""
    start = replace(
        CycleState.start(case.settings),
        step=STEP,
        epoch=EPOCH,
        cycle=CYCLE,
        order=ORDER,
        due=STEP + 1,
        listen_at=STEP,
        entered=STEP,
        snapshot_at=STEP,
        audit_due=STEP if case.settings.audit_steps else -1,
    )
    first = normal(World((start,) * case.ranks, (Env(),) * case.ranks, (), case.faults, case.orders), case)
    after: dict[World, list[World]] = {}
    front = [first]
    while front:
        front_next = []
        for world in front:
            if world in after:
                continue
            after[world] = list(set(step(world, case, see)))
            front_next += [following for following in after[world] if following not in after]
        front = front_next
        assert len(after) < limit, "the search does not end; normal() misses a number that grows"
    return after


def assert_all_end(worlds: dict[World, list[World]]) -> None:
    """Assert that every world has a way to the end of the cycle."""
    before: dict[World, list[World]] = {world: [] for world in worlds}
    for world, following in worlds.items():
        for after in following:
            before[after].append(world)
    good = {world for world in worlds if world.states[0].phase in (Phase.COLLECT, Phase.OFF)}
    front = list(good)
    while front:
        front = [world for after in front for world in before[after] if world not in good and not good.add(world)]
    stuck = [world for world in worlds if world not in good]
    assert not stuck, f"{len(stuck)} worlds have no way out, for example {stuck[0]}"


def settings(lag: int, buffers: int = 2, **limits: int) -> CycleSettings:
    values = {"max_failures": 2, "max_resends": 1, **limits}
    return CycleSettings(
        collect_steps=4 * (lag + 1) + 1, execution_steps=2, first_collect_steps=1, buffers=buffers, **values
    )


CUT = replace(settings(1), collect_steps=3, least_plan_age=9, cut_after=7)
CASES = [
    pytest.param(Case(2, 1, settings(1), (1, 3), 1), id="2 ranks, 2 buffers, 1 fault"),
    pytest.param(Case(2, 2, settings(2, 1), (2,), 1), id="2 ranks, lag 2, 1 buffer, 1 fault"),
    pytest.param(Case(3, 1, settings(1), (2,), 0), id="3 ranks"),
    pytest.param(Case(2, 1, CUT, (3,), 0), id="2 ranks, a plan that gives way"),
    pytest.param(Case(2, 1, settings(1, 1, listen_steps=2), (1,), 0, 2), id="2 ranks, 2 orders"),
    pytest.param(Case(2, 1, settings(1, audit_steps=3), (1, 2), 1), id="2 ranks, audits, 1 fault"),
    pytest.param(Case(2, 0, settings(0, synchronous=True), (1, 3), 1), id="2 ranks, synchronous, 1 fault"),
]
LONG = [
    pytest.param(Case(2, 1, settings(1), (1, 4), 2), id="2 ranks, 2 faults"),
    pytest.param(Case(2, 2, settings(2), (3,), 2), id="2 ranks, lag 2, 2 faults"),
    pytest.param(Case(3, 1, settings(1), (2,), 1), id="3 ranks, 1 fault"),
    pytest.param(Case(3, 1, settings(1, 1, listen_steps=2), (1,), 0, 2), id="3 ranks, 2 orders"),
    pytest.param(Case(2, 2, settings(2, 1, listen_steps=3), (2,), 1, 1), id="2 ranks, lag 2, 1 fault, 1 order"),
    pytest.param(Case(2, 2, settings(2, audit_steps=3), (2,), 2), id="2 ranks, audits, lag 2, 2 faults"),
    pytest.param(Case(2, 1, settings(1, listen_steps=3, audit_steps=3), (2,), 1, 1), id="2 ranks, audits, 1 order"),
]


def search(case: Case) -> None:
    worlds = explore(case)
    states = {world.states[0] for world in worlds}
    unreachable = {
        Phase.LISTEN: not case.settings.listen_steps,
        Phase.AUDIT: not case.settings.audit_steps,
        Phase.DRAIN: not case.faults,
    }
    expected = {phase for phase in Phase if not unreachable.get(phase)}
    assert {state.phase for state in states} == expected, "the search missed a phase; it proves nothing about it"
    reasons = {state.failure for state in states if state.phase is Phase.OFF}
    assert (Failure.TRANSFER in reasons) == bool(case.faults), "a failed transfer is one way to OFF"
    if not case.settings.synchronous:  # there nothing is late, and one fault is not two failures in a row
        assert reasons - {Failure.TRANSFER}, "too many failures in a row are the other way to OFF"
    if case.settings.audit_steps:
        assert any(state.repair and state.phase is Phase.MOVE for state in states)
    assert_all_end(worlds)
    if case.settings.cut_after:
        ends = {world.states[0].committed for world in worlds if world.states[0].phase is Phase.COLLECT}
        assert ends == {0, 1, 2, 3}, "no plan was cut off, or none was carried out in full"
    if case.orders:
        taken = {(world.states[0].paused, world.states[0].wanted) for world in worlds}
        assert {(True, Command.NONE), (True, Command.RESTORE), (False, Command.CYCLE)} <= taken
        assert OTHER_EXECUTION_STEPS in {world.states[0].execution_steps for world in worlds}
    print(f"{len(worlds)} worlds, {sum(map(len, worlds.values()))} steps between them")


@pytest.mark.parametrize("case", CASES)
def test_invariants_hold_in_every_reachable_world(case: Case) -> None:
    search(case)


@pytest.mark.soak
@pytest.mark.parametrize("case", LONG)
def test_invariants_hold_in_every_reachable_world_long(case: Case) -> None:
    search(case)


def test_search_notices_a_phase_that_is_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the transition forgets earlier failures, so balancing is never switched off."""
    original = advance

    def forgetful(state: CycleState, agreed: Agreed | None, limits: CycleSettings) -> tuple[CycleState, Actions]:
        return original(replace(state, failures=0), agreed, limits)

    monkeypatch.setitem(globals(), "advance", forgetful)
    with pytest.raises(AssertionError, match="the search missed a phase"):
        search(Case(2, 1, settings(1, 1), (1,), 0))


def test_search_finds_ranks_that_act_on_their_own_facts() -> None:
    """Negative control: ranks act on what they know alone, and their states differ."""

    def own(agreed: Agreed | None, posted: tuple[tuple[Facts, ...], ...], rank: int) -> Agreed | None:
        del agreed
        return Agreed(posted[-1][rank], posted[-1][rank]) if posted else None

    with pytest.raises(ViolationError, match="ranks part"):
        explore(Case(2, 1, settings(1), (1,), 0), own)


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("ready", "reduced before all had a snapshot"),
        ("rounds_ready", "issued before all were ready"),
        ("rounds_intact", "committed before all had it|damaged weights committed"),
        ("rounds_done", "while in flight"),
    ],
)
def test_search_finds_ranks_that_follow_the_fastest(field: str, found: str) -> None:
    """Negative control: ranks go on when the fastest rank is ready, not when all ranks are."""

    def fastest(agreed: Agreed | None, posted: tuple[tuple[Facts, ...], ...], rank: int) -> Agreed | None:
        del posted, rank
        return agreed and Agreed(replace(agreed.min, **{field: getattr(agreed.max, field)}), agreed.max)

    with pytest.raises(ViolationError, match=found):
        explore(Case(2, 1, settings(1), (2,), 1), fastest)


def test_search_finds_a_rank_that_obeys_before_all_know() -> None:
    """Negative control: rank 0 obeys an order before the other ranks have read it."""

    def hasty(agreed: Agreed | None, posted: tuple[tuple[Facts, ...], ...], rank: int) -> Agreed | None:
        if agreed is None:
            return None
        fields = ("order", "order_command", "order_execution_steps")
        mine = {name: getattr(posted[-1][rank], name) for name in fields} if posted else {}
        return Agreed(agreed.min, replace(agreed.max, **mine))

    with pytest.raises(ViolationError, match="ranks part"):
        explore(Case(2, 1, settings(1, 1, listen_steps=2), (1,), 0, 1), hasty)


def test_search_finds_cycles_that_begin_while_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the transition ignores the pause."""
    original = advance

    def heedless(state: CycleState, agreed: Agreed | None, limits: CycleSettings) -> tuple[CycleState, Actions]:
        if state.phase is not Phase.COLLECT:
            return original(state, agreed, limits)
        following, actions = original(replace(state, paused=False), agreed, limits)
        return replace(following, paused=state.paused), actions

    monkeypatch.setitem(globals(), "advance", heedless)
    with pytest.raises(ViolationError, match="begun while paused"):
        explore(Case(2, 1, settings(1, 1, listen_steps=2), (1,), 0, 1))
