"""Methods of single modules or caches that do something more than the class's."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache


class WatchedMethod:
    """Stands in for a method; subclasses are called in its place, and do more than `own_method`.

    An object that knows its module, not a bound function, so that copies and pickles of a model watch themselves. It
    knows it weakly: in a circle of references a deleted model would keep its memory until Python looks for circles.
    """

    def __init__(self, module: nn.Module | Cache, name: str) -> None:
        self._module = weakref.ref(module)
        self.name = name
        self.patch: Callable[..., Any] | None = vars(module).get(name)  # somebody else's, on this very module

    @property
    def module(self) -> Any:
        """The module or cache whose method it is."""
        module = self._module()
        if module is None:
            raise ReferenceError(f"The model whose `{self.name}` is called is gone; keep a reference to it.")
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _module=weakref.ref(state["_module"]))

    def on(self, module: nn.Module) -> WatchedMethod:
        """The same for a copy of the module."""
        own = copy.copy(self)
        own.__setstate__({"_module": module})
        return own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own_method())  # which `generate` reads

    def own_method(self) -> Callable[..., Any]:
        """What the method was before it was watched."""
        return self.patch or getattr(type(self.module), self.name).__get__(self.module)


def arguments_of(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method's call, by name."""
    return {**inspect.signature(method).bind_partial(*args).arguments, **kwargs} if args else dict(kwargs)


def watch(module: nn.Module | Cache, name: str, watcher: type[WatchedMethod]) -> bool:
    """Set a watcher on the instance, if the class has such a method and it is not watched yet."""
    if not callable(getattr(type(module), name, None)) or isinstance(vars(module).get(name), WatchedMethod):
        return False
    setattr(module, name, watcher(module, name))
    return True


def unwatch(module: nn.Module) -> None:
    """Give a module its own methods back."""
    for name, watched in _watched(module).items():
        delattr(module, name)
        if watched.patch is not None:
            setattr(module, name, watched.patch)


def watch_replica(module: nn.Module) -> None:
    """If this is a shallow copy, such as `nn.DataParallel` makes for each GPU, have its parts watch themselves."""
    if any(method.module is not module for method in _watched(module).values()):
        for part in module.modules():
            for name, method in _watched(part).items():
                setattr(part, name, method.on(part))


def _watched(module: nn.Module) -> dict[str, WatchedMethod]:
    return {name: method for name, method in vars(module).items() if isinstance(method, WatchedMethod)}
