"""The metric of images: against dense inverses, and what it is for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.routing import routing_weights
from peft_many.algebra.spread import centred, new_distances, shared_metric
from tests.algebra.problems import relative_error, seeds

WIDTH = 12


def tasks_of(seed, tasks=3, images=40):
    """Images that differ a lot along one direction, whatever the task, and little along those that tell them apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    common, loud = normal(WIDTH), 10 * normal(WIDTH)
    means = common + 0.3 * normal(tasks, WIDTH)
    return means, [mean + normal(images, 1) * loud + 0.05 * normal(images, WIDTH) for mean in means]


def shrunk(rows):
    """OAS from its definition: the dense pooled covariance, and equation 23 of the paper."""
    images = sum(len(part) for part in rows)
    S = sum(len(part) / images * torch.cov(part.double().T) for part in rows)
    square, trace = (S @ S).trace(), S.trace()
    share = ((1 - 2 / WIDTH) * square + trace**2) / ((images + 1 - 2 / WIDTH) * (square - trace**2 / WIDTH))
    share = share.clamp(max=1.0)
    return (1 - share) * S + share * trace / WIDTH * torch.eye(WIDTH, dtype=torch.float64)


@given(seeds, st.integers(3, 40))
def test_distances_are_those_of_the_shrunken_covariance(seed, images):
    means, rows = tasks_of(seed, images=images)
    metric = shared_metric([centred(part) for part in rows], [len(part) for part in rows])
    inverse = torch.linalg.inv(shrunk(rows))
    difference = rows[0].double()[:, None] - means.double()
    expected = torch.einsum("mnd,de,mne->mn", difference, inverse, difference)
    found = metric.squared_distances(rows[0].double(), means.double())
    assert relative_error(found, expected) < 1e-5
    assert relative_error(metric.squared_distances(rows[0], means).double(), expected) < 1e-3


@given(seeds, st.integers(0, WIDTH))
def test_between_whitened_rows_plain_distances_are_the_metrics(seed, rank):
    means, rows = tasks_of(seed)
    metric = shared_metric([centred(part) for part in rows], [len(part) for part in rows], rank)
    one, other = rows[0].double(), means.double()
    found = torch.cdist(metric.whitened(one), metric.whitened(other)).square()
    assert relative_error(found, metric.squared_distances(one, other)) < 1e-5


@given(seeds, st.integers(0, WIDTH))
def test_directions_that_are_not_kept_share_their_mean_variance(seed, rank):
    _, rows = tasks_of(seed)
    spreads = [centred(part) for part in rows]
    images = [len(part) for part in rows]
    whole, cut = shared_metric(spreads, images), shared_metric(spreads, images, rank)
    assert len(cut.directions) == min(rank, len(whole.directions))
    trace = cut.variances[:-1].sum() + (WIDTH - len(cut.directions)) * cut.variances[-1]
    assert trace.item() == pytest.approx(torch.stack([torch.cov(part.double().T) for part in rows]).mean(0).trace())


def test_it_tells_tasks_apart_that_cosines_confuse():
    _, rows = tasks_of(0)
    fresh = tasks_of(0, images=80)[1]
    prototypes = torch.stack([part.mean(0) for part in rows])
    metric = shared_metric([centred(part) for part in rows], [len(part) for part in rows])
    right = {"cosine": 0.0, "metric": 0.0}
    for t, part in enumerate(fresh):
        right["cosine"] += (routing_weights(part, prototypes, 0.02).argmax(1) == t).float().mean().item() / 3
        right["metric"] += (metric.squared_distances(part, prototypes).argmin(1) == t).float().mean().item() / 3
    assert right["metric"] > 0.95
    assert right["cosine"] < 0.7


def test_images_that_are_all_alike_have_a_metric_too():
    rows = torch.ones(5, WIDTH)
    found = shared_metric([centred(rows)], [5]).squared_distances(2 * torch.ones(1, WIDTH), rows[:1])
    assert found.item() == pytest.approx(WIDTH)


def test_draws_have_the_covariance():
    _, rows = tasks_of(1)
    metric = shared_metric([centred(part) for part in rows], [len(part) for part in rows], rank=5)
    V, variances = metric.directions, metric.variances
    expected = V.T @ torch.diag(variances[:-1] - variances[-1]) @ V + variances[-1] * torch.eye(WIDTH)
    drawn = metric.draws(40000, torch.Generator().manual_seed(0))
    assert relative_error(drawn.T @ drawn / len(drawn), expected) < 0.03
    assert drawn.mean(0).abs().max() < 0.03 * expected.diagonal().max().sqrt()
    assert metric.squared_distances(drawn, torch.zeros(1, WIDTH)).mean().item() == pytest.approx(WIDTH, rel=0.03)
    assert torch.equal(metric.draws(40000, torch.Generator().manual_seed(0)), drawn)


@given(seeds, st.integers(0, 8))
def test_the_mean_distance_is_that_of_the_definition(seed, rank):
    _, rows = tasks_of(seed)
    metric = shared_metric([centred(part) for part in rows], [len(part) for part in rows], rank=rank, least=0.1)
    others = centred(tasks_of(seed + 1, tasks=1)[1][0])
    V, variances = metric.directions, metric.variances
    inverse = V.T @ torch.diag(1 / variances[:-1]) @ V + (torch.eye(WIDTH) - V.T @ V) / variances[-1]
    for covariance in (others, LowRankCovariance(remainder=0.5, factor=others.factor[:3])):
        assert metric.mean_distance(covariance) == pytest.approx((inverse @ covariance.dense()).trace().item())
    of_rows = metric.squared_distances(rows[0].double(), rows[0].double().mean(0, keepdim=True))
    assert metric.mean_distance(centred(rows[0])) == pytest.approx(of_rows.sum().item() / (len(rows[0]) - 1))


def measured(width, tasks, images, seed):
    """What images of Gaussian tasks are at, `d²` of new ones from each prototype, and their `new_distances`."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width).double()

    def draw(count):
        return torch.randn(count, width, generator=generator).double() * scales

    rows = [draw(images) for _ in range(tasks)]
    spreads, counts = [centred(part) for part in rows], [images] * tasks
    metric = shared_metric(spreads, counts)
    seen = torch.tensor([metric.mean_distance(spread) for spread in spreads], dtype=torch.float64)
    new = metric.squared_distances(draw(1000), torch.stack([part.mean(0) for part in rows]))
    return new, seen, torch.tensor(new_distances(metric, spreads, counts), dtype=torch.float64)


@pytest.mark.parametrize("images", [8, 16, 32, 128])
@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("width", [32, 96])
def test_new_images_are_at_their_distance_whatever_number_was_measured(width, tasks, images):
    parts = [measured(width, tasks, images, seed) for seed in range(5)]
    mean = torch.stack([(new / expected).mean() for new, _, expected in parts]).mean().item()
    assert mean < 1.02  # few samples in many dimensions are given the benefit of the doubt
    assert mean > 0.4
    if tasks * images > 5 * width:
        assert mean > 0.9

    def beyond(factor, which):
        return torch.stack([(part[0] > factor * part[which]).double().mean() for part in parts]).mean().item()

    assert beyond(2, 2) < 0.03
    assert beyond(3, 2) < 0.005
    if images <= 16 and tasks < 8:  # what the measured ones are at would leave them
        assert beyond(2, 1) > 0.25


def test_of_many_samples_new_distances_are_those_of_the_hotelling_distribution():
    """Without shrinkage, of one Gaussian: `d² / (1 + 1/n)` is `ν d / (ν − d + 1)` times an `F(d, ν − d + 1)`."""
    images, width = 400, 24
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(images, width, generator=generator, dtype=torch.float64)
    spread = centred(rows)
    metric = replace(shared_metric([spread], [images]), share=1.0)
    degrees = images - 1
    exact = (1 + 1 / images) * width * degrees / (degrees - width - 1)
    seen = metric.mean_distance(spread)
    found = new_distances(metric, [spread], [images])[0]
    leverage = images * seen / ((images - 1) * images)
    assert found * (1 - leverage) ** 0.5 / seen == pytest.approx(exact / width, rel=5e-3)


def test_tasks_count_by_themselves_and_at_least_as_all_together():
    narrow, wide = torch.randn(200, 8).double() * 0.1, torch.randn(200, 8).double()
    spreads = [centred(narrow), centred(wide)]
    metric = shared_metric(spreads, [200, 200])
    one, other = new_distances(metric, spreads, [200, 200])
    assert one == pytest.approx(8, rel=0.1)  # the mean of both
    assert other == pytest.approx(16, rel=0.1)
    assert new_distances(metric, spreads[::-1], [200, 200]) == pytest.approx([other, one])
    same = [centred(torch.ones(4, 8))] * 2
    assert new_distances(shared_metric(same, [4, 4]), same, [4, 4]) == [1.0, 1.0]
