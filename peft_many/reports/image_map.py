"""Many images at once, as a router sees them: which task each is taken for, and a map of where they lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..algebra.routing import task_weights
from ..algebra.spread import FeatureMetric
from ..data.batches import ChatCollator
from ..data.conversations import question_about
from ..statistics.forward import state_kept
from ..tuner.projector import ProjectorMixture
from .comparison import NO_TASK, alone, noting, routed_projectors
from .running import inputs_of

UNDECIDED = "undecided"
_SURE = 0.75  # the least weight of a task that an image is said to belong to


@dataclass(frozen=True)
class ImageMap:
    """Images before one routed projector.

    Args:
        tasks (`list[str]`): The tasks' names.
        features (`Tensor`): Pooled features that the router compares, shape `(images, d)`, float32.
        prototypes (`Tensor`): The tasks' prototypes, shape `(tasks, d)`, float32.
        metric ([`FeatureMetric`], *optional*): That of a Gaussian router.
        temperature (`float`): The merge's.
        top_k (`int`, *optional*): Likewise.
        limits (`list[float]`, *optional*): From which squared distance on an image is not like each task's.
    """

    tasks: list[str]
    features: Tensor
    prototypes: Tensor
    metric: FeatureMetric | None
    temperature: float
    top_k: int | None = None
    limits: list[float] | None = None

    def weights(self, temperature: float | None = None) -> Tensor:
        """What each task counts for each image, `(images, tasks)`, at the merge's temperature or at another one."""
        return task_weights(
            self.features,
            self.prototypes,
            self.metric,
            self.temperature if temperature is None else temperature,
            self.top_k,
            self.limits,
        )

    def belongs(self, temperature: float | None = None) -> list[str]:
        """For each image its task's name, `"undecided"` if none has three quarters of it, or that it is like none."""
        weights = self.weights(temperature)
        most, which = weights.max(dim=1)
        names = [self.tasks[task] if weight >= _SURE else UNDECIDED for weight, task in zip(most, which)]
        return [name if weight > 0 else NO_TASK for name, weight in zip(names, most)]

    def positions(self) -> tuple[Tensor, Tensor]:
        """Places on a map, of the images `(images, 2)` and of the prototypes `(tasks, 2)`.

        Distances on the map are those that the router goes by, as far as two dimensions can show them: first those
        between the prototypes (linear discriminant analysis, if the router is Gaussian), then those between images.
        """
        images, prototypes = self._compared(self.features), self._compared(self.prototypes)
        centre = prototypes.mean(0)
        images, prototypes = images - centre, prototypes - centre
        axes = _leading(prototypes)
        axes = torch.cat([axes, _leading(images - images @ axes.T @ axes)])[:2]
        axes = torch.nn.functional.pad(axes, (0, 0, 0, 2 - len(axes)))
        return images @ axes.T, prototypes @ axes.T

    def _compared(self, rows: Tensor) -> Tensor:
        """In float64, rows between which plain distances are what is compared."""
        rows = rows.double()
        if self.metric is not None:
            return self.metric.whitened(rows)
        return torch.nn.functional.normalize(rows - self.prototypes.double().mean(0), dim=-1)


def map_images(
    model: PeftModel,
    processor: Any,
    images: Iterable[Any],
    *,
    progress: bool = True,
) -> dict[str, ImageMap]:
    """See many images as a merge's routers do; one forward pass each.

    Args:
        model ([`~peft.PeftModel`]): Its active adapter is a merge that routes its projectors.
        processor ([`~transformers.ProcessorMixin`]): The base model's, with a chat template.
        images (`Iterable`): Images, or paths of such, which are opened when they are wanted.
        progress (`bool`, defaults to `True`): Whether to show a bar.

    Returns:
        `dict[str, ImageMap]`: By projector; of an image that was cut into tiles the mean of their features.

    Raises:
        ValueError: There is no image; the active adapter routes no projector, or the processor has no chat template.
    """
    projectors, collator = routed_projectors(model), ChatCollator(processor)
    seen: dict[str, list[Tensor]] = {name: [] for name in projectors}
    routers: dict[str, ProjectorMixture] = {}

    def note(name: str, mixture: ProjectorMixture, pooled: Tensor, weights: Tensor) -> None:
        routers[name] = mixture
        seen[name].append(pooled.float().mean(0).cpu())

    with alone, state_kept(model), torch.no_grad(), noting(model, projectors, note):
        model.eval()
        for image in tqdm(images, desc="Looking at images", disable=not progress):
            model(**inputs_of(model, collator, question_about([image], "")))
    if not routers:
        raise ValueError("There are no images to look at.")
    return {name: _map(projectors[name][1], routers[name], torch.stack(seen[name])) for name in routers}


def _map(tasks: list[str], router: ProjectorMixture, features: Tensor) -> ImageMap:
    metric = router.metric
    if metric is not None:
        metric = FeatureMetric(metric.directions.cpu(), metric.variances.cpu())
    return ImageMap(
        tasks,
        features,
        router.prototypes.cpu(),
        metric,
        router.temperature,
        router.top_k,
        router.limits,
    )


def _leading(rows: Tensor) -> Tensor:
    """The two directions in which rows vary most, or fewer if they do not vary in two, orthonormal, `(≤ 2, d)`."""
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    varies = values > 1e-9 * values.max().clamp(min=1e-30)
    found: Tensor = directions[varies][:2]
    return found
