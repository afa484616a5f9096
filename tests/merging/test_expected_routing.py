"""Where inputs are expected to go, against where inputs that were not measured do go."""

from __future__ import annotations

import pytest
import torch

from peft_many.algebra.routing import gaussian_scores, joint_weights, task_weights
from peft_many.algebra.spectrum import Truncation
from peft_many.algebra.spread import centred, shared_metric
from peft_many.files.statistics import FeatureStatistics, TaskStatistics
from peft_many.merging.expected_routing import DrawnInputs
from peft_many.merging.routed_instructions import instruction_metric
from peft_many.merging.routed_projectors import feature_metric, own_distances
from peft_many.records import GATES, MergeOptions, RoutedProjector, RoutedTask

WIDTH, MEASURED = 64, 128
LOUDNESS = torch.arange(1, WIDTH + 1) ** -0.5  # features vary along few directions, as those of real images do


def draw(place, count, seed):
    """Features of inputs around a place, an offset along every direction, in the units of how much they vary."""
    generator = torch.Generator().manual_seed(seed)
    return (place + torch.randn(count, WIDTH, generator=generator)) * LOUDNESS


def measured(rows):
    spread = Truncation(rank=32, energy=1.0).apply(centred(rows))
    return FeatureStatistics(rows.double().mean(0).float(), spread, len(rows))


def tasks_at(images, instructions):
    """Tasks by name, from the places of their images (`None`: it has none) and of their instructions."""
    found = {}
    for t, (seen, asked) in enumerate(zip(images, instructions, strict=True)):
        projectors = {} if seen is None else {"projector": measured(draw(seen, MEASURED, 10 + t))}
        words = measured(draw(asked, MEASURED, 20 + t))
        found["abcdef"[t]] = TaskStatistics("abcdef"[t], MEASURED, projectors=projectors, instructions=words)
    return found


def expected(tasks, **options):
    filled = MergeOptions(**options).filled_in([])
    seen = {name: task.projectors["projector"] for name, task in tasks.items() if task.projectors}
    measured = {}
    if filled.router == "gaussian" and seen:
        metric = feature_metric([*seen.values()])
        measured = {"directions": 32, "distances": own_distances([*seen.values()], metric)}
    routed = RoutedProjector(WIDTH, [RoutedTask(name, trained=True) for name in seen], **measured)
    return DrawnInputs(filled, {"projector": routed} if seen else {}, tasks).expected


def test_tasks_on_the_same_pictures_are_told_apart_by_what_they_ask():
    tasks = tasks_at([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    for by, pairs in (("images", [("a", "b")]), ("instructions", [("b", "c")]), ("both", [])):
        found = expected(tasks, router="gaussian", gate_by=by)[GATES]
        assert found.by == by
        assert found.look_alikes() == pairs
        assert found.accuracy == pytest.approx(2 / 3 if pairs else 1.0, abs=0.05)


@pytest.mark.parametrize("router", ["cosine", "gaussian"])
@pytest.mark.parametrize("apart", [0.0, 0.3, 3.0])
def test_it_is_what_happens_to_images_that_were_not_measured(router, apart):
    """Drawn about the prototypes alone, images of two tasks that are one would all go to their own."""
    places = [torch.zeros(WIDTH), apart * torch.eye(WIDTH)[3], torch.full((WIDTH,), 2.0)]
    tasks = tasks_at(places, [0.0, 0.0, 0.0])
    options = MergeOptions(router=router).filled_in([])
    seen = [task.projectors["projector"] for task in tasks.values()]
    prototypes = torch.stack([one.prototype for one in seen])
    metric = shared_metric([one.spread for one in seen], [MEASURED] * 3) if router == "gaussian" else None
    (found,) = expected(tasks, router=router).values()
    for name, place, row in zip(tasks, places, found.matrix):
        new = task_weights(draw(place, 2000, 99), prototypes, metric, options.temperature).mean(0)
        assert row == pytest.approx(new.tolist(), abs=0.12)
        assert sum(found.shares[name].values()) == pytest.approx(1.0, abs=1e-5)


def test_it_is_what_happens_to_instructions_that_were_not_measured():
    places = [0.0, 0.0, 0.4 * torch.eye(WIDTH)[0], 2.0]
    tasks = tasks_at([None] * 4, places)
    asked = [task.instructions for task in tasks.values()]
    prototypes, metric = torch.stack([one.prototype for one in asked]), instruction_metric(asked)
    found = expected(tasks, gate_by="instructions")[GATES]
    for place, row in zip(places, found.matrix):
        weights = joint_weights(gaussian_scores(draw(place, 2000, 99), prototypes, metric, 1.0), None)
        chosen = torch.nn.functional.one_hot(weights.argmax(1), len(places)).float()
        new = torch.where(weights.amax(1, keepdim=True) >= 0.5, chosen, weights).mean(0)
        assert row == pytest.approx(new.tolist(), abs=0.12)


def test_tasks_measured_on_the_very_same_inputs_are_the_same():
    task = tasks_at([0.0], [0.0])["a"]
    for by in ("images", "instructions", "both"):
        found = expected({"a": task, "b": task}, router="gaussian", gate_by=by)[GATES]
        assert found.matrix == [[1.0, 0.0]] * 2  # of equal ones the first
        assert found.look_alikes() == [("a", "b")]
        assert found.undecided == found.like_none == {}
    for by in ("images", "instructions", "both"):
        found = expected({"a": task, "b": task}, router="gaussian", gate_by="both", route_by=by)["projector"]
        shares = [0.5, 0.5] if by == "images" else [1.0, 0.0]  # instructions choose one projector, as gates do
        assert found.matrix == [pytest.approx(shares, abs=1e-4)] * 2
        assert found.by == by


def test_of_three_tasks_that_are_the_same_none_is_chosen():
    task = tasks_at([0.0], [0.0])["a"]
    found = expected(dict.fromkeys("abc", task), gate_by="instructions")[GATES]
    assert found.matrix == [pytest.approx([1 / 3] * 3, abs=1e-4)] * 3
    assert found.undecided == dict.fromkeys("abc", 1.0)
    assert found.like_none == {}


def test_projectors_go_by_what_route_by_says():
    tasks = tasks_at([0.0, 0.0, 1.0, None], [0.0, 1.0, 1.0, 2.0])
    for by, pairs in (("images", [("a", "b")]), ("instructions", [("b", "c")]), ("both", [])):
        found = expected(tasks, router="gaussian", gate_by="both", route_by=by)["projector"]
        assert found.by == by
        assert found.look_alikes() == pairs
        assert list(found.shares) == ["a", "b", "c"]
        assert found.accuracy == pytest.approx(2 / 3 if pairs else 1.0, abs=0.05)
        if by == "instructions":  # for which images count nothing, however they are compared
            assert expected(tasks, router="cosine", gate_by="both", route_by=by)["projector"] == found


def test_what_is_like_no_task_is_left_to_the_base_model():
    tasks = tasks_at([0.0, 1.0], [0.0, 1.0])
    options = {"router": "gaussian", "gate_by": "instructions", "route_by": "both"}
    near = expected(tasks, **options, abstain_above=4.0)
    assert near[GATES].accuracy > 0.95
    far = expected(tasks, **options, abstain_above=0.7)
    for found in (far[GATES], far["projector"]):
        assert found.undecided == {}
        assert max(found.like_none.values()) > 0.5
        for name, row in found.shares.items():
            assert sum(row.values()) + found.like_none.get(name, 0.0) == pytest.approx(1.0, abs=1e-5)
    by_words = expected(tasks, gate_by="instructions", route_by="instructions", abstain_above=0.7)  # cosines know none
    assert by_words["projector"].like_none == pytest.approx(by_words[GATES].like_none, abs=1e-5)


def test_text_goes_to_its_task_by_words_only():
    tasks = tasks_at([0.0, 1.0, None], [0.0, 1.0, 2.0])
    blind = expected(tasks, gate_by="images")[GATES]
    assert blind.undecided["c"] == 1.0
    assert blind.shares["c"] == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert expected(tasks, gate_by="both")[GATES].accuracy > 0.95


def test_a_task_of_one_input_and_a_router_that_abstains():
    tasks = tasks_at([0.0, 1.0], [0.0, 1.0])
    single = FeatureStatistics(draw(0.5, 1, 3)[0], None, 1)
    tasks["one"] = TaskStatistics("one", 1, projectors={"projector": single})
    assert expected(tasks)["projector"].share("one", "one") > 0.9
    found = expected(tasks_at([0.0, 1.0], [0.0, 1.0]), router="gaussian", abstain_above=0.7)["projector"]
    for name, row in found.shares.items():
        assert found.like_none[name] == pytest.approx(1 - sum(row.values()))
    assert max(found.like_none.values()) > 0.5
    assert found.undecided == {}
