"""How many images each way of routing sends to their own task: pooling, centring, prototypes, metric, samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from peft_many.algebra.spread import centred, shared_metric
from peft_many.families.parts import find_projectors
from peft_many.families.projector_call import features_of

from .methods import Measured, Measurement
from .model import Collator
from .training import batches_of
from .workshop import BATCH_SIZE, MEASURED, Workshop
from .world import Task

GROUP = "images that are routed to their task, %"
ABSTENTION = "images that are rightly kept or left, %"
THRESHOLDS = (2.0, 3.0, 4.0, 6.0)
PROTOTYPES = (2, 4, 8, 16)
IMAGES = (4, 8, 32)

# From the pooled features of each task's images, shape (n, d), and those of others: which task is nearest.
Router = Callable[[Sequence[Tensor], Tensor], Tensor]


def _mean(patches: Tensor) -> Tensor:
    return patches.mean(1)


@dataclass(frozen=True)
class RouterStudy(Measurement):
    """A row of the routing table.

    Args:
        router (`Router`): Decides.
        pool (`Callable`): From patches, shape `(images, patches, d)`, to features, `(images, d)`.
        images (`int`): How many of each task's images it knows.
    """

    router: Router | None = None
    pool: Callable[[Tensor], Tensor] = _mean
    images: int = MEASURED

    def measure(self, shop: Workshop) -> Measured:
        """The share of each task's test pictures that go to it, in per cent."""
        assert self.router is not None
        known = [self.pool(patches[: self.images]) for patches in _known(shop)]
        row = []
        for t, task in enumerate(shop.tasks):
            found = self.router(known, self.pool(_asked(shop, task)))
            row.append(100 * (found == t).float().mean().item())
        return Measured([row])


@dataclass(frozen=True)
class AbstentionStudy(Measurement):
    """A row of the abstention table: a Gaussian router that leaves images like no task's to the base model.

    Args:
        threshold (`float`): `abstain_above`.
        strangers (`bool`):
            Whether the router does not know the task that is asked about, so that its images should be left; else the
            images of tasks that it knows are asked about, which should be kept.
    """

    threshold: float = 4.0
    strangers: bool = False

    def measure(self, shop: Workshop) -> Measured:
        """The share of each task's test pictures that are rightly left, or kept, in per cent."""
        known = [_mean(patches) for patches in _known(shop)]
        row = []
        for t, task in enumerate(shop.tasks):
            others = [rows for s, rows in enumerate(known) if s != t or not self.strangers]
            features = _mean(_asked(shop, task))
            left = _distances(others, features).amin(1) > self.threshold * features.shape[1]
            row.append(100 * (left == self.strangers).float().mean().item())
        return Measured([row])


def _known(shop: Workshop) -> list[Tensor]:
    """The patches of each task's measured images."""
    return [_patches(shop, task, asked=False) for task in shop.tasks]


def _asked(shop: Workshop, task: Task) -> Tensor:
    """The patches of a task's test pictures."""
    return _patches(shop, task, asked=True)


@functools.lru_cache(maxsize=32)  # both splits of every task, for all routers of a workshop
@torch.no_grad()
def _patches(shop: Workshop, task: Task, asked: bool) -> Tensor:
    """What arrives at the projector, shape `(images, patches, d)`, float32."""
    base = shop.base()
    seen: list[Tensor] = []
    projector = base.get_submodule(find_projectors(base)[0])
    projector.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(features_of(args, kwargs)), with_kwargs=True
    )
    parts = []
    examples = shop.questions(task) if asked else shop.samples(task)
    for batch in batches_of(examples, Collator(shop.tiny, prompts_only=True), BATCH_SIZE):
        base(**batch)
        features = seen.pop()
        parts.append(features.reshape(len(batch["input_ids"]), -1, features.shape[-1]).float())
    return torch.cat(parts)


def _cosine(known: Sequence[Tensor], features: Tensor, prototypes: int = 1, centre: bool = True) -> Tensor:
    """The task of the prototype of the largest cosine, after subtracting the mean of the tasks' means."""
    means = torch.stack([rows.mean(0) for rows in known])
    origin = means.mean(0) if centre else torch.zeros_like(means[0])
    if prototypes == 1:
        places, owners = means, torch.arange(len(known))
    else:
        clusters = [KMeans(prototypes, n_init=4, random_state=0).fit(rows.numpy()).cluster_centers_ for rows in known]
        places = torch.cat([torch.from_numpy(centres).float() for centres in clusters])
        owners = torch.arange(len(known)).repeat_interleave(prototypes)
    cosines = torch.nn.functional.cosine_similarity((features - origin)[:, None], places - origin, dim=-1)
    return owners[cosines.argmax(1)]


def _gaussian(known: Sequence[Tensor], features: Tensor) -> Tensor:
    return _distances(known, features).argmin(1)


def _distances(known: Sequence[Tensor], features: Tensor) -> Tensor:
    metric = shared_metric([centred(rows) for rows in known], [len(rows) for rows in known])
    return metric.squared_distances(features, torch.stack([rows.mean(0) for rows in known]))


def routers() -> Iterator[Measurement]:
    """Every way of routing; cosines of centred means are the paper's."""
    study = partial(RouterStudy, group=GROUP)
    yield study("cosine", about="", router=_cosine)
    yield study("not centred", about="", router=partial(_cosine, centre=False))
    yield study("pooled by the maximum", about="", router=_cosine, pool=partial(torch.amax, dim=1))
    for count in PROTOTYPES:
        yield study(f"{count} prototypes a task", about="", router=partial(_cosine, prototypes=count))
    yield study("Gaussian", about="", router=_gaussian)
    for images in IMAGES:
        yield study(f"cosine, {images} images", about="", router=_cosine, images=images)
        yield study(f"Gaussian, {images} images", about="", router=_gaussian, images=images)
    for threshold in THRESHOLDS:
        for strangers, what in ((False, "own images kept"), (True, "unknown task left")):
            name = f"{what}, above {threshold:g}"
            yield AbstentionStudy(name, ABSTENTION, "", threshold=threshold, strangers=strangers)
