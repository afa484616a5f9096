"""Routing weights and pooling against their definitions."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.routing import NEGLIGIBLE_WEIGHT, pool_segments, routing_weights
from tests.algebra.problems import seeds

top_ks = st.none() | st.integers(1, 8)


def make_problem(seed: int, tasks: int, images: int) -> tuple[Tensor, Tensor]:
    """Features and prototypes with a common part."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 6, generator=generator) + 5, torch.randn(tasks, 6, generator=generator) + 5


def softmax_of_cosines(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """The definition, in float64."""
    centre = prototypes.double().mean(0)
    a, b = features.double() - centre, prototypes.double() - centre
    return (torch.cosine_similarity(a[:, None], b[None], dim=-1) / temperature).softmax(-1)


@given(seeds, st.integers(1, 6), st.integers(1, 4), st.floats(0.05, 1.0))
def test_weights_are_the_softmax_of_centred_cosines(seed, tasks, images, temperature):
    features, prototypes = make_problem(seed, tasks, images)
    expected = softmax_of_cosines(features, prototypes, temperature)
    assert torch.allclose(routing_weights(features, prototypes, temperature).double(), expected, atol=1e-5)


@given(seeds, st.integers(1, 6), st.integers(0, 4), st.floats(0.005, 1.0), top_ks)
def test_rows_sum_to_one_and_at_most_k_are_not_zero(seed, tasks, images, temperature, top_k):
    weights = routing_weights(*make_problem(seed, tasks, images), temperature, top_k)
    assert weights.shape == (images, tasks)
    assert (weights >= 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(images), atol=1e-6)
    assert ((weights > 0).sum(1) <= (top_k or tasks)).all()


@given(seeds, st.integers(2, 6), st.floats(0.05, 1.0), st.integers(1, 6))
def test_the_largest_weights_are_kept_in_proportion(seed, tasks, temperature, top_k):
    features, prototypes = make_problem(seed, tasks, 3)
    every, few = (routing_weights(features, prototypes, temperature, k) for k in (None, top_k))
    for all_of_image, kept_of_image in zip(every, few):
        largest = all_of_image.sort(descending=True).values[:top_k]
        kept = kept_of_image.sort(descending=True).values[:top_k]
        assert torch.allclose(kept, largest / largest.sum(), atol=1e-6)


@given(seeds, st.permutations(range(5)), st.floats(0.05, 1.0), top_ks)
def test_the_order_of_the_tasks_does_not_matter(seed, order, temperature, top_k):
    features, prototypes = make_problem(seed, 5, 3)
    every = softmax_of_cosines(features, prototypes, temperature).sort(1).values
    assume(every.diff(dim=1).min() > 1e-5)  # ties go by the order
    weights = routing_weights(features, prototypes, temperature, top_k)
    permuted = routing_weights(features, prototypes[order], temperature, top_k)
    assert torch.allclose(permuted, weights[:, order], atol=1e-5)


@pytest.mark.parametrize("tasks", [9, 17])
@pytest.mark.parametrize("images", [1, 3, 9, 40])
def test_of_equal_tasks_the_first_is_taken(tasks, images):
    # Tasks that ask different things about the same pictures have equal prototypes.
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(tasks, 1000, generator=generator)
    equal = [1, tasks // 2, tasks - 2, tasks - 1]
    prototypes[equal] = prototypes[1].clone()
    features = prototypes[1] + 0.1 * torch.randn(images, 1000, generator=generator)
    for top_k in (1, 2, 3):
        weights = routing_weights(features, prototypes, 0.05, top_k)
        expected = torch.zeros(tasks).index_fill_(0, torch.tensor(equal[:top_k]), 1 / top_k)
        assert torch.allclose(weights, expected.expand(images, -1), atol=1e-6)


def test_negligible_weights_are_exactly_zero():
    features, prototypes = make_problem(0, 6, 50)
    expected = softmax_of_cosines(features, prototypes, 0.1)
    weights = routing_weights(features, prototypes, 0.1)
    clear = (expected / NEGLIGIBLE_WEIGHT - 1).abs() > 0.01
    assert torch.equal((weights == 0)[clear], (expected < NEGLIGIBLE_WEIGHT)[clear])
    small = (expected > NEGLIGIBLE_WEIGHT) & (expected < 100 * NEGLIGIBLE_WEIGHT)
    assert (weights == 0).any()
    assert (small & clear).any()


def test_a_prototype_at_the_centre_is_like_nothing():
    prototypes = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    weights = routing_weights(torch.tensor([[2.0, 5.0]]), prototypes, 1.0)
    cosine = 1 / 26**0.5
    assert torch.allclose(weights, torch.tensor([[cosine, 0.0, -cosine]]).softmax(1), atol=1e-6)


def test_autocast_does_not_round_the_similarities():
    features, prototypes = make_problem(0, 6, 4)
    expected = routing_weights(features, prototypes, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(routing_weights(features, prototypes, 0.02), expected)


def test_a_prototype_itself_routes_to_its_task_and_one_task_takes_all():
    prototypes = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) + 10
    weights = routing_weights(prototypes, prototypes, 0.05)
    assert (weights.diagonal() > 0.99).all()
    assert torch.equal(routing_weights(prototypes, prototypes[:1], 0.05), torch.ones(4, 1))


def test_routing_is_float32_whatever_comes_in():
    features, prototypes = torch.randn(2, 8).bfloat16(), torch.randn(3, 8)
    assert routing_weights(features, prototypes, 0.05).dtype == torch.float32


@given(seeds, st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_segments_are_pooled_as_if_alone(seed, lengths):
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    pooled = pool_segments(rows, torch.tensor(lengths))
    for part, mean in zip(rows.split(lengths), pooled):
        assert torch.allclose(part.mean(0), mean, atol=1e-6)
