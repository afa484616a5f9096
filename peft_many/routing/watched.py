"""Methods of single modules or caches that do something more than the class's: watchers, one around another."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache


class WatchedMethod:
    """Does what the module's own method does; what it does besides is told by subclasses.

    An object that holds its module, not a bound function, so that copies and pickles of a model watch themselves.
    """

    def __init__(self, module: nn.Module | Cache, name: str) -> None:
        self.module = module
        self.name = name
        self.inner: WatchedMethod | None = vars(module).get(name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own_method())  # which `generate` reads

    def own_method(self) -> Callable[..., Any]:
        """The next watcher, or the class's method."""
        return self.inner or getattr(type(self.module), self.name).__get__(self.module)

    def of(self, module: nn.Module) -> WatchedMethod:
        """The same for another module."""
        other = copy.copy(self)
        other.module, other.inner = module, self.inner and self.inner.of(module)
        return other

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_method()(*args, **kwargs)


def watch(module: nn.Module | Cache, name: str, watcher: type[WatchedMethod]) -> bool:
    """Set a watcher on the instance, if the class has such a method and the watcher is not there yet."""
    if not callable(getattr(type(module), name, None)) or _find(module, name, watcher) is not None:
        return False
    setattr(module, name, watcher(module, name))
    return True


def unwatch(module: nn.Module, name: str, watcher: type[WatchedMethod]) -> None:
    """Undo `watch`; other watchers stay."""
    found = _find(module, name, watcher)
    if found is None:
        return
    around = vars(module)[name]
    if around is found and found.inner is None:
        delattr(module, name)
    elif around is found:
        setattr(module, name, found.inner)
    else:
        while around.inner is not found:
            around = around.inner
        around.inner = found.inner


def watch_replica(module: nn.Module) -> None:
    """If this is a shallow copy, such as `nn.DataParallel` makes for each GPU, have its parts watch themselves."""
    if any(method.module is not module for method in _watchers(module).values()):
        for part in module.modules():
            for name, method in _watchers(part).items():
                setattr(part, name, method.of(part))


def _watchers(module: nn.Module) -> dict[str, WatchedMethod]:
    return {name: method for name, method in vars(module).items() if isinstance(method, WatchedMethod)}


def _find(module: nn.Module | Cache, name: str, watcher: type[WatchedMethod]) -> WatchedMethod | None:
    method = vars(module).get(name)
    while isinstance(method, WatchedMethod) and not isinstance(method, watcher):
        method = method.inner
    return method if isinstance(method, watcher) else None
