"""Routing weights and pooling against their definitions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.routing import pool_segments, routing_weights
from tests.algebra.problems import seeds


@given(seeds, st.integers(1, 5), st.integers(1, 4), st.floats(0.01, 1.0))
def test_weights_are_the_softmax_of_centred_cosines(seed, tasks, images, temperature):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 6, generator=generator) + 5
    prototypes = torch.randn(tasks, 6, generator=generator) + 5
    weights = routing_weights(features, prototypes, temperature)
    centre = prototypes.double().mean(0)
    for i in range(images):
        scores = []
        for t in range(tasks):
            a, b = features[i].double() - centre, prototypes[t].double() - centre
            scores.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-8)) / temperature)
        expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
        assert torch.allclose(weights[i].double(), expected, atol=1e-5 / temperature)


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
