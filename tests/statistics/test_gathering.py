"""What several processes measured, each on its share: together it is what one process would have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.covariance import Covariance, LowRankCovariance
from peft_many.algebra.sketch import CovarianceAccumulator, CovarianceSketch
from peft_many.files.processes import ALONE, Processes
from peft_many.files.statistics import InputStatistics
from peft_many.statistics.features import MOST_KEPT, PooledFeatures, gather_features
from peft_many.statistics.gathering import gather_inputs
from peft_many.statistics.inputs import MeasuredInputs
from peft_many.statistics.instructions import InstructionHook
from tests import tiny
from tests.algebra.problems import relative_error, seeds
from tests.files.test_processes import in_processes

WIDTH = 6
QKV, DOWN = ("q", "k", "v"), ("down",)


def rows(seed: int, count: int, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def whole(inputs: Tensor) -> Covariance:
    accumulator = CovarianceAccumulator(inputs.shape[1])
    accumulator.update(inputs)
    return accumulator.result()


def sketched(inputs: Tensor, size: int = 4) -> Covariance:
    sketch = CovarianceSketch(inputs.shape[1], size)
    sketch.update(inputs)
    return sketch.result()


def measured(groups: Mapping[tuple[str, ...], Tensor], measure=whole) -> MeasuredInputs:
    """What was measured of each group of layers that share an input."""
    inputs = {names[0]: InputStatistics(measure(rows_), len(rows_)) for names, rows_ in groups.items()}
    return MeasuredInputs(inputs, {name: names[0] for names in groups for name in names})


def as_it_is(covariance: Covariance, names: list[str]) -> Covariance:
    return covariance


def by_layer(found: MeasuredInputs) -> dict[str, InputStatistics]:
    """What each layer reads; layers that share an input have one object."""
    assert all(found.input_of[key] == key for key in found.inputs)
    return {name: found.inputs[key] for name, key in found.input_of.items()}


def gathered(parts: Sequence[MeasuredInputs], finish=as_it_is) -> list[dict[str, InputStatistics]]:
    """What every process has in the end."""

    def gather(all_: Processes) -> dict[str, InputStatistics]:
        return by_layer(gather_inputs(parts[all_.index], finish, all_))

    return in_processes(len(parts), gather)


def groups_of(found: Mapping[str, InputStatistics]) -> list[list[str]]:
    return [[name for name in found if found[name] is one] for one in {id(c): c for c in found.values()}.values()]


def assert_same(found: Mapping[str, InputStatistics], whole_: MeasuredInputs, tolerance: float = 1e-12) -> None:
    expected = by_layer(whole_)
    assert list(found) == list(expected)
    for name, one in expected.items():
        assert found[name].tokens == one.tokens
        assert relative_error(found[name].covariance.dense(), one.covariance.dense()) < tolerance
    assert groups_of(found) == groups_of(expected)


def test_alone_one_keeps_what_one_found():
    found = measured({QKV: rows(0, 9), DOWN: rows(1, 9, 4)})
    assert gather_inputs(found, as_it_is, ALONE) == found


@given(seeds, st.lists(st.integers(0, 12), min_size=2, max_size=3).filter(any))
def test_the_sum_over_processes_is_that_of_one_process(seed, shares):
    """Whatever share of the tokens each has, none included."""
    inputs = {QKV: rows(seed, sum(shares)), DOWN: rows(seed + 1, sum(shares), 4)}
    split = {names: whole_.split(shares) for names, whole_ in inputs.items()}
    parts = [measured({names: pieces[i] for names, pieces in split.items()}) for i in range(len(shares))]
    expected = measured(inputs)
    for result in gathered(parts):
        assert_same(result, expected)


@pytest.mark.parametrize("shares", [(3, 4), (4, 0), (2, 2, 2)])
def test_sums_of_sketches_are_exact_as_long_as_each_is(shares):
    """A sketch keeps its first tokens as they are; the factors are stacked, in float32."""
    inputs = rows(0, sum(shares), 9)
    parts = [measured({QKV: part}, sketched) for part in inputs.split(shares)]
    for result in gathered(parts):
        assert isinstance(result["q"].covariance, LowRankCovariance)
        assert_same(result, measured({QKV: inputs}), 1e-6)


def test_sketches_that_dropped_directions_keep_the_trace():
    inputs = rows(0, 40, 9) * torch.logspace(0, -2, 9)
    parts = [measured({QKV: part}, sketched) for part in inputs.split((30, 10))]
    for result in gathered(parts):
        assert abs(result["q"].covariance.trace / whole(inputs).trace - 1) < 1e-6
        assert relative_error(result["q"].covariance.dense(), whole(inputs).dense()) < 0.05


def test_every_process_holds_the_same_to_the_bit():
    parts = [measured({QKV: rows(i, 5 + i)}) for i in range(3)]
    first, *others = gathered(parts)
    for other in others:
        assert torch.equal(other["q"].covariance.dense(), first["q"].covariance.dense())


def test_what_is_kept_is_made_once_of_each_sum():
    made: list[tuple[str, ...]] = []

    def finish(covariance: Covariance, names: list[str]) -> Covariance:
        made.append(tuple(names))
        return covariance.with_ridge(1.0)

    found = measured({QKV: rows(0, 5), DOWN: rows(1, 5, 4)})
    result = by_layer(gather_inputs(found, finish, ALONE))
    assert made == [QKV, DOWN]
    assert result["q"] is result["v"]
    assert result["q"].covariance.trace == pytest.approx(2 * found.inputs["q"].covariance.trace)
    for result in gathered([found, measured({QKV: rows(2, 2), DOWN: rows(3, 2, 4)})], finish):
        assert result["down"].tokens == 7
        assert result["down"].covariance.trace == pytest.approx(result["down"].covariance.remainder * 4 * 2)
    assert sorted(made[2:]) == [DOWN] * 2 + [QKV] * 2


# ------------------------------------------------------------------------------------------------- shared inputs


def test_layers_that_share_their_input_everywhere_share_one_object():
    parts = [measured({QKV: rows(i, 4), ("o",): rows(9 + i, 4)}) for i in range(2)]
    for result in gathered(parts):
        assert groups_of(result) == [["q", "k", "v"], ["o"]]


def test_the_order_of_the_layers_is_kept():
    inputs = {"q": InputStatistics(whole(rows(0, 4)), 4), "o": InputStatistics(whole(rows(1, 4)), 4)}
    found = MeasuredInputs(inputs, {"q": "q", "o": "o", "k": "q"})
    assert list(gather_inputs(found, as_it_is, ALONE).input_of) == ["q", "o", "k"]
    for result in gathered([found, found]):
        assert list(result) == ["q", "o", "k"]
        assert groups_of(result) == [["q", "k"], ["o"]]


def test_layers_that_share_their_input_in_one_process_only_are_kept_apart():
    one, other = rows(0, 4), rows(1, 4)
    parts = [measured({QKV: one}), measured({("q", "k"): other, ("v",): rows(2, 4)})]
    for result in gathered(parts):
        assert groups_of(result) == [["q", "k"], ["v"]]
        assert relative_error(result["k"].covariance.dense(), whole(torch.cat([one, other])).dense()) < 1e-12
        assert relative_error(result["v"].covariance.dense(), whole(torch.cat([one, rows(2, 4)])).dense()) < 1e-12


def test_a_process_that_saw_no_token_does_not_part_layers():
    """There every layer has an empty covariance of its own, as nothing arrived that they could share."""
    nothing = torch.zeros(0, WIDTH)
    unseen = measured({(name,): nothing for name in QKV})
    for parts in ([measured({QKV: rows(0, 4)}), unseen], [unseen, measured({QKV: rows(0, 4)}), unseen], [unseen] * 2):
        seen = any(part.inputs["q"].tokens for part in parts)
        for result in gathered(parts):
            assert [result[name].tokens for name in QKV] == [4 if seen else 0] * 3
            assert groups_of(result) == ([["q", "k", "v"]] if seen else [["q"], ["k"], ["v"]])


def test_layers_that_only_one_process_reached():
    """As the experts of a mixture: some tokens here, none there, and some nowhere."""
    first, second = rows(0, 3), rows(1, 5)
    nothing = torch.zeros(0, WIDTH)
    parts = [
        measured({("both",): first, ("here",): first[:2], ("there",): nothing, ("nowhere",): nothing}),
        measured({("both",): second, ("here",): nothing, ("there",): second[:1], ("nowhere",): nothing}),
    ]
    expected = measured(
        {
            ("both",): torch.cat([first, second]),
            ("here",): first[:2],
            ("there",): second[:1],
            ("nowhere",): nothing,
        }
    )
    for result in gathered(parts):
        assert [result[name].tokens for name in ("both", "here", "there", "nowhere")] == [8, 2, 1, 0]
        assert groups_of(result) == [["both"], ["here"], ["there"], ["nowhere"]]
        for name in ("both", "here", "there"):
            assert relative_error(result[name].covariance.dense(), expected.inputs[name].covariance.dense()) < 1e-12
        assert not result["nowhere"].covariance.dense().any()


@pytest.mark.parametrize("measure", [whole, sketched])
def test_layers_of_several_widths_that_no_process_reached(measure):
    widths = {"a": 9, "b": 5, "c": 9}
    part = measured({(name,): torch.zeros(0, width) for name, width in widths.items()}, measure)
    for result in gathered([part, part, part]):
        assert {name: one.covariance.width for name, one in result.items()} == widths
        assert [one.tokens for one in result.values()] == [0, 0, 0]
        assert not any(one.covariance.dense().any() for one in result.values())
        assert len(groups_of(result)) == 3


def test_a_layer_that_another_process_does_not_know():
    """A process whose batches were none has no hooks that fired, and knows no input at all."""
    inputs = rows(0, 4)
    for parts in ([measured({QKV: inputs}), measured({})], [measured({}), measured({QKV: inputs})]):
        for result in gathered(parts):
            assert_same(result, measured({QKV: inputs}))
    assert gathered([measured({})] * 2) == [{}, {}]


# ---------------------------------------------------------------------------------------------------- prototypes


def seen(**features: Tensor) -> dict[str, PooledFeatures]:
    found = {}
    for name, rows_ in features.items():
        found[name] = PooledFeatures(torch.zeros(rows_.shape[1], dtype=torch.float64))
        for part in rows_.split(3):
            found[name].add(part)
    return found


def test_alone_a_prototype_is_the_mean():
    features = rows(0, 7)
    found = gather_features(seen(projector=features), ALONE)["projector"]
    assert found.count == 7
    assert found.prototype.dtype == torch.float32
    torch.testing.assert_close(found.prototype, features.double().mean(0).float(), atol=0, rtol=0)
    assert relative_error(found.spread.dense(), torch.cov(features.double().T)) < 1e-2
    assert gather_features({}, ALONE) == {}


@given(seeds, st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_images_are_those_of_all_processes(seed, shares):
    features = rows(seed, sum(shares))
    parts = [seen(projector=part) for part in features.split(shares)]
    expected = gather_features(seen(projector=features), ALONE)["projector"]
    for result in in_processes(len(parts), lambda all_: gather_features(parts[all_.index], all_)):
        found = result["projector"]
        assert found.count == sum(shares)
        torch.testing.assert_close(found.prototype, features.double().mean(0).float(), atol=1e-6, rtol=1e-6)
        assert torch.equal(found.spread.factor, expected.spread.factor)


def test_a_projector_that_only_one_process_reached():
    here, there = rows(0, 2), rows(1, 3, 4)
    parts = [seen(one=here), seen(one=rows(2, 4), two=there), {}]
    for found in in_processes(3, lambda all_: gather_features(parts[all_.index], all_)):
        assert list(found) == ["one", "two"]
        assert [found[name].count for name in found] == [6, 3]
        torch.testing.assert_close(found["two"].prototype, there.mean(0))
        torch.testing.assert_close(found["one"].prototype, torch.cat([here, rows(2, 4)]).mean(0))


def test_a_single_image_has_no_spread():
    assert gather_features(seen(projector=rows(0, 1)), ALONE)["projector"].spread is None


def test_features_are_kept_of_a_bounded_number_of_images():
    features = rows(0, MOST_KEPT + 5, 2)
    found = seen(projector=features)
    assert sum(len(part) for part in found["projector"].kept) == MOST_KEPT
    gathered_ = gather_features(found, ALONE)["projector"]
    assert gathered_.count == MOST_KEPT + 5
    torch.testing.assert_close(gathered_.prototype, features.mean(0))


def test_instructions_of_a_batch_that_another_process_lent_are_read_but_not_counted():
    """Sharded embeddings take all processes, but the batch was counted where it is from."""
    model = tiny.build_text("llama")
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    read = []
    model.get_input_embeddings().register_forward_hook(lambda *_: read.append(1))
    with InstructionHook(model) as hook, torch.no_grad():
        for hook.counts in (True, False):
            model(**batch)
    assert hook.result()["instructions"].count == 2
    assert len(read) == 4
