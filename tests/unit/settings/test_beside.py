# SPDX-License-Identifier: Apache-2.0
"""Settings outside ``eplb_config``: a misplaced key of ours is never ignored, a key of another program never refused.

Cases: the top level of ``additional_config`` (a setting, an old name, a misspelling, another case, a dot instead of a
brace); inside another key (``additional_config`` written twice, another plugin's table); ``eplb_config`` under another
name or without its switch; vLLM's own ``--enable-eplb`` and ``--eplb-config``. The environment variables of vllm-ascend
are in tests/unit/adaptors/test_ascend_config.py.
"""

from __future__ import annotations

import dataclasses
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ascend_eplb.settings.beside import COMMON_WORDS, OF_NEIGHBOURS, SHORT, misplaced
from vllm_ascend_eplb.settings.config import EplbConfig, remarks
from vllm_ascend_eplb.settings.fit import refuse_vllms_own
from vllm_ascend_eplb.settings.messages import (
    MOVED_INTO_EPLB_CONFIG,
    OF_OTHERS,
    OF_VLLM,
    RENAMED,
    WITHOUT_COUNTERPART,
    EplbConfigError,
)

ON = {"eplb_config": {"dynamic_eplb": True}}
LONG = sorted(name for name in {*EplbConfig.model_fields, *MOVED_INTO_EPLB_CONFIG} if len(name) > SHORT + 1)
COMMON = ("mode", "policy", "transport")


def refusal(additional_config: dict[object, object]) -> str:
    with pytest.raises(EplbConfigError) as caught:
        EplbConfig.from_additional_config(additional_config)
    assert str(caught.value).isprintable()
    return str(caught.value)


def target(name: str) -> str:
    return MOVED_INTO_EPLB_CONFIG.get(name, name)


@pytest.mark.parametrize("name", sorted({*EplbConfig.model_fields, *MOVED_INTO_EPLB_CONFIG}))
def test_own_key_at_top_level_is_refused(name: str) -> None:
    """Every setting and every old name is refused beside an eplb_config that turns the balancer on."""
    message = refusal({name: 50, **ON})
    assert f"additional_config.{name} " in message
    assert f'{{"eplb_config": {{"{target(name)}": 50}}}}' in message


SPELLINGS = [
    str.upper,
    lambda name: name.replace("_", "-"),
    lambda name: "--" + name,
    lambda name: "".join(word.capitalize() for word in name.split("_")),
    lambda name: f"eplb_config.{name}",
    lambda name: f"eplb.{name}",
    lambda name: f" {name} ",
]


@pytest.mark.parametrize("spelling", range(len(SPELLINGS)))
@pytest.mark.parametrize("name", ["num_redundant_experts", "min_gain", "dynamic_eplb", "weighted_dispatch"])
def test_own_key_in_other_spelling_is_refused(name: str, spelling: int) -> None:
    for around in (ON, {}):
        assert f'{{"eplb_config": {{"{name}": true}}}}' in refusal({SPELLINGS[spelling](name): True, **around})


def misspelt(name: str, rng: random.Random) -> str:
    """``name`` with one letter left out, doubled, replaced, or exchanged with the previous one."""
    at = rng.randrange(1, len(name) - 1)
    letter = rng.choice(string.ascii_lowercase)
    return rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + name[at] + name[at:],
            name[:at] + letter + name[at + 1 :],
            name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :],
        ]
    )


@pytest.mark.parametrize("name", LONG)
def test_misspelt_key_at_top_level_is_refused(name: str) -> None:
    rng = random.Random(name)
    for _ in range(30):
        message = refusal({misspelt(name, rng): 7, **ON})
        assert f'{{"eplb_config": {{"{target(name)}": 7}}}}' in message


@pytest.mark.parametrize("key", sorted({*OF_VLLM, *WITHOUT_COUNTERPART, *OF_OTHERS} - set(EplbConfig.model_fields)))
def test_setting_of_another_balancer_at_top_level_is_noticed(key: str) -> None:
    """Those of vLLM's and vllm-ascend's own EPLB. Common words are remarked on: another program may have them."""
    beside_ours = {key: 50, **ON}
    if key in COMMON_WORDS:
        assert EplbConfig.from_additional_config(beside_ours).active
        (line,) = remarks(beside_ours)
    else:
        line = refusal(beside_ours)
    assert f"additional_config.{key} is not read" in line
    for way_out in (
        OF_VLLM.get(key) or RENAMED.get(key),
        None if key == "enable_eplb" else WITHOUT_COUNTERPART.get(key),
    ):
        assert way_out is None or way_out in line
    if key != "enable_eplb":  # which turns a balancer on
        assert not EplbConfig.from_additional_config({key: 50}).active


@pytest.mark.parametrize("nothing", [None, False, "", "false", 0, [], {}])
def test_eplb_config_of_nothing_is_off(nothing: object) -> None:
    """As YAML writes a key without a value, which vllm-ascend 0.23.0.post1 takes, too."""
    assert not EplbConfig.from_additional_config({"eplb_config": nothing}).active
    assert remarks({"eplb_config": nothing}) == []


def test_misspelt_common_word_is_only_remarked_on() -> None:
    """Another program may have a key like ``model``, so balancing starts, with one log line."""
    for key, meant in (("modes", "mode"), ("polcy", "policy"), ("trasport", "transport")):
        given_settings = {key: "x", **ON}
        assert EplbConfig.from_additional_config(given_settings).active
        (line,) = remarks(given_settings)
        assert f'did you mean {{"eplb_config": {{"{meant}": "x"}}}}?' in line
    for key in COMMON:
        assert not EplbConfig.from_additional_config({key: "x"}).active
        assert remarks({key: "x"}) == []


NAMES = [
    "EPLB_CONFIG", "eplb-config", "eplbConfig", "EplbConfig", "eplb_cfg", "eplb", "eplb_conf", "elpb_config",
    "epbl_config", "eplb_confg", "eplb_configs", "eplb config", "--eplb-config", "eplb_settings", "ascend_eplb_config",
    "vllm_eplb_config", "eplb.config", "eplbconfig",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_misspelt_eplb_config_is_refused(name: str) -> None:
    for value in ({"dynamic_eplb": True}, {"num_redundant_experts": 2}, True, '{"dynamic_eplb": true}'):
        message = refusal({name: value})
        assert "the key is eplb_config" in message
        assert '{"eplb_config": {' in message
    assert "the key is eplb_config" in refusal({name: {"min_gain": 0.1}, **ON})


@pytest.mark.parametrize(
    "nested",
    [
        {"additional_config": ON},
        {"ascend_config": ON},
        {"scheduler_config": ON},
        {"parallel_config": {"deep": {"deeper": ON}}},
        {"additional_config": {"EPLB_config": {"dynamic_eplb": True}}},
        {"ascend_compilation_config": {"dynamic_eplb": True}},
        {"any": {"expert_heat_collection_interval": 400}, **ON},
        {"any": {"num_iterations_eplb_update": 400}},
        {"plugins": [{"name": "x"}, ON]},
        {"plugins": {"all": [[ON]]}},
        {"plugins": [{"expert_map_path": "m.json"}]},
    ],
)
def test_nested_settings_are_refused(nested: dict[object, object]) -> None:
    assert '{"eplb_config": {' in refusal(nested)


def test_eplb_config_inside_itself_is_refused() -> None:
    assert "the settings stand in it directly" in refusal({"eplb_config": ON})
    assert "the settings stand in it directly" in refusal({"eplb_config": {"additional_config": ON}})


def test_settings_without_the_switch_are_remarked_on() -> None:
    """vllm-ascend then starts with redundant experts that never move. We do the same and log it."""
    for inner in ({"num_redundant_experts": 2}, {"mode": "observe"}, {"eplb_policy_type": 1, "min_gain": 0}):
        (line,) = remarks({"eplb_config": inner})
        assert "EPLB is off" in line
        assert "not dynamic_eplb" in line
        assert all(name in line for name in inner)
    for silent in (None, {}, ON, {"eplb_config": {}}, {"eplb_config": {"num_redundant_experts": 2, "dynamic_eplb": 0}}):
        assert remarks(silent) == []


OFF = [False, "false", "False", 0, 0.0, "0", "off", "no"]


@pytest.mark.parametrize("off", OFF)
def test_balancer_that_is_off_checks_no_settings(off: object) -> None:
    """With the balancer off, no setting ends start-up and nothing is logged."""
    for given_settings in (
        {"eplb_config": {"dynamic_eplb": off}},
        {"eplb_config": {"dynamic_eplb": off, "unknown": 1, "num_redundant_experts": "x"}},
        {"eplb_config": {"dynamic_eplb": off}, "num_redundant_experts": 3, "eplb": {"dynamic_eplb": True}},
        {"eplb_config": {"dynamic_eplb": off, "expert_map_path": None, "expert_map_record_path": ""}},
        {"dynamic_eplb": off},
        {"eplb": {"dynamic_eplb": off}},
        {"additional_config": {"eplb_config": {"dynamic_eplb": off}}},
    ):
        assert not EplbConfig.from_additional_config(given_settings).active
        assert remarks(given_settings) == []
    assert EplbConfig.from_additional_config({"eplb_config": {"dynamic_eplb": off, "expert_map_path": "m"}}).active


@pytest.mark.parametrize("value", [1, True, "x", None, [], {"enabled": True, "mode": "dynamic", "policy": {"a": 1}}])
def test_keys_of_neighbours_pass(value: object) -> None:
    """Top-level keys of both vllm-ascend releases and of vLLM are accepted, alone and beside our settings."""
    assert {"enable_force_eplb", "refresh", "weight_nz_mode", "gdn_prefill_backend"} <= OF_NEIGHBOURS
    neighbours = dict.fromkeys(OF_NEIGHBOURS, value)
    assert EplbConfig.from_additional_config(neighbours) == EplbConfig()
    assert EplbConfig.from_additional_config({**neighbours, **ON}).active
    assert remarks({**neighbours, **ON}) == []


@pytest.mark.parametrize("key", ["enable_force_epbl", "schedular_config", "mix_placment", "my_plugin", "telemetry", ""])
def test_keys_of_strangers_pass(key: str) -> None:
    assert EplbConfig.from_additional_config({key: {"level": 3}, **ON}).active
    assert remarks({key: {"level": 3}, **ON}) == []


@dataclasses.dataclass
class EPLBConfig:
    """Stands in for vLLM's class of this name: the same names and defaults."""

    window_size: int = 1000
    step_interval: int = 3000
    num_redundant_experts: int = 0
    log_balancedness: bool = False
    use_async: bool = True
    communicator: str | None = None


@pytest.mark.parametrize(
    ("left", "line"),
    [
        ({"num_redundant_experts": 2}, '{"eplb_config": {"dynamic_eplb": true, "num_redundant_experts": 2}}'),
        ({"step_interval": 50}, '{"eplb_config": {"dynamic_eplb": true, "expert_heat_collection_interval": 50}}'),
        ({"window_size": 5, "use_async": False}, "--eplb-config sets use_async, window_size"),
    ],
)
def test_vllms_own_settings_beside_ours_are_refused(left: dict[str, object], line: str) -> None:
    config = EplbConfig.from_additional_config(ON)
    for made in (EPLBConfig(**left), left):  # type: ignore[arg-type]
        with pytest.raises(EplbConfigError) as caught:
            refuse_vllms_own(config, False, made)
        assert line in str(caught.value)
        assert "leave out --eplb-config" in str(caught.value)
        refuse_vllms_own(EplbConfig(), True, made)  # accepted while our balancer is off
    for nothing in (EPLBConfig(), None, {}):
        refuse_vllms_own(config, False, nothing)
    with pytest.raises(EplbConfigError, match="leave out --enable-eplb"):
        refuse_vllms_own(config, True, EPLBConfig())


KEYS = (
    st.sampled_from([*EplbConfig.model_fields, *MOVED_INTO_EPLB_CONFIG, *OF_VLLM, *NAMES, *sorted(OF_NEIGHBOURS)])
    | st.text()
)
TABLES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats() | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers() | st.none(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(KEYS | st.integers(), TABLES, max_size=4), st.booleans())
def test_any_neighbours_give_settings_or_one_line(around: dict[object, object], on: bool) -> None:
    """Random tables beside eplb_config give settings, or one printable line of bounded length. After the misplaced keys
    are removed, the table is accepted."""
    table = {**around, **(ON if on else {})}
    for _ in range(len(table) + 1):
        try:
            config = EplbConfig.from_additional_config(table)
        except EplbConfigError as error:
            line = str(error)
            assert line.isprintable()
            assert len(line) < 1500
            guilty = [
                key
                for key, value in table.items()
                if key != "eplb_config" and any(misplaced({key: value}, EplbConfig.model_fields))
            ]
            if not guilty:
                assert "eplb_config" in table
                return
            table = {key: value for key, value in table.items() if key not in guilty}
            continue
        assert config.active or not on or around.get("eplb_config") is not None
        assert all(line.isprintable() for line in remarks(table))
        return
    raise AssertionError("the table is refused although all misplaced keys were removed")
