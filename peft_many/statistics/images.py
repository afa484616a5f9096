"""The hooks that pool the features of each image where they arrive at the projectors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from ..algebra.total import FiniteCheck
from ..families.image_layouts import image_rows_of
from ..families.projector_call import features_of
from ..routing.calls import current_image_call, projector_call
from .features import PooledFeatures, finished

_NOT_FINITE = "The vision features at '{}' hold NaN or Inf."


class PrototypeHooks:
    """Pools the features of each image at the input of each projector while the `with` block runs."""

    def __init__(self, projectors: Mapping[str, nn.Module]) -> None:
        self.projectors = projectors
        self._found: dict[str, PooledFeatures] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> PrototypeHooks:
        for name, projector in self.projectors.items():
            self._hooks.enter_context(projector.register_forward_pre_hook(partial(self._pool, name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def check(self) -> FiniteCheck:
        """Asks whether features held NaN or Inf. Other processes may need the whole pass, so not before."""
        return FiniteCheck({name: found.total.sum() for name, found in self._found.items()}, _NOT_FINITE)

    def result(self) -> dict[str, PooledFeatures]:
        """What each projector that saw an image got."""
        return finished(self._found, _NOT_FINITE)

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
        pooled = rows.pool(call.vision_features)
        if rows.real is not None:
            real = rows.real_images.nonzero()[:, 0]
            pooled = pooled.index_select(0, real.to(pooled.device, non_blocking=True))
        if name not in self._found:
            self._found[name] = PooledFeatures.none_of(pooled)
        self._found[name].add(pooled)
