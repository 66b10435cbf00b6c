# SPDX-License-Identifier: Apache-2.0
"""The settings: defaults, refusals with their messages, and random dictionaries.

One file, because it is one table of values and messages.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.settings.config import EplbConfig, settings_table
from vllm_ascend_eplb.settings.fit import (
    ModelShape,
    ServerShape,
    fit,
    read_start_placement,
    refuse_vllms_own,
)
from vllm_ascend_eplb.settings.messages import MOVED_INTO_EPLB_CONFIG, OF_OTHERS, EplbConfigError
from vllm_ascend_eplb.settings.reading import says_off
from vllm_ascend_eplb.values.placement import Placement


def parse(**eplb_config: object) -> EplbConfig:
    return EplbConfig.from_additional_config({"eplb_config": eplb_config})


def refusal(additional_config: object) -> str:
    with pytest.raises(EplbConfigError) as caught:
        EplbConfig.from_additional_config(additional_config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("nothing", [None, {}, {"eplb_config": {}}, {"of_another_plugin": 1}, object()])
def test_no_settings_mean_off(nothing: object) -> None:
    config = EplbConfig.from_additional_config(nothing)
    assert config == EplbConfig()
    assert not config.active


def test_defaults_of_vllm_ascend() -> None:
    config = parse()
    assert config.dynamic_eplb is False
    assert (config.expert_map_path, config.expert_map_record_path) == (None, None)
    assert (config.expert_heat_collection_interval, config.algorithm_execution_interval) == (600, 50)
    assert (config.num_redundant_experts, config.eplb_policy_type) == (0, 2)
    assert config.eplb_heat_collection_stage == "all"


@pytest.mark.parametrize("key", ["dynamic_eplb", "expert_map_path", "expert_map_record_path"])
def test_switch_and_maps_make_the_balancer_active(key: str) -> None:
    assert parse(**{key: True if key == "dynamic_eplb" else "map.json"}).active
    assert not parse(mode="observe", num_redundant_experts=4).active


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "incremental"),
        ({"eplb_policy_type": 0}, "random"),
        ({"eplb_policy_type": 1}, "default"),
        ({"eplb_policy_type": 3}, "incremental"),
        ({"eplb_policy_type": 1, "policy": "random"}, "random"),
    ],
)
def test_policy_follows_its_name_or_its_number(settings: dict[str, object], name: str) -> None:
    assert parse(**settings).policy_name == name


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().dynamic_eplb = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dynamic_eplb", "ture", "is a string; allowed: true | false (did you mean true?)"),
        ("dynamic_eplb", 2, "is an integer; allowed: true | false"),
        ("expert_heat_collection_interval", 0, "is out of range; allowed: integer 1..10000000; leave it out for"),
        ("expert_heat_collection_interval", 600.5, "is a number with a decimal point; allowed: integer 1..10000000"),
        ("expert_heat_collection_interval", "0", "= '0' is out of range; allowed: integer 1..10000000"),
        ("expert_heat_collection_interval", "6OO", "is a string; allowed: integer 1..10000000"),
        ("algorithm_execution_interval", -3, "= -3 is out of range"),
        ("algorithm_execution_interval", None, "= null is no value; allowed: integer"),
        ("num_redundant_experts", True, "is a boolean; allowed: integer"),
        ("eplb_policy_type", 4, "allowed: integer 0..3"),
        ("eplb_policy_type", "swift", "is a string; allowed: integer 0..3"),
        ("eplb_heat_collection_stage", "prefil", "(did you mean prefill?)"),
        ("policy", "flashlb", "allowed: incremental | default | random | null"),
        ("mode", "Observe", "(did you mean observe?)"),
        ("target_par", 0.99, "= 0.99 is out of range; allowed: number 1.0..10.0"),
        ("target_par", float("nan"), "= nan is out of range"),
        ("target_par", float("inf"), "= inf is out of range"),
        ("target_par", 10**400, "is out of range"),
        ("min_gain", -0.1, "number 0.0..1.0"),
        ("transfer_buffer_experts", 0, "integer 1..4096 | null"),
        ("transfer_budget_mb_per_step", "5 MB", "= '5 MB' is a string; allowed: number 0.001..1000000.0 | null"),
        ("transfer_budget_mb_per_step", "null", "(write null without quotes)"),
        ("transport", "tcp", "auto | gloo | nccl | hccl | pull"),
        ("control_lag", 9, "integer 1..8"),
        ("max_failures", 0, "integer 1.."),
        ("dispatch_table_entries", 128, "integer 16..64"),
        ("expert_map_path", "", "is not a path"),
        ("expert_map_path", 3, "is an integer; allowed: a path | null"),
    ],
)
def test_bad_value_is_refused_with_the_allowed_ones(key: str, value: object, expected: str) -> None:
    message = refusal({"eplb_config": {key: value}})
    assert message.startswith(f"eplb_config.{key} = ")
    assert expected in message
    assert "leave it out for the default" in message


@pytest.mark.parametrize(
    ("additional_config", "expected"),
    [
        ({"eplb_config": {"expert_heat_interval": 5}}, "did you mean expert_heat_collection_interval?"),
        ({"eplb_config": {"dynamic-eplb": True}}, "did you mean dynamic_eplb?"),
        ({"eplb_config": {"zzzz": 5}}, "has no setting 'zzzz'; known are dynamic_eplb, "),
        ({"eplb_config": {7: 5}}, "has no setting 7; known are "),
        (
            {"eplb_config": {"dynamic_eplb": True, "load_collection_phase": "all"}},
            "write eplb_heat_collection_stage instead",
        ),
        ({"eplb_config": {"dynamic_eplb": True, "stair_config": {}}}, "no setting 'stair_config'"),
        ({"eplb_config": {"init_redundancy_expert": 5}}, "old name; write num_redundant_experts instead"),
        ({"num_iterations_eplb_update": 400}, '{"eplb_config": {"expert_heat_collection_interval": 400}}'),
        ({"num_wait_worker_iterations": 30}, '{"eplb_config": {"algorithm_execution_interval": 30}}'),
        ({"init_redundancy_expert": 16}, '{"eplb_config": {"num_redundant_experts": 16}}'),
        ({"dynamic_eplb": True}, '{"eplb_config": {"dynamic_eplb": true}}'),
        ({"eplb_config": True}, "must be a dictionary"),
        ({"eplb_config": '{"dynamic_eplb": true}'}, "is a string; it must be a dictionary"),
        ({"eplb_config": [True]}, "is a list; it must be a dictionary"),
    ],
)
def test_bad_key_or_shape_is_refused_with_the_right_one(additional_config: object, expected: str) -> None:
    assert expected in refusal(additional_config)


OLD_NAMES = {
    "dynamic_eplb": "dynamic_eplb",
    "expert_map_path": "expert_map_path",
    "expert_map_record_path": "expert_map_record_path",
    "eplb_policy_type": "eplb_policy_type",
    "num_redundant_experts": "num_redundant_experts",
    "num_iterations_eplb_update": "expert_heat_collection_interval",
    "num_wait_worker_iterations": "algorithm_execution_interval",
    "init_redundancy_expert": "num_redundant_experts",
}


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    assert set(OLD_NAMES) == set(MOVED_INTO_EPLB_CONFIG)
    message = refusal({old: 1, "eplb_config": {"dynamic_eplb": True}})
    assert f"additional_config.{old} is an old name" in message
    assert f'{{"eplb_config": {{"{new}": 1}}}}' in message
    if old != new:
        assert refusal({"eplb_config": {old: 1}}) == f"eplb_config.{old} is an old name; write {new} instead"
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert f"`{old}`" in page


def serve(
    config: EplbConfig,
    num_experts: int | None = 64,
    ep_size: int = 4,
    expert_parallel: bool = True,
    vllm_eplb: bool = False,
    num_layers: int | None = None,
) -> int:
    refuse_vllms_own(config, vllm_eplb, None)
    return fit(config, ModelShape(num_experts, num_layers), ServerShape(ep_size, expert_parallel))


@pytest.mark.parametrize("redundant", [0, 4, 192])
def test_serving_accepts_a_good_redundancy(redundant: int) -> None:
    serve(parse(dynamic_eplb=True, num_redundant_experts=redundant))


@pytest.mark.parametrize(
    ("redundant", "changes", "expected"),
    [
        (0, {"num_experts": None}, "a model without experts"),
        (0, {"num_experts": 0}, "a model without experts"),
        (0, {"expert_parallel": False}, "add --enable-expert-parallel"),
        (0, {"ep_size": 1}, "the expert-parallel size is 1; balancing needs 2 or more ranks"),
        (0, {"vllm_eplb": True}, "leave out --enable-eplb, or eplb_config"),
        (3, {}, "64 experts + 3 cannot be shared evenly by 4 ranks; nearest that works: 0 or 4"),
        (0, {"num_experts": 63}, "nearest that works: 1"),
        (196, {}, "= 196 is more than 192"),
        (196, {}, "allowed are 0..192 in steps of 4"),
        (400, {"num_experts": 63}, "allowed are 1..189 in steps of 4"),
    ],
)
def test_serving_refuses_settings_that_do_not_fit(redundant: int, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(EplbConfigError) as caught:
        serve(parse(dynamic_eplb=True, num_redundant_experts=redundant), **changes)
    assert expected in str(caught.value)
    serve(parse(num_redundant_experts=redundant), **changes)  # off: nothing is checked


@given(st.integers(1, 300), st.integers(2, 64), st.integers(0, 2000))
def test_suggested_redundancy_works(experts: int, ranks: int, redundant: int) -> None:
    try:
        serve(parse(dynamic_eplb=True, num_redundant_experts=redundant), num_experts=experts, ep_size=ranks)
    except EplbConfigError as error:
        message = str(error)
        _, nearest, works = message.partition("works: ")
        counts = works.split(" or ") if nearest else [message.split("..")[1].split()[0]]
        for count in map(int, counts):
            serve(parse(dynamic_eplb=True, num_redundant_experts=count), num_experts=experts, ep_size=ranks)
    else:
        assert (experts + redundant) % ranks == 0
        assert redundant <= experts * (ranks - 1)


def write_map(path: Path, **changes: object) -> str:
    """Write a map for 2 layers of 64 experts on 4 ranks with 4 redundant experts."""
    placement = Placement.initial(**{"num_layers": 2, "num_experts": 64, "num_ranks": 4, "num_redundant": 4} | changes)
    write_expert_map(path, placement)
    return str(path)


def map_refusal(key: str, path: object, **changes: object) -> str:
    with pytest.raises(EplbConfigError) as caught:
        serve(parse(**{key: str(path)}), **changes)
    assert str(caught.value).startswith(f"eplb_config.{key}: ")
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_start_map_gives_the_number_of_redundant_experts(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.json")
    assert serve(parse(expert_map_path=path), num_layers=2) == 4
    assert serve(parse(expert_map_path=path, num_redundant_experts=4, dynamic_eplb=True)) == 4
    with pytest.raises(EplbConfigError, match="has 4 redundant experts per layer, eplb_config"):
        serve(parse(expert_map_path=path, num_redundant_experts=0))
    shape = {"num_layers": 2, "num_experts": 64, "num_ranks": 4}
    assert read_start_placement(parse(expert_map_path=path), **shape) == Placement.initial(2, 64, 4, 4)
    assert read_start_placement(parse(num_redundant_experts=4), **shape) is None


def test_map_alone_is_a_static_placement(tmp_path: Path) -> None:
    path = str(tmp_path / "map.json")
    assert not parse(expert_map_path=path).dynamic
    assert parse(expert_map_path=path, dynamic_eplb=True).dynamic
    assert parse(expert_map_record_path=path).dynamic  # as in vllm-ascend


def test_expert_twice_on_a_device_does_not_stop_the_start(tmp_path: Path) -> None:
    slots = Placement.initial(2, 64, 4, 4).physical_to_logical.copy()
    slots[1, 1] = 0
    slots[1, 67] = 1
    path = tmp_path / "map.json"
    write_expert_map(path, Placement(slots, 64, 4))
    assert serve(parse(expert_map_path=str(path))) == 4


@pytest.mark.parametrize(
    ("made", "serving", "expected"),
    [
        ({"num_layers": 3}, {"num_layers": 2}, "has 3 MoE layers, the model has 2"),
        ({"num_ranks": 2}, {}, "is for 2 devices, the server has 4 ranks"),
        ({"num_experts": 68, "num_redundant": 0}, {}, "layer 0, device 3, slot 13 holds expert 64; the model has"),
        ({"num_experts": 60, "num_redundant": 8}, {}, "layer 0 has no copy of expert 60 on any device"),
    ],
)
def test_map_for_another_model_is_refused(
    tmp_path: Path, made: dict[str, int], serving: dict[str, int], expected: str
) -> None:
    path = write_map(tmp_path / "map.json", **made)
    assert expected in map_refusal("expert_map_path", path, **serving)


def test_map_with_too_many_slots_is_refused(tmp_path: Path) -> None:
    slots = np.tile(np.arange(260, dtype=np.int32) % 64, (2, 1))
    write_expert_map(tmp_path / "map.json", Placement(slots, 64, 4))
    assert "260 slots per layer, more than 256" in map_refusal("expert_map_path", tmp_path / "map.json")


def test_expert_map_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    map_file = tmp_path / "map.json"
    assert "does not exist" in map_refusal("expert_map_path", map_file)
    assert "is a directory" in map_refusal("expert_map_path", tmp_path)
    assert re.search(r"a\?b cannot be read \(.*embedded null", map_refusal("expert_map_path", "a\0b"))  # Python's words
    map_file.touch()
    assert "is empty" in map_refusal("expert_map_path", map_file)
    map_file.write_text("{}")
    assert "not an expert map" in map_refusal("expert_map_path", map_file)
    if os.geteuid() != 0:
        map_file.chmod(0)
        assert "may not be read" in map_refusal("expert_map_path", map_file)


def test_record_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    key = "expert_map_record_path"
    assert serve(parse(**{key: str(tmp_path / "map.json")})) == 0
    assert "is a directory" in map_refusal(key, tmp_path)
    assert "does not exist; create it first" in map_refusal(key, tmp_path / "a" / "map.json")
    assert "null byte" in map_refusal(key, tmp_path / "a\0b")
    assert "is not a regular file" in map_refusal(key, "/dev/null")
    (tmp_path / "link").symlink_to(tmp_path / "map.json")
    assert "is a symbolic link" in map_refusal(key, tmp_path / "link")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert "may not be written" in map_refusal(key, tmp_path / "map.json")


def test_settings_table_names_every_setting() -> None:
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(EplbConfig.model_fields)
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


KEYS = st.sampled_from([*EplbConfig.model_fields, "init_redundancy_expert", "", "\n", 3, None, (1, 2)]) | st.text()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 70)
    | st.floats()
    | st.floats(0, 10)
    | st.text(st.characters())  # lone surrogates included
    | st.sampled_from(["true", "600", "all", "prefill", "observe", "gloo", "fast", "default", "a\nb", "x" * 5000])
    | st.sampled_from([-(10**400), b"bytes", object(), 1j, {1}, range(3)])
    | st.builds(Unprintable)
    | st.builds(lambda: 10**5000),  # Python refuses to print it
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=4,
)


def test_unprintable_values_are_shown_by_type() -> None:
    assert "num_redundant_experts = <int> is out of range" in refusal(
        {"eplb_config": {"num_redundant_experts": 10**5000}}
    )
    assert "mode = <Unprintable" in refusal({"eplb_config": {"mode": Unprintable()}})


def means(read: object, value: object) -> bool:
    """True if a setting was read as given: as the value, or as the number or boolean that a text spells."""
    if isinstance(read, bool):
        return str(value).strip().lower() in (("true", "t", "yes", "y", "on", "1") if read else FALSE)
    if isinstance(value, str) and isinstance(read, (int, float)):
        return float(value) == read
    if isinstance(value, str):
        return read == os.path.expanduser(value)
    return not isinstance(value, bool) and read == value


FALSE = ("false", "f", "no", "n", "off", "0")


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=2))
def test_any_dictionary_gives_settings_or_one_line(
    eplb_config: dict[object, object], around: dict[object, object]
) -> None:
    """A dictionary gives settings with the given values, or one error line. Settings of another EPLB alone give the
    defaults."""
    message = None
    try:
        config = EplbConfig.from_additional_config({**around, "eplb_config": eplb_config})
        serve(config)
    except EplbConfigError as error:
        message = str(error)
    if message is not None:
        assert message.isprintable()
        assert len(message) < 1500
        return
    if OF_OTHERS & eplb_config.keys():
        assert config == EplbConfig()
        return
    if says_off(eplb_config) and config == EplbConfig():
        return  # off: other settings are not read
    for key, value in eplb_config.items():
        assert means(getattr(config, str(key)), value)


def valid(name: str) -> st.SearchStrategy[object]:
    """Values that a field accepts, made from the constraints of the field."""
    field = EplbConfig.model_fields[name]
    low = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    high = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    kinds = {
        type(None): st.none(),
        bool: st.booleans(),
        str: st.text(st.characters(codec="ascii", exclude_characters="~"), min_size=1),
    }
    kinds[int] = st.integers(low or 0, high)
    kinds[float] = st.floats(low or 0.0, high) | st.just(low or 0)
    if name == "rank_speed":
        return st.none() | st.lists(st.floats(0.1, 10) | st.integers(1, 10), min_size=1, max_size=4)
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is not Literal else ()
    made = []
    for kind in choices or (field.annotation,):
        made.append(st.sampled_from(typing.get_args(kind)) if typing.get_origin(kind) is Literal else kinds[kind])
    return st.one_of(made)


VALID = st.fixed_dictionaries({}, optional={name: valid(name) for name in EplbConfig.model_fields})


@settings(max_examples=1000, deadline=None)
@given(VALID, st.data())
def test_one_bad_value_among_good_ones_is_named(good: dict[str, object], data: st.DataObject) -> None:
    """Good values are kept as given. If a bad value or an unknown key is added, the message names it."""
    config = parse(**good)
    for key, value in good.items():
        assert getattr(config, key) == value
    good["dynamic_eplb"] = True  # while off, nothing is refused
    key = data.draw(st.sampled_from(sorted(set(EplbConfig.model_fields) - {"dynamic_eplb"})))
    bad = data.draw(
        st.sampled_from([[], {}, {"a": 1}, b"x", object(), -1.5e308, float("nan"), 10**30, "", "\n\n", Unprintable()])
    )
    if key in ("expert_map_path", "expert_map_record_path", "calibration_path") and bad == "\n\n":
        return  # a valid file name
    message = refusal({"eplb_config": {**good, key: bad}})
    assert message.startswith(f"eplb_config.{key} = ")
    assert message.isprintable()
    unknown = data.draw(st.text(min_size=1).filter(lambda text: text not in EplbConfig.model_fields))
    assert refusal({"eplb_config": {**good, unknown: 1}}).isprintable()


@settings(max_examples=500, deadline=None)
@given(VALID, st.none() | st.integers(-3, 10**6), st.integers(-3, 10**5), st.booleans(), st.booleans())
def test_any_model_and_server_give_settings_or_one_line(
    good: dict[str, object], experts: int | None, ranks: int, expert_parallel: bool, vllm_eplb: bool
) -> None:
    message = "-"
    try:
        serve(parse(**good), experts, ranks, expert_parallel, vllm_eplb)
    except EplbConfigError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 1500


@pytest.mark.parametrize("depth", [100, 100_000])
def test_enormous_values_end_in_one_short_line(depth: int) -> None:
    nested: object = 1
    for _ in range(depth):
        nested = [nested]
    for value in (nested, "x" * depth, list(range(depth)), {str(i): i for i in range(depth)}):
        assert len(refusal({"eplb_config": {"num_redundant_experts": value}})) < 1500
        assert len(refusal({"eplb_config": value if not isinstance(value, dict) else {**value}})) < 1500


def test_settings_page_shows_this_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "settings.md").read_text(encoding="utf-8")
    assert settings_table() in page


def test_rank_speeds_are_checked() -> None:
    assert parse(rank_speed=[1, 0.5]).rank_speed == [1.0, 0.5]
    for value, wrong in (
        ([0.0], "not a list of such numbers"),
        ("1,2", "a string"),
        ([True], "not a list"),
        (2, "an integer"),
    ):
        message = refusal({"eplb_config": {"rank_speed": value}})
        assert message.startswith("eplb_config.rank_speed = ")
        assert wrong in message
        assert "allowed: list of numbers 0.1..10.0 | null; leave it out for the default, null" in message
    for chosen, wrong in (
        ({"rank_speed": [1, 1, 2]}, "has 3 numbers, the expert-parallel size is 2"),
        ({"rank_speed": [1, 2], "policy": "default"}, "together with the policy default"),
        ({"rank_speed": [1, 2], "weighted_dispatch": True}, "together with weighted_dispatch"),
    ):
        with pytest.raises(EplbConfigError, match=wrong):
            serve(parse(dynamic_eplb=True, **chosen), 8, 2)
    serve(parse(dynamic_eplb=True, rank_speed=[1, 2]), 8, 2)


def test_limits_reach_the_planner() -> None:
    """Every limit in the settings becomes the option of plan() that keeps it."""
    pytest.importorskip("torch")
    from vllm_ascend_eplb.balancer.lead import plan_options

    given = {
        "max_moves_per_cycle": 7, "max_moves_per_rank": 3, "max_moves_between_nodes": 2, "price_between_nodes": 4.0,
    }  # fmt: skip
    options = plan_options(parse(**given))
    assert (options.max_moves, options.max_moves_per_rank, options.max_moves_between_nodes) == (7, 3, 2)
    assert options.price_between_nodes == 4.0
