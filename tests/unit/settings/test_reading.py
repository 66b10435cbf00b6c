# SPDX-License-Identifier: Apache-2.0
"""Settings accept the forms of values that vLLM and vllm-ascend accept; for other forms the error says what to write.

Cases, by type of setting: booleans as words and as 0 and 1 (vllm-ascend's own tests write ``"true"``); numbers as text
(YAML reads ``1e-2`` as a string) and as integral floats; scalars of NumPy and torch; paths as ``Path`` and with ``~``
or ``$HOME``.
"""

from __future__ import annotations

import enum
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from vllm_ascend_eplb.files.expert_map import write_expert_map
from vllm_ascend_eplb.settings.config import EplbConfig
from vllm_ascend_eplb.settings.fit import ModelShape, ServerShape, fit
from vllm_ascend_eplb.settings.messages import EplbConfigError, base_type
from vllm_ascend_eplb.values.placement import Placement


def parse(**eplb_config: object) -> EplbConfig:
    return EplbConfig.from_additional_config({"eplb_config": {"dynamic_eplb": True, **eplb_config}})


WORDS = ["true", "True", "TRUE", "t", "yes", "y", "on", "1", "false", "False", "f", "no", "N", "off", "0"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", sorted(n for n, f in EplbConfig.model_fields.items() if base_type(f) is bool))
def test_words_for_booleans_are_read_as_pydantic_does(name: str, word: str) -> None:
    """pydantic, with which vllm-ascend 0.30 reads its settings, is the reference."""
    expected = TypeAdapter(bool).validate_python(word)
    assert getattr(EplbConfig.from_additional_config({"eplb_config": {name: word}}), name) is expected


class Whole(int):
    """A number as YAML readers make it that keep how it was written."""


class Part(float):
    """The same with a decimal point."""


@pytest.mark.parametrize("value", [1, 0, 1.0, 0.0, Whole(1), Whole(0), np.bool_(True), np.bool_(False), np.array(True)])
def test_numbers_for_booleans(value: object) -> None:
    assert parse(weighted_dispatch=value).weighted_dispatch is bool(value)


INTEGERS = [
    "600",
    " 600 ",
    "+600",
    600.0,
    "600.0",
    "6e2",
    np.int64(600),
    np.float32(600),
    np.array(600),
    np.uint16(600),
    Whole(600),
    Part(600),
    Decimal(600),
]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
@pytest.mark.parametrize(
    "name", ["expert_heat_collection_interval", "num_redundant_experts", "max_moves_per_cycle", "audit_interval"]
)
def test_every_form_of_an_integer_is_read(name: str, value: object) -> None:
    read = getattr(parse(**{name: value}), name)
    assert read == 600
    assert type(read) is int


NUMBERS = [
    "1e-2",
    "0.01",
    ".01",
    "1.0E-02",
    np.float32(0.01),
    np.float64(0.01),
    np.array(0.01),
    Part(0.01),
    Decimal("0.01"),
    0.01,
]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_every_form_of_a_number_is_read(value: object) -> None:
    assert parse(min_gain=value).min_gain == pytest.approx(0.01)
    assert parse(rank_speed=[1, value if float(value) > 0.1 else "1.0"]).rank_speed == [1.0, 1.0]  # type: ignore[arg-type]


def test_torch_scalars_and_arrays_are_read() -> None:
    torch = pytest.importorskip("torch")
    assert parse(num_redundant_experts=torch.tensor(4)).num_redundant_experts == 4
    assert parse(min_gain=torch.tensor(0.5)).min_gain == 0.5
    assert parse(rank_speed=np.array([1, 2])).rank_speed == [1.0, 2.0]
    assert parse(rank_speed=torch.tensor([1.0, 2.0])).rank_speed == [1.0, 2.0]
    assert parse(rank_speed=(1, "2")).rank_speed == [1.0, 2.0]


class Stage(str, enum.Enum):
    PREFILL = "prefill"


def test_choices_may_be_enums_and_numpy_text() -> None:
    assert parse(eplb_heat_collection_stage=Stage.PREFILL).eplb_heat_collection_stage == "prefill"
    assert parse(mode=np.str_("observe")).mode == "observe"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_redundant_experts", True),
        ("num_redundant_experts", 2.5),
        ("num_redundant_experts", "2.5"),
        ("num_redundant_experts", "1_000"),
        ("num_redundant_experts", "0x10"),
        ("num_redundant_experts", "٣"),
        ("num_redundant_experts", "nan"),
        ("num_redundant_experts", "1" * 5000),
        ("min_gain", "nan"),
        ("min_gain", "inf"),
        ("min_gain", "1e999"),
        ("min_gain", True),
        ("min_gain", "1,5"),
        ("weighted_dispatch", 2),
        ("weighted_dispatch", 0.5),
        ("weighted_dispatch", "maybe"),
        ("weighted_dispatch", np.array([True])),
        ("rank_speed", "1,2"),
        ("expert_map_path", b"map.json"),
        ("expert_map_path", 3),
        ("mode", Stage),
    ],
)
def test_ambiguous_value_is_refused(name: str, value: object) -> None:
    """Negative control: not every form is accepted."""
    with pytest.raises(EplbConfigError) as caught:
        parse(**{name: value})
    assert str(caught.value).startswith(f"eplb_config.{name} = ")
    assert "; allowed: " in str(caught.value)


def test_text_is_read_as_pydantic_reads_it() -> None:
    for text in ("1", "0", "12", "1e1", "0.5", "10.0", "-1", "1e-2", "", "a", "00", "1.", "+2"):
        for name, kind in (("audit_interval", int), ("min_gain", float)):
            try:
                expected = TypeAdapter(kind).validate_python(text)
            except ValidationError:
                expected = None
            try:
                read = getattr(parse(**{name: text}), name)
            except EplbConfigError:
                continue
            assert expected is None or read == expected


def test_paths_may_be_objects_and_have_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_expert_map(tmp_path / "map.json", Placement.initial(2, 8, 2, 2))
    for value in (tmp_path / "map.json", Path("~/map.json"), "~/map.json"):
        config = EplbConfig.from_additional_config({"eplb_config": {"expert_map_path": value}})
        assert config.expert_map_path == os.fspath(tmp_path / "map.json")
        assert fit(config, ModelShape(8), ServerShape(2)) == 2
    assert parse(expert_map_record_path="~/out.json").expert_map_record_path == str(tmp_path / "out.json")
    assert parse(calibration_path="~/cost.json").calibration_path == str(tmp_path / "cost.json")


@pytest.mark.parametrize("variable", ["$HOME", "${HOME}", "$NOT_SET_ANYWHERE"])
@pytest.mark.parametrize("name", ["expert_map_path", "expert_map_record_path"])
def test_variable_in_a_path_is_named(name: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    with pytest.raises(EplbConfigError) as caught:
        fit(parse(**{name: f"{variable}/maps/map.json"}), ModelShape(8), ServerShape(2))
    line = str(caught.value)
    assert f"{variable} was not replaced, write " in line
    assert ("/home/somebody" in line) == ("HOME" in variable)
