"""What stands before a server's own projector: each image through the projectors of its tasks, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_many import MergeOptions
from peft_many.algebra.routing import task_weights
from peft_many.algebra.spread import FeatureMetric
from peft_many.records import RoutedProjector, RoutedTask
from peft_many.serving.projector import ServedProjector, images_lie, served

WIDTH, OUT = 6, 5


class Merger(nn.Module):
    """Makes one row of two, of features that it may get in more dimensions than two, and counts its calls."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(2 * width, out), []

    def forward(self, features: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        self.calls.append(len(features) if sizes is None else sizes)
        return self.linear(features.reshape(-1, 2 * WIDTH))


class Linear(nn.Linear):
    """Keeps the dimension of images."""


def routed(kind=Merger, trained=(True, True, True), directions=None, **options):
    torch.manual_seed(0)
    projector = served(kind)(WIDTH, OUT)
    options = {"router": "cosine", "temperature": 0.5, **options}
    tasks = [RoutedTask(f"t{t}", is_trained) for t, is_trained in enumerate(trained)]
    distances = None if directions is None else [float(WIDTH)] * len(tasks)
    about = RoutedProjector(WIDTH, tasks, directions, distances)
    projector.route(about, MergeOptions(**options))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if directions is not None:
            projector.directions.copy_(torch.linalg.qr(torch.randn(WIDTH, directions))[0].T)
            projector.variances.copy_(torch.rand(directions + 1) + 0.5)
    return projector


def by_hand(projector, image):
    """`Σ_t α_t P_t(v)` of one image."""
    options = projector._options
    metric = FeatureMetric(projector.directions, projector.variances) if projector._is_gaussian else None
    pooled = image.reshape(-1, WIDTH).mean(0, keepdim=True)
    limits = projector.routed.limits(options.abstain_above)
    weights = task_weights(pooled, projector.prototypes, metric, options.temperature, options.top_k, limits)[0]
    base = type(projector).__mro__[2].forward
    through = [
        projector.experts[f"task_{t}"](image) if f"task_{t}" in projector.experts else base(projector, image)
        for t in range(len(weights))
    ]
    if (weights == 0).all():
        return base(projector, image)
    return sum(weight * part for weight, part in zip(weights, through))


def test_an_expert_takes_what_the_projector_takes_in_the_same_place():
    with torch.device("meta"):
        projector = served(Merger)(WIDTH, OUT).bfloat16()
        own = sum(parameter.nbytes for parameter in projector.parameters())
        torch.set_default_dtype(torch.bfloat16)  # as a server does while it makes a model
        try:
            tasks = [RoutedTask(f"t{t}", trained) for t, trained in enumerate((True, True, False))]
            projector.route(
                RoutedProjector(WIDTH, tasks, 2, [1.0] * 3), MergeOptions(router="gaussian", temperature=1.0)
            )
        finally:
            torch.set_default_dtype(torch.float32)
    of_router = 4 * ((3 + 2) * WIDTH + 3)  # prototypes, directions and variances, in float32
    assert sum(parameter.nbytes for parameter in projector.parameters()) == 3 * own + of_router
    assert {parameter.device.type for parameter in projector.parameters()} == {"meta"}


OPTIONS = {
    "mixed": {},
    "top": {"top_k": 1},
    "two": {"top_k": 2},
    "gaussian": {"router": "gaussian", "temperature": 3.0, "directions": 2},
    "abstaining": {"router": "gaussian", "temperature": 3.0, "directions": 2, "abstain_above": 1.5},
    "base": {"trained": (True, False, False)},
    "no expert": {"trained": (False, False, False)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_each_image_goes_through_the_projectors_of_its_tasks(options):
    projector = routed(**options)
    images = [3 * torch.randn(rows, WIDTH) for rows in (2, 6, 4, 2, 8)]
    with images_lie(10 * torch.tensor([1, 3, 2, 1, 4])):  # in proportion
        found = projector(torch.cat(images))
    assert torch.allclose(found, torch.cat([by_hand(projector, image) for image in images]), atol=1e-5)


@torch.no_grad()
def test_of_images_in_a_dimension_of_their_own():
    projector = routed(Linear)
    images = torch.randn(5, 4, WIDTH)  # the first has three tiles
    with images_lie(torch.tensor([3, 1, 1])):
        found = projector(images)
    expected = [by_hand(projector, part) for part in (images[:3], images[3:4], images[4:])]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


@torch.no_grad()
def test_experts_without_an_image_are_not_called():
    projector = routed(temperature=0.001)
    features = torch.cat([projector.prototypes[[task]].repeat(2, 1) for task in (1, 1, 2)])
    with images_lie(torch.ones(3)):
        projector(features, [10, 20, 30])
    calls = [projector.experts[f"task_{t}"].calls for t in range(3)]
    assert calls == [[], [[10, 20]], [[30]]]  # each with what belongs to its images
    assert projector.calls == []
    with images_lie(torch.ones(1)):
        projector(features[:2])
    assert [len(projector.experts[f"task_{t}"].calls) for t in range(3)] == [0, 2, 1]


@torch.no_grad()
def test_it_is_the_servers_own_until_it_routes():
    torch.manual_seed(0)
    plain, ours = Merger(WIDTH, OUT), served(Merger)(WIDTH, OUT)
    assert isinstance(ours, Merger)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    features = torch.randn(4, WIDTH)
    assert torch.equal(ours(features), plain(features))


@torch.no_grad()
def test_what_decides_stays_exact_and_images_have_to_be_known():
    with torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            projector = routed(Linear)
        finally:
            torch.set_default_dtype(torch.float32)
    assert projector.prototypes.dtype == torch.float32
    assert projector.experts["task_0"].weight.dtype == torch.bfloat16
    features = torch.randn(3, 2, WIDTH, dtype=torch.bfloat16)
    with images_lie(torch.ones(3)):
        assert projector(features).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="3 rows of features cannot be told apart: nothing is known"):
        projector(features)
    with images_lie(torch.tensor([2, 2])), pytest.raises(RuntimeError, match=r"apart: they should lie as \[1, 1\]"):
        projector(features)
    assert isinstance(projector, ServedProjector)
