"""Whether a merge fits a base model, checked before the model is touched, and how to leave the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..families.linears import features_of_linear, is_linear
from ..files.errors import UnmergeableAdapterError
from ..files.patterns import check_patterns
from ..files.tensor_keys import KEY_PREFIX
from ..files.upstream import children_of
from ..routing.watching import unwatch_calls
from ..tuner.config import MAnyConfig


def check_fits_model(config: MAnyConfig, shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Refuse a merge unless every tensor of its weights file, by key, has its place in the base model."""
    shapes = {key.removeprefix(KEY_PREFIX): shape for key, shape in shapes.items()}
    modules = dict(model.named_modules())
    projectors = config.projector_modules or []
    # Some are the adapters' own words. PEFT goes through the names of the wrapped projectors' parts too.
    check_patterns(config, [*modules, *_parts_once_wrapped(projectors, [*modules, *shapes])], "The merge")
    config.patterns_checked = True
    layers = {key.removesuffix(".lora_A.weight"): None for key in shapes if key.endswith(".lora_A.weight")}
    for kind, names in (("layer", layers), ("projector", projectors)):
        unknown = next((name for name in names if name not in modules), None)
        if unknown is not None:
            raise UnmergeableAdapterError(
                f"The adapters' {kind} '{unknown}' matches no module of {type(model).__name__}: they were trained on "
                "another base model."
            )
    for layer in layers:
        width, height = shapes[f"{layer}.lora_A.weight"][1], shapes[f"{layer}.lora_B.weight"][0]
        _check_layer(layer, modules[layer], width, height, model)
    extra = next((name for name in modules if name not in layers and check_target_module_exists(config, name)), None)
    if extra is not None:
        raise UnmergeableAdapterError(
            f"{type(model).__name__} has a layer '{extra}', for which the adapters hold no tensor although their "
            "`target_modules` match it: they were trained on another base model."
        )
    for projector in projectors:
        _check_copies(config, projector, shapes, modules[projector], model)


def _parts_once_wrapped(projectors: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    for projector in projectors:
        parts = [name.removeprefix(projector) for name in names if f"{name}.".startswith(f"{projector}.")]
        for inside in ("original_module", "modules_to_save.default"):
            yield from (f"{projector}.{inside}{part}" for part in parts)


def _check_layer(name: str, layer: nn.Module, width: int, height: int, model: nn.Module) -> None:
    if not is_linear(layer):
        raise UnmergeableAdapterError(
            f"'{name}' is no linear layer in this {type(model).__name__}, but a {type(layer).__name__}: the adapters "
            "were trained on another base model."
        )
    for side, found, expected in (
        ("input", features_of_linear(layer, 1), width),
        ("output", features_of_linear(layer, 0), height),
    ):
        if found is not None and found != expected:
            raise UnmergeableAdapterError(
                f"'{name}' has {found} {side} features in this {type(model).__name__}, but {expected} in the "
                "adapters: they were trained on a base model of another size."
            )


def _check_copies(
    config: MAnyConfig, projector: str, shapes: Mapping[str, tuple[int, ...]], module: nn.Module, model: nn.Module
) -> None:
    """Every copy of the projector, or their mean, must have the tensors of the base model's, no more and no fewer."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    copies: dict[str, dict[str, tuple[int, ...]]] = {}
    is_routed = config.merge is not None and projector in config.merge.routing
    inside = f"{projector}.experts." if is_routed else f"{projector}."
    for key, shape in shapes.items():
        if key.startswith(inside):
            name = key.removeprefix(inside)
            task, _, weight = name.partition(".") if is_routed else ("mean", "", name)
            copies.setdefault(task, {})[weight] = shape
    for found in copies.values():
        wrong = next((key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)), None)
        if wrong is not None:
            raise UnmergeableAdapterError(
                f"The adapters' tensor '{projector}.{wrong}' has shape {found.get(wrong, 'none, it is missing')}, but "
                f"in this {type(model).__name__} {expected.get(wrong, 'there is no such tensor')}: they were trained "
                "on another base model."
            )


@contextlib.contextmanager
def untouched_on_failure(model: nn.Module) -> Iterator[None]:
    """Wrap a model in the `with` block; if that fails, every module is put back where it was."""
    before = [(module, dict(children_of(module)), set(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        unwatch_calls(model.modules())
        for module, children, attributes in before:
            now = children_of(module)
            now.clear()
            now.update(children)
            for name in set(vars(module)) - attributes:  # what PEFT and image watching left on the module
                del vars(module)[name]
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        raise
