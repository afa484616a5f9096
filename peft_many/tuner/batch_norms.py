"""Batch norms of the frozen base model: they stay as in inference, whoever puts the model in training mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

_HOOK = "peft_many_norm_hook"


def keep_running_statistics(model: nn.Module) -> None:
    """Let a base model's batch norms run in evaluation mode while they are frozen.

    Their running statistics would drift in training, and the tasks' adapters would no longer share one base model. By
    hooks on the norms, as `train()` may be called on any module around them. Copies that are trained have none.
    """
    kept = {*_norms_of_base(model).values()}
    release_running_statistics({*model.modules()} - kept)
    for module in kept:
        if _HOOK not in vars(module):
            # A plain function that gets the module, so that copies of a model keep themselves.
            setattr(module, _HOOK, module.register_forward_pre_hook(_run_as_in_inference))


def release_running_statistics(modules: Iterable[nn.Module]) -> None:
    """Leave modules as they were before `keep_running_statistics`."""
    for module in modules:
        handle = vars(module).pop(_HOOK, None)
        if handle is not None:
            handle.remove()


def drifting_batch_norms(model: nn.Module) -> list[str]:
    """The frozen batch norms of a base model, by their paths, whose running statistics move as it is now."""
    norms = _norms_of_base(model)
    return [path for path, norm in norms.items() if norm.training and _HOOK not in vars(norm) and _is_frozen(norm)]


def _norms_of_base(model: nn.Module) -> dict[str, nn.Module]:
    """By their paths, the modules with running statistics that are not inside a copy that an adapter trains."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    copied = {part for wrapper in wrappers for part in wrapper.modules_to_save.modules()}
    return {
        path: module
        for path, module in model.named_modules()
        if module not in copied and any(name == "running_mean" for name, _ in module.named_buffers(recurse=False))
    }


def _is_frozen(norm: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in norm.parameters())


def _run_as_in_inference(norm: nn.Module, args: Any) -> None:
    if norm.training and _is_frozen(norm):
        norm.eval()
