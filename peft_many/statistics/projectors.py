"""What an adapter's copies of projectors are while it is measured: their shapes, and whether they ever moved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.utils import ModulesToSaveWrapper, PeftWarning
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from ..files.fingerprints import state_fingerprint
from .measurable import whole


def unmoved_projectors(base: nn.Module, adapter_name: str, unseen: Sequence[str]) -> dict[str, list[float]]:
    """Fingerprints of the adapter's copies, among projectors that saw no image, that are still the base model's.

    Of others, which were trained on images, there is a warning.
    """
    found: dict[str, list[float]] = {}
    for name, pair in _copies(base, adapter_name, unseen).items():
        own, original = _states_of(pair)
        known = all(not tensor.is_meta and tensor.numel() for tensor in (*own.values(), *original.values()))
        if not known:
            warnings.warn(
                f"No image passed while measuring, and whether the adapter's projector '{name}' was trained cannot "
                "be told: its weights are not in memory. Merging will take it for trained, and refuse to route images "
                "to it. Measure with the whole model in memory.",
                PeftWarning,
                stacklevel=4,
            )
        elif all(torch.equal(tensor, original[key].to(tensor)) for key, tensor in own.items()):
            found[name] = state_fingerprint(own)
        else:
            warnings.warn(
                f"The adapter trained the projector '{name}', but no image passed while measuring, so that images "
                "cannot be routed to it in a merge. Measure on samples with images.",
                PeftWarning,
                stacklevel=4,
            )
    return found


def projector_shapes(
    base: nn.Module, adapter_name: str, projectors: Sequence[str]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """By projector that the adapter has a copy of, the shapes of the copy's tensors; of sharded ones, the whole's."""
    return {
        name: {
            key: tuple(getattr(tensor, "ds_shape", tensor.shape))
            for key, tensor in copied.state_dict(keep_vars=True).items()
        }
        for name, (copied, _) in _copies(base, adapter_name, projectors).items()
    }


def _copies(base: nn.Module, adapter_name: str, names: Sequence[str]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The modules among these that the adapter has a copy of: that, and the base model's own."""
    wrappers: dict[str, Any] = {name: base.get_submodule(name) for name in names}
    return {
        name: (wrapper.modules_to_save[adapter_name], wrapper.original_module)
        for name, wrapper in wrappers.items()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
    }


def _states_of(modules: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """Modules' state dicts, gathered if they are sharded, and brought here if Accelerate has offloaded them."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    with gather_params_ctx(parameters, modifier_rank=None), ExitStack() as here:
        for part in (part for module in modules for part in module.modules()):
            here.enter_context(align_module_device(part))
        return [{key: whole(tensor) for key, tensor in module.state_dict().items()} for module in modules]
