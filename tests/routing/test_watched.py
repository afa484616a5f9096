"""A method of one module that does something more than the class's."""

import copy
import inspect
import pickle
import weakref
from typing import Any

import pytest
from torch import nn

from peft_many.routing.watched import WatchedMethod, arguments_of, unwatch, watch, watch_replica


class Greeter(nn.Module):
    def greet(self, name: str) -> str:
        return f"hello {name}"


class Polite(WatchedMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_method()(*args, **kwargs) + ", please"


def shout(name: str) -> str:
    return f"HEY {name}"


@pytest.mark.parametrize("patch", [None, shout])
def test_a_module_gets_its_own_method_back(patch: Any) -> None:
    module = Greeter()
    if patch is not None:  # as somebody else may have done
        module.greet = patch
    assert watch(module, "greet", Polite)
    assert not watch(module, "greet", Polite)
    own = "HEY you" if patch else "hello you"
    assert module.greet("you") == f"{own}, please"
    assert list(inspect.signature(module.greet).parameters) == ["name"]
    unwatch(module)
    unwatch(module)
    assert module.greet("you") == own
    assert vars(module).get("greet") is patch


def test_methods_that_a_class_lacks_are_not_watched() -> None:
    assert not watch(Greeter(), "insult", Polite)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copys_watchers_watch_the_copy(duplicate: Any) -> None:
    module = Greeter()
    watch(module, "greet", Polite)
    twin = duplicate(module)
    assert twin.greet("you") == "hello you, please"
    assert twin.greet.module is twin


def test_a_shallow_copys_watchers_watch_the_copy() -> None:
    module = nn.Sequential(Greeter())
    watch(module[0], "greet", Polite)
    replica = module[0]._replicate_for_data_parallel()
    watch_replica(replica)
    assert replica.greet.module is replica
    assert module[0].greet.module is module[0]


def test_a_module_is_not_kept_by_its_own_watcher() -> None:
    module = Greeter()
    watch(module, "greet", Polite)
    method, reference = module.greet, weakref.ref(module)
    del module
    assert reference() is None
    with pytest.raises(ReferenceError, match="The model whose `greet` is called is gone"):
        method("you")


def test_arguments_are_known_by_name() -> None:
    assert arguments_of(Greeter().greet, ("you",), {}) == arguments_of(Greeter().greet, (), {"name": "you"})
    assert arguments_of(Greeter().greet, (), {}) == {}
