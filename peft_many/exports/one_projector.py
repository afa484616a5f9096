"""One projector in place of all: fitted in closed form to what each task's own makes of images like the task's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..algebra.affine import affine_fit
from ..algebra.spread import gaussian_draws
from ..files.adapter import TaskAdapter
from ..files.stored_delta import UnmergeableAdapterError
from ..merging.mean_projectors import average_projectors

_DRAWS = 4096  # image means of each task
# Measured on Mini-UCIT's tiny LLaVA (six tasks, one seed, 150 pictures each): the mean of the projectors answers
# 18.6 % rightly, this 29.2, 26.4, 27.0 and 26.0 with 1e-3, 1e-2, 3e-2 and 1e-1; routing 70.6.
_RIDGE = 1e-3


class ProjectorBench:
    """The base model's projector, on which those of the tasks are run with drawn image means; all float64.

    Args:
        name (`str`): The projector's path.
        module (`torch.nn.Module`): The base model's.
        tasks (`Sequence[TaskAdapter]`): All tasks; those that saw no image take no part.

    Raises:
        UnmergeableAdapterError: A task's projector does not fit the base model's.
    """

    def __init__(self, name: str, module: nn.Module, tasks: Sequence[TaskAdapter]) -> None:
        for task in tasks:
            _check_fits(name, module, task)
        self.name = name
        self._base = _plain(module)
        self._own = _plain(module)
        self.tasks = [task for task in tasks if name in task.projectors or name in task.statistics.projectors]
        self.can_run = all(self._draws(task) is not None for task in self.tasks) and self._works_on_rows()

    def mean(self) -> dict[str, Tensor]:
        """The mean of the tasks' weights, over those that trained it; nothing if none has a say."""
        _, tensors = average_projectors([task for task in self.tasks if self.name in task.projectors])
        prefix = f"{self.name}."
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    def fitted(self) -> dict[str, Tensor] | None:
        """The least-squares fit, layer after layer; `None` where the projector cannot be run on image means.

        Each linear layer is fitted to what the task's own projector gives there, on the inputs that it gets from the
        layers fitted before; other weights (norms) are the tasks' means. Weighted by the tasks' weights, with a small
        pull to the mean of their layers. A task that trained none has the base model's.
        """
        mean, heard = self.mean(), [task for task in self.tasks if task.weight > 0]
        if not mean or not self.can_run:
            return None
        fitted = copy.deepcopy(self._base)
        fitted.load_state_dict({key: tensor.double() for key, tensor in mean.items()})
        for path in self._linears:
            layer = fitted.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            parts = ((task.weight, *self._inputs_and_targets(fitted, task, path)) for task in heard)
            bias = None if layer.bias is None else layer.bias.data
            weight, shift = affine_fit(parts, layer.weight.data, bias, _RIDGE)
            layer.weight.data.copy_(weight)
            if shift is not None:
                layer.bias.data.copy_(shift)
        return {key: tensor.to(mean[key].dtype) for key, tensor in fitted.state_dict().items()}

    def loss(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """`‖P(x) − P_t(x)‖ / ‖P_t(x) − P_0(x)‖` for each task that trained it, on its drawn image means.

        Where it cannot be run on these, the same of the weights. No tensors are the base model's.
        """
        tensors, found = tensors or self._base.state_dict(), {}
        for task in self.tasks:
            if self.name not in task.projectors:
                continue
            own, base = task.projectors[self.name], self._base.state_dict()
            if self.can_run:
                x = self._drawn(task)
                by_own, by_base = self._run(own, x), self._run(base, x)
                lost, learnt = (self._run(tensors, x) - by_own).norm(), (by_own - by_base).norm()
            else:
                lost, learnt = _distance(tensors, own), _distance(base, own)
            found[task.name] = (lost / learnt.clamp(min=1e-30)).item()
        return found

    def _inputs_and_targets(self, fitted: nn.Module, task: TaskAdapter, path: str) -> tuple[Tensor, Tensor]:
        x = self._drawn(task)
        own = self._with(task.projectors.get(self.name, self._base.state_dict()))
        return _passing(fitted, path, x)[0], _passing(own, path, x)[1]

    def _run(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = self._with(tensors)(x)
        return output

    def _with(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        self._own.load_state_dict({key: tensor.double() for key, tensor in tensors.items()})
        return self._own

    def _drawn(self, task: TaskAdapter) -> Tensor:
        drawn = self._draws(task)
        assert drawn is not None
        return drawn

    def _draws(self, task: TaskAdapter) -> Tensor | None:
        """Image means as the task's, `(draws, 1, d)`, from a Gaussian; the same each time."""
        seen = task.statistics.projectors.get(self.name)
        if seen is None or seen.spread is None:
            return None
        generator = torch.Generator().manual_seed(0)
        return (seen.prototype.double() + gaussian_draws(seen.spread, _DRAWS, generator))[:, None]

    def _works_on_rows(self) -> bool:
        """Whether it can be run on image means, row by row; and its linear layers, in the order in which they run."""
        x = self._drawn(self.tasks[0])[:3] if self.tasks else torch.zeros(0)
        order: list[str] = []
        hooks = [
            module.register_forward_hook(lambda module, args, output, path=path: order.append(path))
            for path, module in self._base.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            with torch.no_grad():
                whole, one = self._base(x), self._base(x[:1])
            rowwise = whole.shape[:2] == x.shape[:2] and torch.allclose(whole[:1], one)
        except Exception:  # a projector may be any code; one that wants patches in a grid, say, cannot be run so
            rowwise = False
        finally:
            for hook in hooks:
                hook.remove()
        self._linears = order[: len(order) // 2]
        return rowwise and 0 < len(self._linears) == len(set(self._linears))


def _check_fits(name: str, module: nn.Module, task: TaskAdapter) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in task.projectors.get(name, {}).items()}
    wrong = next((key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)), None)
    if found and wrong is not None:
        raise UnmergeableAdapterError(
            f"{task.source}: tensor '{name}.{wrong}' has shape {found.get(wrong, 'none, it is missing')}, but in this "
            f"base model {expected.get(wrong, 'there is no such tensor')}: it was trained on another one."
        )


def _passing(module: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a linear layer and what comes out of it, as rows."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.get_submodule(path).register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        with torch.no_grad():
            module(x)
    finally:
        hook.remove()
    ((inputs, outputs),) = seen
    return inputs.flatten(0, -2), outputs.flatten(0, -2)


def _plain(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().double().eval()


def _distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> Tensor:
    parts = [(one[key].double() - two[key].double()).square().sum() for key in two if two[key].is_floating_point()]
    return torch.stack(parts).sum().sqrt()


def benches(model: nn.Module, tasks: Sequence[TaskAdapter]) -> Iterator[ProjectorBench]:
    """One for each projector that any task trained.

    Raises:
        UnmergeableAdapterError: The model does not have it, or another one.
    """
    modules = dict(model.named_modules())
    for name in sorted({name for task in tasks for name in task.projectors}):
        if name not in modules:
            raise UnmergeableAdapterError(
                f"The adapter's projector '{name}' matches no module of {type(model).__name__}: it was trained on "
                "another base model."
            )
        yield ProjectorBench(name, modules[name], tasks)
