"""The model classes that vLLM is given, made of its own when it asks for them by name."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterable
from typing import Any
from unittest import mock

from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..algebra.routing import among_all
from .asked import merge_to_route_by
from .families import FAMILIES
from .merge import KEY_PREFIX, ServedMerge
from .projector import ServedProjector, images_lie, served

logger = init_logger(f"vllm.{__name__}")

EMBEDDED = ("image_embeds", "video_embeds")  # what comes behind the projectors already


def __getattr__(name: str) -> Any:
    """The class for an architecture, which may be followed by `@` and vLLM's version."""
    architecture = name.partition("@")[0]
    if architecture not in FAMILIES:
        raise AttributeError(name)
    return routed_model(architecture)


@functools.cache
def routed_model(architecture: str) -> type[Any]:
    """vLLM's class for an architecture in `FAMILIES`, which routes projectors if it is told a merge."""
    family = FAMILIES[architecture]
    stock = _of_vllm(family.model)

    class Routed(stock):  # type: ignore[valid-type, misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            merge = merge_to_route_by(vllm_config)
            if merge is not None and not merge.record.routing:  # it chooses LoRAs, which is the worker's
                merge = None
            self.__dict__["served_merge"] = merge
            if merge is None:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                return
            module, _, name = family.projector.partition(":")
            with mock.patch.object(_module_of_vllm(module), name, served(_of_vllm(family.projector))):
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            if vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") > 0:  # or there is no tower
                _route(self, merge)

        def embed_multimodal(self, **kwargs: Any) -> Any:
            if self.served_merge is None or not kwargs.keys().isdisjoint(EMBEDDED):
                return super().embed_multimodal(**kwargs)
            with images_lie(family.shares(kwargs)):
                return super().embed_multimodal(**kwargs)

        def task_weights(self, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            """What each task of the merge counts for each image, `(images, tasks)`: those that a gate goes by.

            Of the arguments of `embed_multimodal`. Of several projectors the last one counts, as it does there.
            """
            with images_lie(family.shares(kwargs)) as images:
                super().embed_multimodal(**kwargs)
            projector, weights, fits = images.decided[-1]
            names = self.served_merge.record.names
            places = [names.index(name) for name in projector.routed.names]
            weights = among_all(weights, places, len(names))
            return weights, None if fits is None else among_all(fits, places, len(names))

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
            if self.served_merge is None:
                return super().load_weights(weights)
            # In the folder of a routed model lies an adapter too, whose tensors nobody but us can place.
            of_base = ((name, tensor) for name, tensor in weights if not name.startswith(KEY_PREFIX))
            return super().load_weights(itertools.chain(of_base, self.served_merge.projector_tensors()))

    # vLLM tells some models by the names of their classes, as where it speculates.
    Routed.__name__, Routed.__qualname__ = stock.__name__, stock.__qualname__
    return Routed


def _module_of_vllm(name: str) -> Any:
    return importlib.import_module(f"vllm.model_executor.models.{name}")


def _of_vllm(place: str) -> type[Any]:
    """A class by `"module:Class"`."""
    module, _, name = place.partition(":")
    return getattr(_module_of_vllm(module), name)


def _route(model: Any, merge: ServedMerge) -> None:
    """Let the projectors that a merge routes do so."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name, routed in merge.record.routing.items():
        # A name ends with a dot where vLLM's mapping looks for one.
        here = name if mapper is None else mapper.apply_list([f"{name}."])[0].rstrip(".")
        projector = dict(model.named_modules()).get(here)
        if not isinstance(projector, ServedProjector):
            raise ValueError(
                f"The merge in '{merge.folder}' routes '{name}', which is no projector of this "
                f"{type(model).__name__}: it was made for another base model."
            )
        projector.route(routed, merge.record.options)
    tasks = ", ".join(merge.record.names)
    logger.info("Images are routed among the projectors of the tasks %s (%s).", tasks, merge.folder)
