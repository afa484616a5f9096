"""Watchers around one method: each comes and goes without the others."""

import copy
import pickle
from typing import Any

import pytest
from torch import nn

from peft_many.routing.watched import WatchedMethod, unwatch, watch


class Greeter(nn.Module):
    def greet(self, name: str) -> str:
        return f"hello {name}"


class Loud(WatchedMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_method()(*args, **kwargs).upper()


class Polite(WatchedMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_method()(*args, **kwargs) + ", please"


def test_watchers_stand_around_each_other_and_leave_in_any_order() -> None:
    for first, second in ((Loud, Polite), (Polite, Loud)):
        module = Greeter()
        assert watch(module, "greet", Loud)
        assert watch(module, "greet", Polite)
        assert not watch(module, "greet", Loud)
        assert module.greet("you") == "HELLO YOU, please"
        unwatch(module, "greet", first)
        assert module.greet("you") == ("hello you, please" if first is Loud else "HELLO YOU")
        unwatch(module, "greet", second)
        unwatch(module, "greet", second)
        assert module.greet("you") == "hello you"
        assert "greet" not in vars(module)


def test_methods_that_a_class_lacks_are_not_watched() -> None:
    assert not watch(Greeter(), "insult", Loud)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copys_watchers_watch_the_copy(duplicate: Any) -> None:
    module = Greeter()
    watch(module, "greet", Loud)
    watch(module, "greet", Polite)
    twin = duplicate(module)
    assert twin.greet("you") == "HELLO YOU, please"
    assert twin.greet.module is twin
    assert twin.greet.inner.module is twin
