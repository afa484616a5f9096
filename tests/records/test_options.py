"""The options of a merge: each is checked, described and read back, and inherited where merges agree."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many import MergeOptions, merge_adapter_files, merge_adapter_sequence, plan_merge
from peft_many.methods import METHODS, RegMean, Ties
from peft_many.methods.base import ForeignMethod
from peft_many.records.values import DTYPES

NAMES = [option.name for option in dataclasses.fields(MergeOptions)]

POSITIVE = st.floats(1e-6, 1e6)
LPM = st.builds(
    MergeOptions,
    ridge=st.none() | st.floats(0, 1),
    router=st.just("gaussian"),
    temperature=st.none() | POSITIVE,
    top_k=st.none() | st.integers(1, 9),
    abstain_above=st.none() | POSITIVE,
    rank=st.none() | st.integers(1, 999),
    gate_lora=st.sampled_from([None, False]),
    dtype=st.sampled_from(list(DTYPES.values())),
)
OTHERS = st.builds(
    MergeOptions,
    method=st.sampled_from([*METHODS, Ties(density=0.3), RegMean(alpha=0.5)]),
    projectors=st.sampled_from(["routed", "mean"]),
)


@given(LPM | OTHERS)
def test_what_is_described_as_json_is_read_back(options):
    assert MergeOptions.read(json.loads(json.dumps(options.describe()))) == options


@given(LPM | OTHERS | st.just(MergeOptions()))
def test_filling_in_leaves_what_was_given_and_a_second_time_changes_nothing(options):
    whole = options.filled_in([])
    assert whole.filled_in([]) == whole
    for name in NAMES:
        given_value = getattr(options, name)
        assert given_value is None or getattr(whole, name) == given_value


def test_defaults():
    whole = MergeOptions().filled_in([])
    assert (whole.ridge, whole.router, whole.temperature, whole.gate_lora) == (1e-4, "cosine", 0.02, False)
    assert MergeOptions(router="gaussian").filled_in([]).temperature == 1.0
    assert MergeOptions(method="ties").filled_in([]).ridge is None
    assert MergeOptions(projectors="mean").filled_in([]).router is None


def test_merges_hand_down_what_they_agree_on():
    one = MergeOptions(ridge=1e-3, top_k=2, temperature=0.5).filled_in([])
    two = MergeOptions(ridge=1e-5, top_k=2, temperature=0.5).filled_in([])
    both = MergeOptions().filled_in([one, two])
    assert (both.ridge, both.top_k, both.temperature) == (1e-4, 2, 0.5)
    assert MergeOptions().filled_in([one]).ridge == 1e-3
    assert MergeOptions(ridge=0.0).filled_in([one]).ridge == 0.0
    assert MergeOptions(method="ties").filled_in([one]).ridge is None
    # Distances of one router mean nothing to another.
    assert MergeOptions(router="gaussian").filled_in([one]).temperature == 1.0
    gated = MergeOptions(gate_lora=True).filled_in([])
    assert MergeOptions().filled_in([gated]).gate_lora is True
    assert MergeOptions(method="average").filled_in([gated]).gate_lora is False
    assert MergeOptions(projectors="mean").filled_in([gated]).gate_lora is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"projectors": "both"}, "`projectors` must be one of 'routed', 'mean'"),
        ({"ridge": -1.0}, "`ridge` must be finite and not negative"),
        ({"ridge": float("nan")}, "`ridge` must be finite"),
        ({"ridge": 1e-4, "method": "ties"}, "`ridge` is an option of the method 'lpm', not of 'ties'"),
        ({"router": "magic"}, "`router` must be one of"),
        ({"router": "cosine", "projectors": "mean"}, "`router` is an option of routed projectors"),
        ({"gate_lora": True, "projectors": "mean"}, "`gate_lora` is an option of routed projectors"),
        ({"gate_lora": True, "method": "ties"}, "`gate_lora` is an option of the method 'lpm'"),
        ({"gate_lora": True, "rank": 4}, "a `rank` cannot be given"),
        ({"gate_lora": 1}, "`gate_lora` must be True or False"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"abstain_above": 1.0, "router": "cosine"}, "needs distances, which `router='cosine'` has none of"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"rank": 1.5}, "`rank` must be a whole number"),
        ({"rank": True}, "`rank` must be a whole number"),
        ({"dtype": torch.int8}, "`dtype` must be one of"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MergeOptions(**options)


def test_abstaining_needs_the_gaussian_router_whoever_chose_the_other():
    with pytest.raises(ValueError, match="needs distances, which `router='cosine'` has none of"):
        MergeOptions(abstain_above=2.0).filled_in([])


def test_unknown_methods_are_read_from_records_only():
    described = {"method": {"name": "mine", "source": "a paper", "x": 1}}
    with pytest.raises(ValueError, match="`method` must be one of"):
        MergeOptions.read(described)
    method = MergeOptions.read(described, foreign=True).merge_method
    assert isinstance(method, ForeignMethod)
    assert method.describe() == described["method"]
    with pytest.raises(ValueError, match="'mine' is not one of peft_many's"):
        method.merge([])


@pytest.mark.parametrize("function", [merge_adapter_sequence, merge_adapter_files, plan_merge])
def test_functions_show_and_take_every_option(function):
    parameters = inspect.signature(function).parameters
    assert set(NAMES) <= set(parameters)
    assert "options" not in parameters
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'rigde'"):
        function(None, [], rigde=1e-4)


def test_every_option_is_documented():
    for name in NAMES:
        assert f"{name} (`" in MergeOptions.__doc__
