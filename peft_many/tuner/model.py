"""`MAnyModel`: PEFT's LoRA tuner, plus the projector, plus covariances on the layers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_compiled_module
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from peft.utils import PeftWarning
from torch import nn
from transformers import PreTrainedModel

from ..families.parts import check_ends, match_projectors, parts_of
from ..files.errors import MalformedAdapterError
from ..files.patterns import check_patterns
from ..files.statistics import AdapterStatistics
from ..files.tensor_keys import KEY_PREFIX
from ..files.untrusted import NONSENSE_ERRORS, check_deciding
from ..records import MergeRecord, merge_of
from ..routing.gates import GateTarget
from ..routing.watching import unwatch_calls, watch_calls
from .adapter_names import trouble_with
from .batch_norms import keep_running_statistics, release_running_statistics
from .config import MAnyConfig
from .gated_linear import gate_layers
from .instruction_routers import forget_instructions, route_instructions
from .layers import hang_on_layers
from .loaded_keys import check_projectors_are_there, require_known, with_current_keys
from .mergeable import warn_of_trouble
from .merged_linear import exact_weights, restore_merge, round_merge, use_merged_linears
from .projector import Mixing, ProjectorMixture, ProjectorWrapper
from .targets import default_targets, update_expert_names


class MAnyModel(LoraModel):
    """The tuner of [`MAnyConfig`] adapters: a [`~peft.LoraModel`] that also gives each adapter a projector of its own.

    See [`~peft.LoraModel`] for the arguments.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args: Any, **kwargs: Any):
        # Or else for a single adapter (`inject_adapter_in_model`), as transformers does, which renames by itself.
        self._is_for_peft_model = isinstance(peft_config, dict)
        super().__init__(_uncompiled(model) if self._is_for_peft_model else model, peft_config, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: MAnyConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None and not peft_config.target_parameters:
            parts = parts_of(self.model)
            if parts is not None:
                peft_config.target_modules = default_targets(self.model, peft_config, parts)
            elif isinstance(self.model, PreTrainedModel) and (
                model_config.get("model_type") not in self.target_module_mapping
            ):
                # Without images PEFT's own default for the architecture stands; this is for those it has none for.
                all_layers = peft_config.layers_to_transform is None
                peft_config.target_modules = (
                    "all-linear" if all_layers else default_targets(self.model, peft_config, parts)
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        # PEFT refuses Mamba's fused projections to types that it knows to be like LoRA, by their names.
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap the projector and the language model's layers for one adapter; see [`~peft.LoraModel`].

        If anything fails, the projectors are as before.
        """
        if (problem := trouble_with(adapter_name, model)) is not None:
            warnings.warn(problem, PeftWarning, stacklevel=2)
        config: MAnyConfig = self.peft_config[adapter_name]
        source, weights = getattr(config, "loaded_from", None), getattr(config, "loaded_weights", None)
        keys = weights.keys_backing(config) if weights is not None else ()
        with ExitStack() as rollback:
            self._wrap_projectors(model, adapter_name, config, rollback)
            if source is not None:
                if not config.__dict__.pop("patterns_checked", False):
                    # With the names of the wrapped projectors, which PEFT goes through too
                    check_patterns(config, [name for name, _ in model.named_modules()], source)
                check_projectors_are_there(keys, model, _projector_keys(model, adapter_name, config), source)
            if config.target_modules is not None:
                update_expert_names(config, model)
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except NONSENSE_ERRORS as error:
                if source is None:
                    raise
                raise MalformedAdapterError(
                    f"{source}: adapter_config.json cannot be applied to {type(model).__name__}: {error!r:.300}."
                ) from error
            merge = config.merge
            if merge is not None:
                gate_layers(model, adapter_name, merge)
                use_merged_linears(model, adapter_name)
                route_instructions(model, adapter_name, merge)
            rollback.pop_all()
        keep_running_statistics(model)
        if merge is not None and merge.is_routed:
            watch_calls(model)
        if isinstance(config.statistics, AdapterStatistics):
            hang_on_layers(model, adapter_name, config.statistics)
        warn_of_trouble(model, adapter_name, config, self._is_for_peft_model)

    def _wrap_projectors(self, model: nn.Module, adapter_name: str, config: MAnyConfig, rollback: ExitStack) -> None:
        """Give the adapter its projectors; how to take them away again goes on the stack `rollback`."""
        if config.projector_modules is None:
            parts = parts_of(model)
            projectors = [] if parts is None else list(parts.projectors)
            if not projectors and parts is not None:
                raise ValueError(
                    f"No projector was found in {type(model).__name__}: {parts.doubt} "
                    "Name it by `projector_modules`, or pass `projector_modules=[]` to adapt the language model only."
                )
            check_ends(model, projectors)
        else:
            projectors = match_projectors(model, config.projector_modules)
        config.projector_modules = projectors
        if config.merge is not None:
            routed = {name: of for old, of in config.merge.routing.items() for name in match_projectors(model, [old])}
            config.merge = dataclasses.replace(config.merge, routing=routed)
        if projectors:
            # PEFT saves, loads and activates what is named here, and keeps LoRA out of it.
            kept = config.modules_to_save or []
            config.modules_to_save = [*kept, *(name for name in projectors if name not in kept)]
        active = adapter_name in self.active_adapters
        for name in projectors:
            parent_name, _, child = name.rpartition(".")
            parent, module = model.get_submodule(parent_name), model.get_submodule(name)
            mixing = _mixing(config.merge, name, adapter_name)
            if isinstance(module, ProjectorWrapper):
                wrapper = module
                rollback.callback(wrapper.delete_adapter, adapter_name, wrapper.active_adapters)
                wrapper.update(adapter_name, mixing=mixing)
            else:
                _check_trainable(name, module)
                for parameter in module.parameters():
                    rollback.callback(parameter.requires_grad_, parameter.requires_grad)
                wrapper = ProjectorWrapper(module, adapter_name, mixing=mixing)
                wrapper.set_adapter(adapter_name if active else [], inference_mode=config.inference_mode)
                rollback.callback(setattr, parent, child, module)
                setattr(parent, child, wrapper)
            if self._is_for_peft_model and hasattr(config, "loaded_from"):
                wrapper.looked_up.add(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=with_current_keys(state_dict, model, adapter_name),
        )
        check_deciding(state_dict, config, adapter_name)
        require_known(remapped, model, adapter_name)  # PEFT ignores other keys, which leaves an adapter untrained
        return remapped

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, torch.Tensor]:
        """See PEFT's, which gives LoRA's tensors only; the projectors' stay in the file too."""
        others = {key: tensor for key, tensor in output_state_dict.items() if self.prefix not in key}
        return others | super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        restore_merge(self.model, adapter_name)  # or else what PEFT casts is what was rounded
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            round_merge(self.model, adapter_name, self.peft_config[adapter_name])
            for module in self.model.modules():
                if isinstance(module, ProjectorWrapper) and adapter_name in module.modules_to_save:
                    module.to_float32(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's; unlike in [`~peft.LoraModel`] its forward hooks run, which gated adapters need."""
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """See PEFT's, which leaves the hooks of `adapter_names` behind if the forward pass fails."""
        failed: BaseException | None = None
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            try:
                yield
            except BaseException as error:
                failed = error
        if failed is not None:
            raise failed

    def delete_adapter(self, adapter_name: str) -> None:
        """See [`~peft.LoraModel`]."""
        super().delete_adapter(adapter_name)
        forget_instructions(self.model)
        if not any(config.merge is not None and config.merge.is_routed for config in self.peft_config.values()):
            unwatch_calls(self.model.modules())
        if not self.peft_config:
            release_running_statistics(self.model.modules())

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """See [`~peft.LoraModel`]; of merges it takes the exact weights."""
        with ExitStack() as exact:
            for name in self.peft_config.keys() & set(adapters):
                exact.enter_context(exact_weights(self.model, name, self.peft_config[name]))
            super().add_weighted_adapter(adapters, *args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights; see [`~peft.LoraModel`]. Of a gated merge it folds the merged LoRA."""
        _warn_of_folding(self, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            _warn_of_folding(self, adapter_names)
            for name in adapter_names or self.active_adapters:
                restore_merge(self.model, name)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        release_running_statistics(model.modules())
        forget_instructions(model)
        if any(isinstance(module, ProjectorMixture) for module in model.modules()):
            # The model keeps routing, but its class knows nothing of a mixture: saved and loaded as what it calls
            # itself, it would come back with a randomly initialised projector.
            if isinstance(model, PreTrainedModel):
                model.save_pretrained = functools.partial(_refuse_saving, type(model).__name__)
        else:
            unwatch_calls(model.modules())
        return model


def _warn_of_folding(tuner: MAnyModel, adapter_names: list[str] | None) -> None:
    for name in adapter_names or tuner.active_adapters:
        merge = merge_of(tuner.peft_config.get(name))
        if merge is not None and merge.options.gate_lora:
            warnings.warn(
                f"The adapter '{name}' is a merge with `gate_lora`. What is chosen for each input cannot be "
                "folded into the base model: it will use the merged LoRA for all inputs.",
                PeftWarning,
                stacklevel=3,
            )


def _uncompiled(model: nn.Module) -> nn.Module:
    """The model inside a compiled one, whose modules have other names."""
    if not is_compiled_module(model):
        return model
    said = "The compiled base model was unwrapped for the adapter; compile the PEFT model that is returned."
    warnings.warn(said, PeftWarning, stacklevel=5)
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _check_trainable(name: str, projector: nn.Module) -> None:
    for parameter in projector.parameters():
        if not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao"):
            raise ValueError(
                f"The projector '{name}' is quantised, so it cannot have a trainable copy. Leave it out (for "
                f"bitsandbytes: `llm_int8_skip_modules=['{name}', 'lm_head']`), or pass `projector_modules=[]`."
            )


def _refuse_saving(model: str, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"This {model} holds a routed projector, which cannot be saved as part of a plain model: "
        "loading it would leave the projector untrained. Save the PEFT model before `merge_and_unload()` instead."
    )


def _projector_keys(model: nn.Module, adapter_name: str, config: MAnyConfig) -> dict[str, list[str]]:
    """By projector of an adapter, what its tensors are called in its weights file."""
    wrappers: dict[str, Any] = {name: model.get_submodule(name) for name in config.projector_modules or []}
    return {
        name: [f"{KEY_PREFIX}{name}.{key}" for key in wrapper.modules_to_save[adapter_name].state_dict()]
        for name, wrapper in wrappers.items()
    }


def _mixing(merge: MergeRecord | None, projector: str, adapter_name: str) -> Mixing | None:
    """How to make the mixture at a projector; `None` where the adapter has a projector of its own."""
    if merge is None or projector not in merge.routing:
        return None
    routed, gate = merge.routing[projector], None
    if merge.options.gate_lora:
        gate = GateTarget(adapter_name, tuple(merge.names.index(name) for name in routed.names), len(merge.tasks))
    return functools.partial(ProjectorMixture, routed=routed, options=merge.options, gate=gate)
