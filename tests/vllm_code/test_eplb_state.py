# SPDX-License-Identifier: Apache-2.0
"""vLLM's state API: our maps, shapes and dtypes equal those of vLLM's own functions."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("vllm.distributed.eplb.eplb_state")
base_router = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.base_router")
ubatching = pytest.importorskip("vllm.v1.worker.ubatching")

from vllm_ascend_eplb.adaptors.vllm.eplb_state import (  # noqa: E402
    EpConfigurationError,
    EplbState,
    build_initial_global_physical_to_logical_map,
    compute_logical_maps,
)
from vllm_ascend_eplb.adaptors.vllm.state import VllmEplbState  # noqa: E402
from vllm_ascend_eplb.agreement.phases import (  # noqa: E402
    CycleSettings,
    CycleState,
    Phase,
    early,
)
from vllm_ascend_eplb.agreement.transition import advance  # noqa: E402
from vllm_ascend_eplb.balancer.balancedness import load_stats  # noqa: E402
from vllm_ascend_eplb.load.recorder import LoadRecorder  # noqa: E402
from vllm_ascend_eplb.values.placement import Placement  # noqa: E402

LAYERS, EXPERTS, REDUNDANT = 3, 8, 4


class Model:
    """A model with vLLM's MixtureOfExperts protocol. It keeps the tensors that it is given, layer by layer."""

    def __init__(self, **changes):
        self.num_moe_layers = LAYERS
        self.num_routed_experts = self.num_logical_experts = EXPERTS
        self.num_redundant_experts = REDUNDANT
        self.num_physical_experts = EXPERTS + REDUNDANT
        self.num_expert_groups = 1
        vars(self).update(changes)

    def set_eplb_state(self, expert_load_view, logical_to_physical_map, logical_replica_count):
        self.layers = [theirs.EplbLayerState() for _ in range(self.num_moe_layers)]
        for index, layer in enumerate(self.layers):
            layer.set_layer_state(index, expert_load_view, logical_to_physical_map, logical_replica_count)


def config(name="main"):
    return SimpleNamespace(model=name, compute_hash=lambda: name)


@settings(max_examples=1000, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 4),
    experts=st.integers(1, 40),
    slots=st.integers(1, 60),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_logical_maps_are_equal_to_vllm(seed, layers, experts, slots, dtype):
    rng = np.random.default_rng(seed)
    held = torch.from_numpy(rng.integers(-1, experts, (layers, slots)))
    held = held.to(dtype)
    for given_map in (held, held[0]):
        # vLLM's function indexes with the map itself, which torch allows for int64 only.
        expected = theirs.compute_logical_maps(given_map.long(), experts)
        for made, their in zip(compute_logical_maps(given_map, experts), expected, strict=True):
            assert made.dtype == dtype
            assert made.shape == their.shape
            assert torch.equal(made.long(), their)


def test_comparison_with_vllm_can_fail():
    held = torch.tensor([[0, 1, 1, -1]])
    assert not torch.equal(compute_logical_maps(held, 2)[0], theirs.compute_logical_maps(held.flip(1), 2)[0])


def test_maps_of_empty_slots_have_no_replicas():
    inverse, count = compute_logical_maps(torch.full((2, 3), -1), 4)
    assert inverse.shape == (2, 4, 0)
    assert count.sum() == 0


@pytest.mark.parametrize("held", [torch.zeros((1, 1, 1), dtype=torch.int64), torch.tensor([4]), torch.tensor([-2])])
def test_maps_of_another_kind_are_refused(held):
    with pytest.raises(EpConfigurationError, match=r"give \[layers, slots\]|allowed are 0..3"):
        compute_logical_maps(held, 4)


@settings(max_examples=300, deadline=None)
@given(experts=st.integers(1, 300), redundant=st.integers(0, 700))
def test_initial_map_is_equal_to_vllms(experts, redundant):
    ours = build_initial_global_physical_to_logical_map(experts, redundant)
    assert ours == theirs.EplbState.build_initial_global_physical_to_logical_map(experts, redundant)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.sampled_from([1, 2, 4, 16]), most=st.sampled_from([0, 3, 10**6]))
def test_balancedness_is_computed_as_vllm_does(seed, ranks, most):
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, most + 1, (5, 4 * ranks)))
    average, busiest = theirs._compute_eplb_load_stats(tokens.reshape(5, ranks, -1).sum(dim=-1).float())
    ours = load_stats(tokens, ranks)
    assert (ours.avg_tokens, ours.max_tokens) == (average.item(), busiest.item())
    assert ours.balancedness == (average.item() / busiest.item() if busiest > 0 else 0.0)


def test_views_have_vllms_shapes_and_dtypes_and_one_address():
    state, model = EplbState(None, torch.device("cpu")), Model()
    state.add_model(model, config())
    (views,) = state.model_states.values()
    assert (views.model_name, views.model) == ("main", model)
    for made, shape, dtype in (
        (views.physical_to_logical_map, (LAYERS, EXPERTS + REDUNDANT), torch.int64),
        (views.logical_to_physical_map, (LAYERS, EXPERTS, REDUNDANT + 1), torch.int64),
        (views.logical_replica_count, (LAYERS, EXPERTS), torch.int64),
        (views.expert_load_pass, (LAYERS, EXPERTS + REDUNDANT), torch.int32),
    ):
        assert (tuple(made.shape), made.dtype) == (shape, dtype)
    rng = np.random.default_rng(0)
    mapping = torch.from_numpy(
        np.stack([rng.permutation(np.r_[np.arange(EXPERTS), [0, 0, 5, -1]]) for _ in range(LAYERS)])
    )
    views.expert_load_pass += 1
    state.update_mapping(config(), mapping)
    assert torch.equal(views.physical_to_logical_map, mapping)
    inverse, count = theirs.compute_logical_maps(mapping, EXPERTS)
    for index, layer in enumerate(model.layers):  # the tensors that the routers got at the start
        assert torch.equal(layer.logical_to_physical_map[:, : inverse.shape[-1]], inverse[index])
        assert (layer.logical_to_physical_map[:, inverse.shape[-1] :] == -1).all()
        assert torch.equal(layer.logical_replica_count, count[index])
        assert (layer.expert_load_view == 0).all()
        ours = views.layer(index)
        assert ours.logical_to_physical_map.data_ptr() == layer.logical_to_physical_map.data_ptr()
        assert ours.expert_load_view.data_ptr() == layer.expert_load_view.data_ptr()
    again = EplbState.from_mapping(Model(), config(), torch.device("cpu"), None, mapping)
    assert torch.equal(again.model_states["main"].logical_to_physical_map, views.logical_to_physical_map)


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        (torch.zeros((LAYERS, 3), dtype=torch.int64), "shape"),
        (torch.zeros((LAYERS, EXPERTS + REDUNDANT), dtype=torch.int64), "copies; allowed are 1..5"),
    ],
)
def test_mapping_that_does_not_fit_changes_nothing(mapping, says):
    state = EplbState(None, torch.device("cpu"))
    state.add_model(Model(), config())
    before = state.model_states["main"].logical_to_physical_map.clone()
    with pytest.raises(EpConfigurationError, match=says):
        state.update_mapping(config(), mapping)
    assert torch.equal(state.model_states["main"].logical_to_physical_map, before)


def test_models_that_agree_can_both_be_added():
    state = EplbState(None, torch.device("cpu"))
    state.add_model(Model(), config())
    state.add_model(Model(num_moe_layers=1), config("draft"), model_name="draft model")
    assert [views.model_name for views in state.model_states.values()] == ["main", "draft model"]


@pytest.mark.parametrize("name", ["num_routed_experts", "num_redundant_experts", "num_expert_groups"])
def test_model_that_differs_is_refused_with_the_difference(name):
    state = EplbState(None, torch.device("cpu"))
    state.add_model(Model(), config())
    differing = Model(**{name: 2})
    with pytest.raises(EpConfigurationError, match=f"mismatch.*{name} 2, Model has"):
        state.add_model(differing, config("draft"))
    in_vllm = theirs.EplbState.__new__(theirs.EplbState)
    in_vllm.model_states = {"main": SimpleNamespace(model=Model())}
    in_vllm.validate_ep_configuration(Model())
    with pytest.raises(RuntimeError, match="mismatch"):
        in_vllm.validate_ep_configuration(differing)
    assert list(state.model_states) == ["main"]


def vllm_rearranges_after(interval, idle, monkeypatch):
    """The number of the call of vLLM's own step() that first rearranges experts."""
    state = theirs.EplbState.__new__(theirs.EplbState)
    happened = []
    eplb = SimpleNamespace(log_balancedness_interval=1, step_interval=interval, window_size=5)
    vars(state).update(
        parallel_config=SimpleNamespace(eplb_config=eplb),
        model_states={},
        is_async=False,
        should_record_tensor=None,
        expert_load_window_size=5,
        expert_load_window_step=0,
        expert_rearrangement_step_interval=interval,
        expert_rearrangement_step=max(0, interval - interval // 4),  # as vLLM's add_model sets it
        rearrange=lambda **_: happened.append(True),
    )
    monkeypatch.setattr(theirs, "get_ep_group", lambda: SimpleNamespace(device_group=None))
    for number in range(1, interval + 2):
        state.step(is_dummy=bool(idle(number)))
        if happened:
            return number
    return None


@pytest.mark.parametrize(
    "idle", [lambda _: False, lambda _: True, lambda number: number % 3], ids=["busy", "idle", "mixed"]
)
def test_first_cycle_begins_at_vllms_step(idle, monkeypatch):
    for interval in (1, 2, 3, 4, 7, 40, 600):
        cycle = CycleSettings(interval, 1, early(interval))
        state, steps = CycleState.start(cycle), 0
        while state.phase is Phase.COLLECT:
            state, _ = advance(state, None, cycle)
            steps += 1
        assert steps == vllm_rearranges_after(interval, idle, monkeypatch), interval


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(2, 200), data=st.data())
def test_micro_batches_are_counted_as_in_vllm(rows, data):
    """vLLM's own state is given the same parts of a batch."""
    tokens = data.draw(st.integers(1, rows))
    cut = data.draw(st.integers(1, rows - 1))
    batches = [SimpleNamespace(token_slice=slice(0, cut)), SimpleNamespace(token_slice=slice(cut, rows))]
    ours = VllmEplbState(SimpleNamespace(num_ubatches=2), torch.device("cpu"))
    state = theirs.EplbState.__new__(theirs.EplbState)
    expected = [torch.zeros((), dtype=torch.int32) for _ in range(2)]
    state.model_states = {"main": SimpleNamespace(num_unpadded_tokens_tensors=expected)}
    for split in (None, batches):
        ours.prepare_forward(config(), tokens, split)
        state.prepare_forward(config(), tokens, split)
        assert [int(tokens.tensor) for tokens in ours.tokens] == list(map(int, expected))


def test_router_takes_the_number_of_its_micro_batch(monkeypatch):
    """vLLM runs each micro-batch in a thread, and a router finds the number of tokens by the thread."""
    layer = theirs.EplbLayerState()
    layer.num_unpadded_tokens_tensors = [torch.tensor(3, dtype=torch.int32), torch.tensor(2, dtype=torch.int32)]
    layer.expert_load_view = torch.zeros(4, dtype=torch.int32)
    layer.logical_to_physical_map = torch.arange(4)[:, None]
    layer.logical_replica_count = torch.ones(4, dtype=torch.int64)
    layer.should_record_tensor = torch.ones(1, dtype=torch.bool)
    taken = []
    monkeypatch.setattr(
        base_router,
        "eplb_map_to_physical_and_record",
        lambda num_unpadded_tokens, **_: taken.append(num_unpadded_tokens),
    )
    numbers = {}
    monkeypatch.setattr(ubatching, "_THREAD_ID_TO_CONTEXT", numbers)
    router = SimpleNamespace(eplb_state=layer)

    def route(number):
        numbers[threading.get_ident()] = number
        base_router.BaseRouter._apply_eplb_mapping(router, torch.zeros((4, 1), dtype=torch.int32))

    for number in (0, 1):
        thread = threading.Thread(target=route, args=(number,))
        thread.start()
        thread.join()
    assert [int(tokens) for tokens in taken] == [3, 2]


@pytest.mark.parametrize("counting", [True, False])
def test_suppressed_warmup_steps_nothing_and_keeps_the_switch(counting):
    """vLLM 0.33 writes to the switch of the recorder around warm-up, and puts back what was there."""
    utils = pytest.importorskip("vllm.v1.worker.gpu.eplb_utils")
    controller = utils.EPLBController(
        SimpleNamespace(
            enable_eplb=True, data_parallel_size=1, num_ubatches=0, eplb_config=SimpleNamespace(log_balancedness=False)
        ),
        torch.device("cpu"),
    )
    if not hasattr(controller, "suppress"):
        pytest.skip("since vLLM 0.33")
    recorder = LoadRecorder(LAYERS, EXPERTS, EXPERTS, torch.device("cpu"))
    recorder.begin_step(Placement.initial(LAYERS, EXPERTS, 2), record=counting)
    state, steps = VllmEplbState(controller.parallel_config, torch.device("cpu")), []
    state.should_record_tensor = recorder.recording
    state.step = lambda *args, **kwargs: steps.append(args)
    controller.state, controller._has_registered_models = state, True  # noqa: SLF001
    with controller.suppress():
        assert not recorder.recording.item()
        controller.step()
    assert recorder.recording.item() == counting
    assert steps == []
    controller.step()
    assert len(steps) == 1
