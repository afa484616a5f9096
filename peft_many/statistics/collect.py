"""`collect_statistics`: one forward-only pass that measures an adapter's layer inputs and its images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftWarning
from torch import nn
from tqdm.auto import tqdm

from ..algebra.budget import rank_within
from ..algebra.covariance import Covariance
from ..algebra.spectrum import eigen_directions
from ..families.parts import find_projectors, image_encoder_name, language_model_linears, text_encoder
from ..files.peft_methods import described, is_plain_lora
from ..files.processes import current_processes, from_every_process, together
from ..files.statistics import DEFAULT_ENERGY, AdapterStatistics, TaskStatistics
from ..routing.watching import watching_calls
from ..tuner.config import MAnyConfig
from ..tuner.layers import adapted_layers, hang_on_layers
from ..tuner.registration import give_statistics
from .forward import batch_size, device_of, forward, masks_of, only_active, state_kept
from .gathering import gather_covariances, gather_prototypes
from .hooks import CovarianceHooks
from .measurable import adapter_to_measure, weights_of
from .prototype_hooks import PrototypeHooks

DEFAULT_RANK = 256
# A sketch follows this many directions more than it is asked for, as a share; its last ones are inaccurate.
OVERSAMPLING = 0.25


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str | None = None,
    max_samples: int | None = 256,
    target_modules: Sequence[str] | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error_budget: float | None = None,
    dtype: torch.dtype = torch.float16,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    share_inputs: bool = True,
    across_processes: bool = True,
    progress: bool = True,
) -> AdapterStatistics:
    """Measure what merging needs, in one forward-only pass over a task's data with the task's own adapter active.

    For every distinct input of the adapter's layers the covariance (second moment) `C = E[x xᵀ]`, with tokens
    masked by the batch's attention mask left out; for every projector the visual prototype, the mean over images of
    the mean-pooled projector input, and the images' covariance about it (docs/method.md; the paper's Low-rank
    Parameter Merging and Cross-modal Projection Merging). The result hangs on the layers
    (`layer.covariance[adapter_name]`) and is saved by `save_pretrained` and `push_to_hub` in
    `adapter_statistics.safetensors`.

    Inputs wider than `rank` are followed by a sketch of that many directions and a few more; no matrix of `in × in` is
    held. Narrower ones are summed up whole, in float64. Under `accelerate launch` every process measures its share of
    the data, all of them get the result of all, and all must make this call.

    The model's modes, active adapter, hooks, gradients and the random state are afterwards as before, also if the pass
    fails. Works on [`MAnyConfig`] and plain [`~peft.LoraConfig`] adapters, and on those of the other PEFT methods that
    can be merged (docs/how-to.md).

    Args:
        model (`torch.nn.Module`):
            A [`~peft.PeftModel`], or a transformers model with adapters; also as prepared by Accelerate (DDP).
        dataloader (`Iterable`):
            Batches as for training: mappings of the model's keyword arguments, whose `attention_mask` tells padding,
            or tuples of positional ones.
        adapter_name (`str`, *optional*):
            The adapter to measure. Defaults to the active one.
        max_samples (`int`, *optional*, defaults to 256):
            Stop after the batch that reaches this number of rows, over all processes; `None` reads all.
        target_modules (`Sequence[str]` or `str`, *optional*):
            Further linear layers to measure, by the end of their name, or `"all-linear"`: layers that other tasks
            train and this one does not. Layers that share an adapted layer's input are included anyway, at no cost.
        rank (`int`, *optional*):
            The most directions kept of a covariance. Defaults to 256, and to all with `energy=1.0` and no
            `error_budget`, which then holds whole matrices of `in × in`.
        energy (`float`, *optional*):
            Share of each covariance's energy that is kept, in (0, 1], as far as `rank` allows. Defaults to the
            config's, and to 0.9999 for plain LoRA adapters.
        error_budget (`float`, *optional*):
            Choose how many directions to keep, up to `rank`, by the error that a merged delta may have, as a share of
            the size of its outputs, and not by `energy`; 0.05 say. It keeps fewer where no delta reads the input's
            energy. Of LoRA adapters only.
        dtype (`torch.dtype`, defaults to `torch.float16`):
            What the directions that are kept are stored in: float16, or int8, which takes half (docs/how-to.md).
        forward_fn (`Callable`, *optional*):
            `forward_fn(model, batch)`, for models that are not called as above.
        share_inputs (`bool`, defaults to `True`):
            Store the covariance of an input that arrives at several layers (q, k and v) once.
        across_processes (`bool`, defaults to `True`):
            Bring together what all processes of a distributed run measured. `False` measures in this process alone,
            for calls that only some processes make.
        progress (`bool`, defaults to `True`):
            Show a progress bar.

    Returns:
        [`AdapterStatistics`]: What was measured, of one task.

    Raises:
        ValueError: There is no such adapter, it is a merge, or the dataloader is empty.
        RuntimeError: An activation holds NaN or Inf, layers shared an input in some batches only, the adapter's
            weights are sharded over processes, or another process failed.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1, but it is {max_samples}.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"`energy` must be in (0, 1], but it is {energy}.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, but it is {rank}.")
    if dtype not in (torch.float16, torch.int8):
        raise ValueError(f"`dtype` must be torch.float16 or torch.int8, but it is {dtype}.")
    if error_budget is not None and not error_budget > 0:
        raise ValueError(f"`error_budget` must be positive, but it is {error_budget}.")
    state = current_processes() if across_processes else None
    processes = 1 if state is None else state.num_processes
    peft_model: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    adapter_name = adapter_to_measure(peft_model, adapter_name)
    config = peft_model.peft_config[adapter_name]
    base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    layers = adapted_layers(base, adapter_name)
    if error_budget is not None and not is_plain_lora(config):
        raise ValueError(
            f"`error_budget` reads LoRA matrices, but adapter '{adapter_name}' {described(config)}; choose by `rank` "
            "or `energy`."
        )
    linears = {name: base.get_submodule(name) for name in language_model_linears(base)}
    measured = layers | {name: linears[name] for name in _further_layers(linears, target_modules)}
    bystanders = {name: layer for name, layer in linears.items() if name not in measured}
    projectors, encoder = _projectors(base, config), text_encoder(base)
    visual = tuple(f"{name}." for name in [image_encoder_name(base), *projectors] if name)
    unmasked = {name for name in measured if name.startswith(visual)}
    share = config.energy if energy is None and isinstance(config, MAnyConfig) else energy or DEFAULT_ENERGY
    if rank is None and (share < 1.0 or error_budget is not None):
        rank = DEFAULT_RANK
    if rank is None and dtype == torch.int8:
        raise ValueError(
            "`energy=1.0` keeps whole matrices in float64; `dtype=torch.int8` needs a `rank` or less energy."
        )
    size = None if rank is None else rank + math.ceil(OVERSAMPLING * rank)
    adapter = weights_of(peft_model, adapter_name, layers)
    covariances = CovarianceHooks(measured, bystanders, size, share_inputs, encoder, unmasked, base)
    prototypes = PrototypeHooks({name: base.get_submodule(name) for name in projectors})

    def keep(covariance: Covariance, names: list[str]) -> Covariance:
        if rank is None or (error_budget is None and covariance.width <= rank and dtype == torch.float16):
            return covariance  # whole; saving truncates it to the config's energy
        spectrum = eigen_directions(covariance)
        if error_budget is None:
            kept = spectrum.truncate(share, rank=rank)
        else:
            deltas = [adapter.deltas[name] for name in names if name in adapter.deltas]
            kept = spectrum.keep(min(rank_within(spectrum, deltas, error_budget), rank))
        return kept.in_half_precision() if dtype == torch.float16 else kept.in_eight_bits()

    def measure() -> tuple[int, dict[str, Covariance]]:
        samples = 0
        with (
            state_kept(peft_model),
            only_active(peft_model, adapter_name),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled for one pass and its hooks, it would not pay
            watching_calls(base),
            covariances,
            prototypes,
        ):
            peft_model.eval()
            quiet = not progress or (state is not None and not state.is_main_process)
            with tqdm(total=max_samples, desc=f"Measuring '{adapter_name}'", unit="sample", disable=quiet) as bar:
                for batch in dataloader:
                    batch = send_to_device(batch, device_of(peft_model))
                    covariances.masks = masks_of(batch, encoder is not None)
                    forward(peft_model, batch, forward_fn)
                    covariances.end_of_batch()
                    rows = batch_size(batch)
                    samples += rows
                    bar.update(rows * processes)
                    if max_samples is not None and samples * processes >= max_samples:
                        break
        return samples, covariances.result()

    samples, found = measure() if state is None else together(measure)
    gathered = [samples] if state is None else from_every_process(samples)
    if sum(gathered) == 0:
        raise ValueError("The dataloader gave no batch, so there is nothing to measure.")

    seen = gather_prototypes(prototypes.result(), state is not None)
    task = TaskStatistics(
        name=getattr(config, "task_name", None),
        samples=sum(gathered),
        images=seen.images,
        covariances=gather_covariances(found, keep, state is not None),
        prototypes=seen.prototypes,
        spreads=seen.spreads,
        fingerprints=adapter.fingerprints,
        shapes=adapter.shapes,
    )
    _warn_of_unseen(task)
    statistics = AdapterStatistics((task,))
    if energy is not None and isinstance(config, MAnyConfig):
        config.energy = energy
    give_statistics(config, statistics, DEFAULT_ENERGY if energy is None else energy)
    hang_on_layers(base, adapter_name, statistics)
    return statistics


def _further_layers(names: Iterable[str], target_modules: Sequence[str] | str | None) -> set[str]:
    """The layers that `target_modules` asks for, with PEFT's meaning of the argument."""
    if target_modules is None:
        return set()
    if target_modules == "all-linear":
        return set(names)
    wanted = LoraConfig(target_modules=target_modules if isinstance(target_modules, str) else list(target_modules))
    return {name for name in names if check_target_module_exists(wanted, name)}


def _projectors(base: nn.Module, config: Any) -> list[str]:
    """All projectors: tasks that do not train a projector need prototypes too, to be told from those that do."""
    own = getattr(config, "projector_modules", None) or []
    return [*own, *(name for name in find_projectors(base) if name not in own)]


def _warn_of_unseen(task: TaskStatistics) -> None:
    unseen = sorted(name for name, covariance in task.covariances.items() if covariance.tokens == 0)
    if unseen:
        warnings.warn(
            f"No token reached {len(unseen)} adapted layers while measuring, among them '{unseen[0]}'. In a merge, "
            "this task will have no say there. More samples may help.",
            PeftWarning,
            stacklevel=3,
        )
