"""One projector for all tasks: the fit against an independent one, and where there can be none."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from peft_many.algebra.covariance import DenseCovariance
from peft_many.algebra.spread import centred
from peft_many.exports.one_projector import _RIDGE, ProjectorBench, benches
from peft_many.files.adapter import TaskAdapter, UnmergeableAdapterError
from peft_many.files.statistics import ImageStatistics, TaskStatistics
from tests import tiny

WIDTH, OUT, NAME = 6, 5, "projector"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one, self.act, self.two = nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, OUT, bias=False)

    def forward(self, x):
        return self.two(self.act(self.one(self.norm(x))))


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4 * WIDTH, OUT)

    def forward(self, x):
        return self.one(x.reshape(-1, 4 * WIDTH))


def task(name: str, seed: int, module: nn.Module | None, images: int = 12, **changes) -> TaskAdapter:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, WIDTH, generator=generator) + 2 * torch.randn(WIDTH, generator=generator)
    seen = ImageStatistics(features.mean(0), centred(features), images)
    statistics = TaskStatistics(name, images, projectors={NAME: seen})
    projectors = {} if module is None else {NAME: module.state_dict()}
    made = TaskAdapter(name, 1.0, {}, statistics, {}, projectors, name)
    return dataclasses.replace(made, **changes)


def module(kind: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


@pytest.mark.parametrize("kind", [TwoLayers, lambda: nn.Linear(WIDTH, OUT)])
def test_it_loses_less_than_the_mean_of_the_weights(kind):
    tasks = [task(str(seed), seed, module(kind, seed)) for seed in range(4)]
    bench = ProjectorBench(NAME, module(kind, 9), tasks)
    fitted, mean = bench.loss(bench.fitted()), bench.loss(bench.mean())
    assert sum(fitted.values()) < 0.85 * sum(mean.values())
    for one in tasks:
        assert bench.loss(one.projectors[NAME])[one.name] < 1e-6
    assert bench.loss({}) == pytest.approx(dict.fromkeys(fitted, 1.0))


def test_an_affine_projector_is_the_least_squares_optimum():
    """Of the objective on the draws: whatever is changed in it makes it worse."""
    tasks = [task("a", 0, module(lambda: nn.Linear(WIDTH, OUT), 0)), task("b", 1, None, weight=0.3)]
    start = module(lambda: nn.Linear(WIDTH, OUT), 9)
    bench = ProjectorBench(NAME, start, tasks)
    mean, own = bench.mean(), [tasks[0].projectors[NAME], start.state_dict()]  # b has the base model's

    def objective(tensors):
        total, diagonal = 0.0, 0.0
        for one, target in zip(tasks, own):
            x = bench._drawn(one).flatten(0, 1)
            rows = torch.cat([x, torch.ones(len(x), 1)], 1)
            difference = (tensors["weight"].double() - target["weight"].double()) @ x.T
            difference += (tensors["bias"].double() - target["bias"].double())[:, None]
            total += one.weight * difference.square().sum().item() / len(x)
            diagonal += one.weight * rows.square().sum().item() / len(x) / (WIDTH + 1)
        pull = sum((tensors[key].double() - mean[key].double()).square().sum().item() for key in tensors)
        return total + _RIDGE * diagonal * pull

    best = {key: tensor.double() for key, tensor in bench.fitted().items()}
    assert objective(best) < objective(mean)
    for key, sign in itertools.product(best, (1, -1)):
        for place in range(best[key].numel()):
            moved = {name: tensor.clone() for name, tensor in best.items()}
            moved[key].view(-1)[place] += sign * 1e-3
            assert objective(moved) > objective(best)


def test_tasks_with_one_projector_get_it():
    shared = module(TwoLayers, 3)
    bench = ProjectorBench(NAME, module(TwoLayers, 9), [task("a", 0, shared), task("b", 1, shared)])
    found = bench.fitted()
    assert all(torch.allclose(found[key], tensor, atol=1e-6) for key, tensor in shared.state_dict().items())


def test_dense_spreads_and_zero_weights():
    tasks = [task(str(seed), seed, module(TwoLayers, seed)) for seed in range(3)]
    seen = tasks[0].statistics.projectors[NAME]
    dense = dataclasses.replace(seen, spread=DenseCovariance(0.0, seen.spread.dense()))
    statistics = dataclasses.replace(tasks[0].statistics, projectors={NAME: dense})
    other = [dataclasses.replace(tasks[0], statistics=statistics), *tasks[1:]]
    found = [ProjectorBench(NAME, module(TwoLayers, 9), some) for some in (tasks, other)]
    x, y = (bench._drawn(some[0])[:, 0] for bench, some in zip(found, (tasks, other)))
    torch.testing.assert_close(torch.cov(x.T), torch.cov(y.T), rtol=0.2, atol=0.1)  # other draws of the same
    light = [*tasks[:2], dataclasses.replace(tasks[2], weight=0.0)]
    without = ProjectorBench(NAME, module(TwoLayers, 9), tasks[:2]).fitted()
    with_it = ProjectorBench(NAME, module(TwoLayers, 9), light).fitted()
    assert all(torch.equal(with_it[key], tensor) for key, tensor in without.items())
    nobody = [dataclasses.replace(one, weight=0.0) for one in tasks]
    bench = ProjectorBench(NAME, module(TwoLayers, 9), nobody)
    assert (bench.mean(), bench.fitted()) == ({}, None)


def test_what_cannot_be_run_on_image_means():
    grids = [task(str(seed), seed, module(Grid, seed)) for seed in range(2)]
    assert ProjectorBench(NAME, module(Grid, 9), grids).fitted() is None
    seen = grids[0].statistics.projectors[NAME]
    projectors = {NAME: dataclasses.replace(seen, spread=None)}
    blind = dataclasses.replace(grids[0].statistics, projectors=projectors)
    tasks = [task("a", 0, module(TwoLayers, 0), statistics=blind), task("b", 1, module(TwoLayers, 1))]
    bench = ProjectorBench(NAME, module(TwoLayers, 9), tasks)
    assert bench.fitted() is None
    loss = bench.loss(bench.mean())  # by weights
    own, base = tasks[0].projectors[NAME], bench._base.state_dict()
    flat = [torch.cat([tensors[key].double().flatten() for key in own]) for tensors in (bench.mean(), own, base)]
    assert loss["a"] == pytest.approx(((flat[0] - flat[1]).norm() / (flat[2] - flat[1]).norm()).item())


def test_projectors_of_another_model():
    wrong = task("a", 0, nn.Linear(WIDTH + 1, OUT))
    with pytest.raises(UnmergeableAdapterError, match=r"a: tensor 'projector.weight' has shape \(5, 7\), but in this"):
        ProjectorBench(NAME, nn.Linear(WIDTH, OUT), [wrong])
    with pytest.raises(
        UnmergeableAdapterError, match="'projector' matches no module of LlavaForConditionalGeneration"
    ):
        next(benches(tiny.build("llava"), [wrong]))
