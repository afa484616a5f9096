"""The routed projector: one task's projector copy, or the mixture of all tasks' projectors, in PEFT's wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import recursively_apply
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..algebra.routing import task_weights, tasks_that_take
from ..families.image_layouts import image_rows_of
from ..families.image_rows import ImageRows
from ..families.projector_call import features_of
from ..records import MergeOptions, RoutedProjector
from ..records.options import BOTH, INSTRUCTIONS
from ..routing.calls import current_image_call, projector_call
from ..routing.gates import GateTarget, SeenImages, note_images, with_instructions
from ..routing.task_router import TaskRouter


class ProjectorMixture(TaskRouter):
    """CPM: mixes the outputs of the task projectors, `Σ_t α_t(image) P_t(v)`, weights by visual prototypes.

    The weights are computed in float32 from mean-pooled features of each image. Each projector sees only the images
    that it has a weight for, all in one call.
    """

    def __init__(
        self, template: nn.Module, routed: RoutedProjector, options: MergeOptions, gate: GateTarget | None = None
    ) -> None:
        device = next((parameter.device for parameter in template.parameters()), torch.device("cpu"))
        super().__init__(routed, device)
        assert options.temperature is not None
        self.trained = [task.trained for task in routed.tasks]
        self.temperature = options.temperature
        self.top_k = options.top_k
        self.abstain_above = options.abstain_above
        self.routed = routed
        self.gate = gate  # the LoRA layers that go by the same weights or by instructions, if any do
        self.tells_gate = options.gates_by_images
        self.route_by = options.route_by
        # Keys that no adapter is called by: PEFT filters state dicts by ".<adapter name>.".
        self.experts = nn.ModuleDict(
            {
                f"task_{t}": remove_hook_from_module(copy.deepcopy(template), recurse=True)
                for t, trained in enumerate(self.trained)
                if trained
            }
        )
        self.base: nn.Module | None = None
        self._returns_tensor = True  # until seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the projector, with its arguments; tasks without a projector of their own use `self.base`."""
        return self.mix(self.base, *args, **kwargs)

    # Data choose the experts, which is no matter for a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def mix(self, base: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
        """The mixed output for the projector's arguments; the first one holds the vision features."""
        of_tasks = [self.experts[f"task_{t}"] if trained else base for t, trained in enumerate(self.trained)]
        if self.abstain_above is not None:
            of_tasks.append(base)
        experts = list(dict.fromkeys(of_tasks))  # tasks without a projector of their own share the base model's
        if len(experts) == 1 and self.gate is None:
            return _call(experts[0], *args, **kwargs)
        if not features_of(args, kwargs).is_floating_point():  # ids of tokens such as those around an image
            return torch.stack([_call(expert, *args, **kwargs) for expert in of_tasks[: len(self.trained)]]).mean(0)
        call = projector_call(self, args, kwargs)
        rows = image_rows_of(call)
        by_task = self._decide(rows, call.vision_features)
        if self.abstain_above is not None:
            # Not one less their sum, whose rounding would send every image through the base model's projector too.
            left = (by_task == 0).all(dim=-1, keepdim=True)
            by_task = torch.cat([by_task, left.to(by_task)], dim=-1)
        return self._mix_images(rows, _sums_by_expert(by_task, experts, of_tasks), experts, args, kwargs)

    def _decide(self, rows: ImageRows, features: Tensor) -> Tensor:
        """The tasks' weights for each image, on the host, which has to know the experts: the one wait for a GPU.

        Of images that were seen as a whole already, those of then.
        """
        call = current_image_call()
        if rows.continues:
            assert call is not None
            return call.decided[self]
        pooled = rows.pool(features)
        by_task = self.task_weights(pooled).cpu()
        if self.gate is not None:
            seen = SeenImages(by_task, self._fits(pooled), rows)
            if self.tells_gate:
                note_images(self.gate, seen)
            if self.route_by in (INSTRUCTIONS, BOTH):
                by_task = with_instructions(self.gate, seen, alone=self.route_by == INSTRUCTIONS)
        if call is not None:
            call.decided[self] = by_task
        return by_task

    def _mix_images(
        self,
        rows: ImageRows,
        weights: Tensor,
        experts: list[nn.Module | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """`Σ_e α_e(image) P_e(v)` over the experts that have a weight for an image, `(images, experts)`."""
        carried = weights != 0  # NaN counts, so that broken features stay broken
        busy = carried.any(dim=0).nonzero()[:, 0].tolist()
        if len(busy) < 2:  # none if there are no images
            return _call(experts[busy[0] if busy else 0], *args, **kwargs)
        if not self._returns_tensor or not rows.can_cut(args, kwargs):
            carried = torch.ones_like(carried)
        mixed: Any = None
        for e in busy:
            some_args, some_kwargs = rows.cut(carried[:, e], args, kwargs)
            output = _call(experts[e], *some_args, **some_kwargs)
            if self._returns_tensor and not isinstance(output, Tensor):
                self._returns_tensor = False  # such outputs are mixed with all images in all of them
                return self._mix_images(rows, weights, experts, args, kwargs)
            if not isinstance(output, (Tensor, list, tuple, ModelOutput, type(None))):
                raise TypeError(
                    f"A projector returned {type(output).__name__}; only those that return tensors, or lists of "
                    "tensors, can be mixed. `MAnyConfig(projector_modules=[])` leaves the projector as it is."
                )
            mixed = rows.add_weighted(mixed, output, weights[:, e], carried[:, e])
        return _cast(mixed, features_of(args, kwargs).dtype)

    def task_weights(self, pooled: Tensor) -> Tensor:
        """What each task counts for each image, `(images, tasks)`, float32; all zero where none is resembled."""
        prototypes = self.prototypes.to(pooled.device)
        return task_weights(pooled, prototypes, self.metric, self.temperature, self.top_k, self.limits)

    def _fits(self, pooled: Tensor) -> Tensor | None:
        """Which tasks take each image, `(images, tasks)`, bool, on the CPU; `None` if any may."""
        return tasks_that_take(pooled, self.prototypes.to(pooled.device), self.metric, self.limits)

    @property
    def limits(self) -> list[float] | None:
        """From which squared distance on each task takes no image, if from any."""
        return self.routed.limits(self.abstain_above)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Some models read attributes of their projector, such as `spatial_merge_size`.
            experts = None if name == "experts" else getattr(self, "experts", None)
            value = getattr(next(iter(experts.values())), name) if experts else None
            if value is None or isinstance(value, nn.Module):  # one expert's parts are not the mixture's
                raise
            return value


def _sums_by_expert(weights: Tensor, experts: list[nn.Module | None], of_tasks: list[nn.Module | None]) -> Tensor:
    """What each expert's output counts for each image, `(images, experts)`: the sum over the tasks it serves."""
    if len(experts) == len(of_tasks):
        return weights
    places = torch.tensor([experts.index(expert) for expert in of_tasks])
    return weights.new_zeros(len(weights), len(experts)).index_add_(1, places, weights)


def _call(expert: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
    """Run one expert in its own dtype and return in that of the features."""
    assert expert is not None
    features = features_of(args, kwargs)
    if not features.is_floating_point():
        return expert(*args, **kwargs)
    own = _dtype_of(expert) or features.dtype
    args, kwargs = _cast((args, kwargs), own, only=features.dtype)
    return _cast(expert(*args, **kwargs), features.dtype)


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in module.parameters()]


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _take_dtypes(module: nn.Module, original: nn.Module) -> None:
    """Bring a projector's copy, or those of a mixture, to the dtypes of the original."""
    dtypes = {name: tensor.dtype for name, tensor in original.state_dict(keep_vars=True).items()}
    for copied in module.experts.values() if isinstance(module, ProjectorMixture) else [module]:
        for name, tensor in copied.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))


def _cast(values: Any, dtype: torch.dtype, only: torch.dtype | None = None) -> Any:
    """What a projector takes or returns with its floating-point tensors in one dtype, or only those of another one."""

    def is_meant(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and only in (None, value.dtype)

    return recursively_apply(lambda tensor: tensor.to(dtype), values, test_type=is_meant)


Mixing = Callable[[nn.Module], ProjectorMixture]  # from the base model's projector


class ProjectorWrapper(ModulesToSaveWrapper):
    """PEFT's `modules_to_save` wrapper for a projector: a task's trainable copy, or a merge's mixture."""

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, mixing: Mixing | None = None, **kwargs: Any
    ) -> None:
        super(ModulesToSaveWrapper, self).__init__(module_to_save, adapter_name, mixing=mixing, **kwargs)
        self.looked_up: set[str] = set()

    def update(self, adapter_name: str, mixing: Mixing | None = None, **kwargs: Any) -> None:
        if mixing is not None and adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = mixing(self.original_module)
        super().update(adapter_name, **kwargs)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """See PEFT's; nothing for adapters whose tensors `MAnyModel` looks up by their names then and now."""
        return {} if adapter_name in self.looked_up else super().adapter_state_dict_load_map(adapter_name)

    def to_float32(self, adapter_name: str) -> None:
        """Train an adapter's copy in float32, as PEFT does LoRA's weights: bfloat16 would round small steps away."""
        module = self.modules_to_save[adapter_name]
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in module.parameters()):
            module.float()

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super()._forward_wrapped(*args, **kwargs)
        return self._run(self.modules_to_save[self.active_adapters[0]], args, kwargs)

    def _forward_wrapped_mixed_batch(self, x: Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.modules_to_save[active_adapter], (x, *args), kwargs)

    def _run(self, active: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an adapter makes of the features, in the dtype that the base model would give it in."""
        if isinstance(active, ProjectorMixture):
            output = active.mix(self.original_module, *args, **kwargs)
        elif _dtypes(active) == _dtypes(self.original_module):
            return active(*args, **kwargs)
        else:
            output = _call(active, *args, **kwargs)
        of_base = _dtype_of(self.original_module)
        ids = not features_of(args, kwargs).is_floating_point()
        return _cast(output, of_base) if ids and of_base is not None else output

    def _mixed_batch_forward(self, *args: Any, **kwargs: Any) -> Any:
        # Of images there may be more or fewer than rows, and PEFT sends them to the adapters as if they were rows.
        mixtures = [copy for copy in self.modules_to_save.values() if isinstance(copy, ProjectorMixture)]
        if mixtures or not isinstance(self.original_module, nn.Linear):
            raise ValueError(
                "`adapter_names` cannot be passed together with images: the rows of a batch cannot go through "
                "different copies of the projector. Run each adapter's rows by themselves, after `set_adapter`."
            )
        return super()._mixed_batch_forward(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if not merge:
            # PEFT's own wrapper leaves the trained copy behind, but `unload()` promises the base model.
            return self.original_module
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        _take_dtypes(module, self.original_module)
        if isinstance(module, ProjectorMixture):
            module.gate = None  # the LoRA layers are gone
            if len(module.trained) == 1 and module.abstain_above is None:
                return module.experts["task_0"] if module.trained[0] else self.original_module
            if not all(module.trained) or module.abstain_above is not None:
                module.base = self.original_module
        return module
