"""Forward passes over the same batches again and again, each of which begins where the last one ended."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..families.parts import parts_of
from ..families.structure import is_inside, members_of

# Of the machine's memory, what is left free: a pass whose outputs do not fit begins anew each time.
_LEFT_FREE = 0.15


class ResumedPasses:
    """Hands out what parts of a model gave in the last pass over a batch, in place of running them again.

    Refitting takes two passes for each layer, up to it; and what lies before its block gives the same as the last
    time. Parts are the blocks of the model's lists of blocks, and what else holds no layer that is refitted, as towers
    and embeddings. The code between them runs in each pass. Outputs are kept in the CPU's memory, of a list of blocks
    the last one's only.

    Args:
        model (`nn.Module`): The base model, with LoRA layers in it.
        layers (`Mapping[str, nn.Module]`): Those that change, by path, until they are [`settle`][]d.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        parts = parts_of(model)
        towers, projectors = (parts.towers, parts.projectors) if parts else ((), ())
        self._towers, self._projectors = set(towers), set(projectors)
        # The layers themselves too: some models call what is in a block without calling the block.
        units = {module: path for path, module in [*layers.items(), *_units(model, set(layers))]}
        self._units = {path: module for module, path in units.items()}
        self._changing = {name: {path for path in layers if is_inside(path, name)} for name in self._units}
        self._calls: dict[Hashable, list[_Call]] = {}

    def settle(self, paths: Collection[str]) -> None:
        """Layers that do not change any more."""
        for changing in self._changing.values():
            changing.difference_update(paths)

    @contextmanager
    def over(self, key: Hashable) -> Iterator[None]:
        """One pass over a batch, which `key` stands for, together with all weights that are not said to change.

        The pass is a `RuntimeError` if the model goes another way than before, and what it needs was not kept.
        """
        with _replaced(self._units, _Pass(self, self._calls.setdefault(key, [])).forward):
            yield

    def changes(self, unit: str) -> bool:
        """Whether there is a layer in it that is not settled."""
        return bool(self._changing[unit])

    def drop(self, calls: Sequence[_Call], reached: str) -> None:
        """Forget what nobody reads any more of the calls before the unit that a pass has `reached`.

        That are outputs of towers whose projector has run; and of the list of blocks that is being run, those before
        the last one, unless the model still holds them: LLaVA leaves out its towers' last blocks.
        """
        blocks = _list_of(reached)
        before = [i for i, call in enumerate(calls) if blocks and _list_of(call.unit) == blocks][:-1]
        projected = [i for i, call in enumerate(calls) if call.unit in self._projectors]
        for i, call in enumerate(calls):
            is_read = call.unit in self._towers and projected and i < projected[-1]
            if is_read or (i in before and not call.is_held()):
                call.drop()


class _Pass:
    """One pass: replays the calls of the last one in their order, and adds those that lie behind them."""

    def __init__(self, passes: ResumedPasses, calls: list[_Call]) -> None:
        self.passes, self.calls = passes, calls
        self.place = 0
        self.inside = False  # of a unit whose output will be kept
        self.ended = False  # a unit that changes has begun, and what comes after it depends on it

    def forward(self, unit: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """In place of a unit's own `forward`."""
        if self.ended or self.inside:
            return original(*args, **kwargs)
        if self.place < len(self.calls):
            if self.calls[self.place].unit == unit:
                self.place += 1
                return self.calls[self.place - 1].output()
            self._leave(unit)
        if self.passes.changes(unit):
            self.ended = True
            self.passes.drop(self.calls, unit)
            return original(*args, **kwargs)
        self.inside = True
        output = original(*args, **kwargs)
        self.inside = False
        memory = psutil.virtual_memory()
        if memory.available < _LEFT_FREE * memory.total:
            self.calls.clear()
            self.ended = True
        else:
            self.calls.append(_Call(unit, output))
            self.place += 1
        return output

    def _leave(self, unit: str) -> None:
        """Go another way than the last pass, from here on."""
        if any(call.is_dropped for call in self.calls[: self.place]):
            raise RuntimeError(
                f"The model did not run '{unit}' at this place when it read the same batch before, so that it cannot "
                "be refitted layer by layer."
            )
        del self.calls[self.place :]


class _Call:
    """What a unit gave."""

    def __init__(self, unit: str, output: Any) -> None:
        self.unit = unit
        self._devices: list[torch.device] = []
        self._given: list[StorageWeakRef] = []
        self.is_dropped = False
        self._kept = recursively_apply(self._copied, output)

    def output(self) -> Any:
        """The same again, or zeros in its place."""
        devices = iter(self._devices)
        self._given.clear()

        def copied(tensor: Tensor) -> Tensor:
            copy = tensor.to(next(devices), copy=True)
            self._given.append(StorageWeakRef(copy.untyped_storage()))
            return copy

        return recursively_apply(copied, self._kept)

    def is_held(self) -> bool:
        """Whether somebody holds a tensor of what was given last, or a view of one."""
        return not all(reference.expired() for reference in self._given)

    def drop(self) -> None:
        """Keep the shapes only."""
        if not self.is_dropped:
            self._kept = recursively_apply(lambda tensor: tensor.new_zeros(()).expand(tensor.shape), self._kept)
            self.is_dropped = True

    def _copied(self, tensor: Tensor) -> Tensor:
        self._devices.append(tensor.device)
        self._given.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach().to("cpu", copy=True)


def _units(model: nn.Module, layers: Collection[str], holder: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks of lists, and outside of them the largest modules that hold no layer of these paths, or are one."""
    for path, child in members_of(model, holder):
        is_block = path.rpartition(".")[0] != holder
        if is_block or path in layers or not any(is_inside(layer, path) for layer in layers):
            yield path, child
        else:
            yield from _units(model, layers, path)


@contextmanager
def _replaced(modules: Mapping[str, nn.Module], call: Callable[[str, Any, Any, Any], Any]) -> Iterator[None]:
    """Calls of modules, by path, go to `call(path, forward, args, kwargs)` while the block runs."""
    before = [(module, vars(module).get("forward")) for module in modules.values()]
    for path, module in modules.items():
        original = module.forward

        def forward(*args: Any, path: str = path, original: Any = original, **kwargs: Any) -> Any:
            return call(path, original, args, kwargs)

        module.forward = functools.wraps(original)(forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _list_of(unit: str) -> str:
    """The path of the list that a unit is a block of, or nothing."""
    parent, _, name = unit.rpartition(".")
    return parent if name.isdigit() else ""
