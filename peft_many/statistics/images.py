"""The hooks that pool the features of each image where they arrive at the projectors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families.image_layouts import image_rows_of
from ..families.projector_call import features_of
from ..routing.calls import current_image_call, projector_call

# Images of a task whose features are kept, to see how they differ among themselves; the prototype is of all.
MOST_KEPT_IMAGES = 1024


@dataclass
class PooledFeatures:
    """The pooled features of the images that reached one projector."""

    total: Tensor  # their sum, (d,), float64
    images: int = 0
    kept: list[Tensor] = field(default_factory=list)  # the first `MOST_KEPT_IMAGES`, in parts of (n, d), float32

    def add(self, pooled: Tensor) -> None:
        """Add rows of shape `(n, d)`."""
        self.total = self.total + pooled.double().sum(0)
        self.kept.append(pooled[: max(0, MOST_KEPT_IMAGES - self.images)].float())
        self.images += len(pooled)


class PrototypeHooks:
    """Pools the features of each image at the input of each projector while the `with` block runs."""

    def __init__(self, projectors: Mapping[str, nn.Module]) -> None:
        self.projectors = projectors
        self._found: dict[str, PooledFeatures] = {}
        self._worthless: str | None = None  # the first projector with such features
        self._hooks = ExitStack()

    def __enter__(self) -> PrototypeHooks:
        for name, projector in self.projectors.items():
            self._hooks.enter_context(projector.register_forward_pre_hook(partial(self._pool, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def check(self) -> None:
        """A `RuntimeError` if features held NaN or Inf. It waits for this: other processes may need the whole pass."""
        if self._worthless is not None:
            raise RuntimeError(f"The vision features at '{self._worthless}' hold NaN or Inf.")

    def result(self) -> dict[str, PooledFeatures]:
        """What each projector that saw an image got."""
        self.check()
        return dict(self._found)

    def _pool(self, name: str, projector: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = features_of(args, kwargs)
        if not features.is_floating_point():
            return  # ids of tokens that are no part of an image
        call, images = projector_call(projector, args, kwargs), current_image_call()
        rows = image_rows_of(call)
        if rows.continues:
            return  # parts of images that were seen as a whole
        if images is not None:
            images.decided[projector] = features.new_empty(0)
        pooled = rows.pool(call.vision_features)[rows.real_images.to(features.device)].cpu()
        if not torch.isfinite(pooled).all():
            self._worthless = self._worthless or name
        nothing = PooledFeatures(torch.zeros(pooled.shape[-1], dtype=torch.float64))
        self._found.setdefault(name, nothing).add(pooled)
