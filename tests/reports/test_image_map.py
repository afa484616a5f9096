"""A map of images: where they lie, and whose they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_many.algebra.routing import task_weights
from peft_many.algebra.spread import FeatureMetric
from peft_many.reports.comparison import NO_TASK
from peft_many.reports.image_map import UNDECIDED, ImageMap
from peft_many.reports.viewer_of_many import _is_image, points, rows

WIDTH = 6
TASKS = ["charts", "flags", "scenes"]


def made(tasks: int, images: int, gaussian: bool, seed: int = 0, **options) -> ImageMap:
    generator = torch.Generator().manual_seed(seed)
    metric = None
    if gaussian:
        directions = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator)).Q.T
        metric = FeatureMetric(directions, torch.tensor([9.0, 4.0, 1.0]))
    prototypes = 4 * torch.randn(tasks, WIDTH, generator=generator)
    features = prototypes[torch.arange(images) % tasks] + 0.3 * torch.randn(images, WIDTH, generator=generator)
    temperature = 1.0 if gaussian else 0.02
    return ImageMap(TASKS[:tasks], features, prototypes, metric, temperature, **options)


@given(st.integers(0, 99), st.integers(1, 3), st.booleans())
def test_prototypes_lie_as_far_apart_as_the_router_has_them(seed, tasks, gaussian):
    found = made(tasks, 7, gaussian, seed)
    images, prototypes = found.positions()
    assert images.shape == (7, 2)
    assert prototypes.shape == (tasks, 2)
    if gaussian:  # three points lie in a plane
        distances = found.metric.squared_distances(found.prototypes.double(), found.prototypes.double())
        torch.testing.assert_close(torch.cdist(prototypes, prototypes).square(), distances, rtol=1e-4, atol=1e-6)
    if tasks > 1:
        nearest = torch.cdist(images, prototypes).argmin(1)
        assert nearest.tolist() == [i % tasks for i in range(7)]


def test_few_images_and_equal_ones_have_a_place():
    for tasks, images in ((1, 1), (1, 2), (2, 1)):
        for at in made(tasks, images, gaussian=True).positions():
            assert at.isfinite().all()
    same = ImageMap(TASKS[:2], torch.ones(3, WIDTH), torch.ones(2, WIDTH), None, 0.02)
    assert all(at.abs().max() < 1e-6 for at in same.positions())


def test_whose_an_image_is_depends_on_the_temperature():
    found = made(3, 6, gaussian=True)
    expected = task_weights(found.features, found.prototypes, found.metric, 1.0)
    torch.testing.assert_close(found.weights(), expected)
    assert found.belongs() == TASKS * 2
    assert found.belongs(1e6) == [UNDECIDED] * 6
    far = ImageMap(
        TASKS,
        100 + found.features,
        found.prototypes,
        found.metric,
        1.0,
        limits=[4.0 * found.features.shape[1]] * len(TASKS),
    )
    assert far.belongs() == [NO_TASK] * 6


def test_points_and_rows_name_the_images(tmp_path):
    pytest.importorskip("pandas")
    found, files = made(3, 4, gaussian=True), [f"/somewhere/{i}.png" for i in range(4)]
    table = points(found, files)
    assert [*table["image"]] == ["0.png", "1.png", "2.png", "3.png", *(f"prototype of {task}" for task in TASKS)]
    assert [*table["taken for"]] == [*TASKS, "charts", *["prototypes"] * 3]
    told = rows(found, files, factor=1e5, answers=[(f"said {i}", "base") for i in range(4)])
    assert [*told["weight"]] == sorted(told["weight"])
    assert {(row["image"], row["merge"]) for _, row in told.iterrows()} == {
        (f"{i}.png", f"said {i}") for i in range(4)
    }
    assert set(told["taken for"]) == {UNDECIDED}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    assert [_is_image(str(tmp_path / name)) for name in ("a.png", "b.png", "c.png")] == [True, False, False]
