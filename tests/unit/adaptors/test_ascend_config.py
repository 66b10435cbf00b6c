# SPDX-License-Identifier: Apache-2.0
"""The settings are handed over to vllm-ascend and come back in the workers; vllm-ascend is not needed."""

import copy
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ascend_eplb import plugin
from vllm_ascend_eplb.adaptors import handed_over
from vllm_ascend_eplb.adaptors.ascend import hand_over, refusals
from vllm_ascend_eplb.adaptors.ascend.engine import FirstRunner, SecondRunner
from vllm_ascend_eplb.adaptors.vllm.engine import Vllm
from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.messages import EplbConfigError
from vllm_ascend_eplb.values.placement import Placement

STOCK = {"dynamic_eplb", "expert_heat_collection_interval", "algorithm_execution_interval", "num_redundant_experts"}


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    for name in (hand_over.SWITCH, hand_over.SECOND_RUNNER):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in (hand_over.SWITCH, hand_over.SECOND_RUNNER):
        os.environ.pop(name, None)


def test_vllm_ascend_gets_its_keys_and_workers_get_ours():
    given = {"other": 1, "eplb_config": {"dynamic_eplb": True, "target_par": 1.1, "eplb_policy_type": 3}}
    before = json.dumps(given)
    changed = hand_over.hand_over(given)
    assert json.dumps(given) == before
    assert set(changed) == {"other", "eplb_config"}  # only keys that vllm-ascend knows
    assert set(changed["eplb_config"]) == STOCK
    assert changed["eplb_config"]["dynamic_eplb"] is True
    assert changed["other"] == 1
    assert os.environ[hand_over.SWITCH] == "true"
    assert os.environ[hand_over.SECOND_RUNNER] == "0"
    assert hand_over.hand_over(changed) is changed  # once only

    config = served(additional_config=changed)
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert handed_over.settings_of(copied.additional_config) == handed_over.settings_of(given)
        assert copied.additional_config == changed


def test_settings_left_out_stay_left_out():
    changed = hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})
    assert handed_over.settings_of(changed).model_fields_set == {"dynamic_eplb"}


OTHERS = {"load_collection_phase": "decode", "stair_config": {"some": 1}}


@pytest.mark.parametrize(
    "given", [{}, {"eplb_config": {}}, {"eplb_config": {"dynamic_eplb": False}}, {"eplb_config": OTHERS}]
)
def test_settings_that_are_off_are_left_unchanged(given):
    assert hand_over.hand_over(given) is given
    assert hand_over.SWITCH not in os.environ
    assert handed_over.settings_of(given) == EplbConfig()


def test_unchecked_release_is_balanced_only_if_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(hand_over, "installed_version", lambda: "0.99.0")
    given = {"other": 1, "eplb_config": {"dynamic_eplb": True}}
    assert hand_over.hand_over(given) == {"other": 1}
    assert hand_over.SWITCH not in os.environ
    assert f"checked against vllm-ascend {', '.join(hand_over.CHECKED_VERSIONS)}, and this is 0.99.0" in caplog.text
    caplog.clear()
    given["eplb_config"]["allow_unchecked_vllm"] = True
    changed = hand_over.hand_over(given)
    assert handed_over.settings_of(changed).active
    assert hand_over.hand_over(changed) is changed  # the platform hands over again
    assert not caplog.text


def test_contradicting_environment_names_line_to_export(monkeypatch):
    monkeypatch.setenv(hand_over.SWITCH, "0")
    with pytest.raises(EplbConfigError, match=r"DYNAMIC_EPLB=0, .* export DYNAMIC_EPLB=true"):
        hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})
    os.environ[hand_over.SWITCH] = "1"
    hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})


def test_second_runner_is_an_error_with_line_to_export(monkeypatch):
    monkeypatch.setenv(hand_over.SECOND_RUNNER, "1")
    with pytest.raises(EplbConfigError, match=r"VLLM_USE_V2_MODEL_RUNNER=1, .* export VLLM_USE_V2_MODEL_RUNNER=0"):
        hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})
    os.environ[hand_over.SECOND_RUNNER] = "0"
    hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})


@pytest.fixture
def second_runner(monkeypatch):
    monkeypatch.setattr(hand_over, "installed_version", lambda: hand_over.SECOND_RUNNER_VERSIONS[0])
    monkeypatch.setenv(hand_over.SECOND_RUNNER, "1")


def test_second_runner_gets_no_key_and_no_switch(second_runner):
    given = {"eplb_config": {"dynamic_eplb": True, "target_par": 1.1, "expert_map_path": "any-form.npy"}}
    changed = hand_over.hand_over(given)
    assert changed["eplb_config"] == {}
    assert hand_over.SWITCH not in os.environ
    assert hand_over.hand_over(changed) is changed
    sent = pickle.loads(pickle.dumps(changed))
    assert handed_over.settings_of(sent) == handed_over.settings_of(given)


def test_weighted_dispatch_needs_the_second_runner(second_runner, monkeypatch):
    given = {"eplb_config": {"dynamic_eplb": True, "weighted_dispatch": True, "num_redundant_experts": 2}}
    assert handed_over.settings_of(hand_over.hand_over(given)).weighted_dispatch
    monkeypatch.delenv(hand_over.SECOND_RUNNER)
    with pytest.raises(EplbConfigError, match=r"weighted_dispatch = true .* or: export VLLM_USE_V2_MODEL_RUNNER=1"):
        hand_over.hand_over(given)
    monkeypatch.setattr(hand_over, "installed_version", lambda: "0.23.0.post1")
    with pytest.raises(EplbConfigError, match=r"weighted_dispatch = true .*\(allowed: false\); leave it out$"):
        hand_over.hand_over(given)


def test_second_runner_refuses_switch_of_the_first(second_runner, monkeypatch):
    monkeypatch.setenv(hand_over.SWITCH, "true")
    with pytest.raises(EplbConfigError, match=r"DYNAMIC_EPLB=true, .* export DYNAMIC_EPLB=false"):
        hand_over.hand_over({"eplb_config": {"dynamic_eplb": True}})
    assert [entry.name for entry in hand_over.contradictions()] == [hand_over.SWITCH]
    os.environ[hand_over.SWITCH] = "false"
    assert hand_over.contradictions() == []


def test_map_is_handed_over_in_vllm_ascends_form_only(tmp_path):
    placement = Placement.initial(2, 4, 2, 2)
    for name, form, words in (
        ("map.json", "sglang", "not in the form that vllm-ascend loads"),
        ("map.npy", "array", "not in the form that vllm-ascend loads"),
        ("map.json", "ascend", ""),
    ):
        path = tmp_path / name
        write_expert_map(path, placement, form)
        given = {"eplb_config": {"expert_map_path": str(path)}}
        if words:
            with pytest.raises(EplbConfigError, match=words):
                hand_over.hand_over(given)
        else:
            stock = hand_over.hand_over(given)["eplb_config"]
            assert stock["expert_map_path"] == str(path)
            assert stock["dynamic_eplb"] is True


def test_a_map_is_kept_where_vllm_ascend_does_not_heed_it(tmp_path, monkeypatch):
    """vllm-ascend gets the number of redundant experts, to make room for them."""
    monkeypatch.setattr(hand_over, "installed_version", lambda: "0.30.0rc2")
    path = tmp_path / "map.json"
    write_expert_map(path, Placement.initial(2, 4, 2, 2))
    handed = hand_over.hand_over({"eplb_config": {"expert_map_path": str(path), "dynamic_eplb": True}})["eplb_config"]
    assert handed["num_redundant_experts"] == 2
    assert "expert_map_path" not in handed
    assert handed_over.settings_of({"eplb_config": handed}).expert_map_path == str(path)
    with pytest.raises(EplbConfigError, match=r"expert_map_path: .*missing\.json"):
        hand_over.hand_over({"eplb_config": {"expert_map_path": str(tmp_path / "missing.json")}})


def test_expert_twice_on_a_device_is_refused(tmp_path):
    path = tmp_path / "map.json"
    write_expert_map(path, Placement(np.array([[0, 1, 1, 2, 3, 0]], dtype=np.int32), 4, 2))
    with pytest.raises(EplbConfigError, match="expert 1 twice"):
        hand_over.hand_over({"eplb_config": {"expert_map_path": str(path)}})


def served(**changes):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=2,
            data_parallel_size=1,
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),
        model_config=SimpleNamespace(enable_sleep_mode=False),
        lora_config=None,
        speculative_config=None,
        weight_transfer_config=None,
        additional_config={},
    )
    for path, value in changes.items():
        owner = config
        *parents, name = path.split("__")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


def drafted(method, num_experts=8, layers=1):
    """The speculative configuration of a draft model with its own weights."""
    model = SimpleNamespace(get_num_experts=lambda: num_experts, hf_config=SimpleNamespace(n_predict=layers))
    return SimpleNamespace(method=method, draft_model_config=model, target_model_config=SimpleNamespace())


def test_draft_tokens_are_allowed():
    model = SimpleNamespace(get_num_experts=lambda: 8)
    without_weights = SimpleNamespace(method="ngram", draft_model_config=model, target_model_config=model)
    for drafter in (without_weights, drafted("mtp"), drafted("draft_model", num_experts=0)):
        refusals.refuse_unsupported(served(speculative_config=drafter))


def test_unsupported_option_is_refused_by_name():
    recorded = {"additional_config": {"eplb_config": {"expert_map_record_path": "map.json"}}}
    stages = {"parallel_config__pipeline_parallel_size": 2}
    engines = {"parallel_config__data_parallel_size": 2}
    fused = {"additional_config": {"enable_fused_mc2": 1}}
    for change in (
        {},
        engines,
        stages,
        {**stages, **engines},
        {**engines, "speculative_config": drafted("mtp")},
        recorded,
        fused,
    ):
        refusals.refuse_unsupported(served(**change))
    for change, words in (
        ({**stages, **recorded}, "an expert_map_path or expert_map_record_path and --pipeline-parallel-size 2"),
        (
            {**stages, "speculative_config": drafted("mtp")},
            "a draft model with experts and --pipeline-parallel-size 2",
        ),
        ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode True"),
        ({"speculative_config": drafted("draft_model")}, "draft model with experts, of method draft_model"),
        ({"speculative_config": drafted("eagle")}, "draft model with experts, of method eagle"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        ({"additional_config": {"mix_placement": True}}, "mix_placement"),
        ({"additional_config": {"enable_fused_mc2": 2}}, r"enable_fused_mc2 2 is .*allowed: 0 or 1"),
    ):
        with pytest.raises(EplbConfigError, match=words):
            refusals.refuse_unsupported(served(**change))


def test_variable_of_the_release_turns_fused_mc2_on(monkeypatch):
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_FUSED_MC2", "2")
    refusals.refuse_unsupported(served(additional_config={"enable_fused_mc2": 1}))
    with pytest.raises(EplbConfigError, match="enable_fused_mc2 2"):
        refusals.refuse_unsupported(served())


def test_maps_beside_draft_experts_are_accepted():
    for key in ("expert_map_path", "expert_map_record_path"):
        additional = {"eplb_config": {"dynamic_eplb": True, key: "map.json"}}
        refusals.refuse_unsupported(served(additional_config=additional, speculative_config=drafted("mtp")))


@pytest.mark.parametrize(
    ("in_map", "of_drafter", "wanted", "wanted_by_first_runner"),
    [
        (4, None, 4, 4),
        (3, None, 4, 4),
        (4, 1, 4, 4),
        (5, 1, 5, 5),
        (3, 1, 5, 5),
        (4, 2, 4, 6),
        (6, 2, 6, 6),
        (4, "?", None, None),
    ],
)
def test_map_has_the_layers_of_model_and_draft_model(tmp_path, in_map, of_drafter, wanted, wanted_by_first_runner):
    """vllm-ascend's first runner accepts a map of the model's layers alone only if the draft model has one layer."""
    path = tmp_path / "map.json"
    write_expert_map(path, Placement.initial(in_map, 8, 2, 2))
    config = handed_over.settings_of({"eplb_config": {"expert_map_path": str(path)}})
    drafter = None if of_drafter is None else drafted("mtp", layers=of_drafter)
    for engine, layers in ((Vllm(), wanted), (SecondRunner(), wanted), (FirstRunner(), wanted_by_first_runner)):
        assert engine.layers_of_map(config, 4, drafter) == layers
        assert engine.layers_of_map(config, None, drafter) is None
        assert engine.layers_of_map(config, 4, {"method": "mtp"}) is None  # not read: the draft model may have layers
    unreadable = handed_over.settings_of({"eplb_config": {"expert_map_path": str(tmp_path / "gone.json")}})
    assert Vllm().layers_of_map(unreadable, 4, drafted("mtp", layers=1)) == 5


def test_platform_is_registered_only_if_it_is_named(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert plugin.register_platform() is None
    monkeypatch.setenv("VLLM_PLUGINS", "ascend,eplb")
    assert plugin.register_platform() is None
    monkeypatch.setenv("VLLM_PLUGINS", "ascend_eplb,eplb")
    assert plugin.register_platform() == "vllm_ascend_eplb.adaptors.ascend.platform.EplbNPUPlatform"
