"""`collect_statistics`: one forward-only pass that measures an adapter's layer inputs and its images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import nn

from ..algebra.devices import device_of
from ..algebra.spectrum import DEFAULT_ENERGY, Truncation
from ..families.parts import find_projectors, language_model_linears, parts_of, text_encoder
from ..files.peft_methods import described, is_plain_lora
from ..files.processes import ALONE, all_processes
from ..files.statistics import AdapterStatistics, TaskStatistics
from ..records.words import counted
from ..tuner.config import MAnyConfig
from ..tuner.layers import adapted_layers, hang_on_layers
from ..tuner.registration import give_statistics
from .answers import AnswerGradients, answer_gradients
from .forward import check_batches
from .gathering import gather_inputs, kept
from .images import PrototypeHooks
from .inputs import CovarianceHooks
from .instructions import InstructionHook
from .measurable import adapter_to_measure, base_of, further_layers, is_sharded, unwrapped, weights_of
from .measuring import Measuring
from .prompts import PromptHooks
from .tokens import TokenRows


def collect_statistics(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str | None = None,
    max_samples: int | None = 256,
    also_measure: Sequence[str] | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error_budget: float | None = None,
    dtype: torch.dtype = torch.float16,
    weigh_tokens: bool = False,
    keep_prompts: int = 0,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    share_inputs: bool = True,
    across_processes: bool = True,
    progress: bool = True,
) -> AdapterStatistics:
    """Measure what merging needs to know about a trained adapter, on samples of its task.

    Runs the model forwards, without gradients and with the adapter active, and records three things: for every input
    of the adapted layers the covariance `C = E[x xᵀ]` over tokens, padding left out; for every multimodal projector
    the mean and covariance of the image features that reach it; and those of the instructions, by the base model's
    embeddings of the tokens before the first answer in `labels`. From then on `layer.covariance[adapter_name]` holds
    the covariances, and `save_pretrained` and `push_to_hub` write all of it to `adapter_statistics.safetensors`.

    32 to 128 samples are enough. Layers that read the same tensor (q, k and v) share one covariance. Each is kept as
    its leading eigen-directions and an even remainder, as `rank`, `energy` or `error_budget` say.

    Memory beside the model's: with `s = 1.25 · rank`, `10 · s · d` bytes for an input of width `d` in bfloat16 and
    `12 · s · d` in other dtypes, or `8 · d²` if it is no wider than `s`; 2.4 GB for a 7B model in bfloat16. For one
    input at a time, up to `30 · s · d` bytes more and a copy of its tokens (float16: in float32; whole covariances: of
    4096 or `d` of them, in float64). Saved, up to `rank · d` in `dtype`. Time: beside the forward passes, two matrix
    products of `tokens × d × s` for each input.

    The model is afterwards as it was, also if the pass fails: training modes, active adapter, hooks, gradients and
    random states. Under `accelerate launch` each process measures its share of the data; all must make this call, and
    all get the result.

    Args:
        model (`torch.nn.Module`):
            A [`~peft.PeftModel`], or a transformers model with adapters; also as prepared by Accelerate (DDP). The
            adapter may be a [`MAnyConfig`] or [`~peft.LoraConfig`] one, or of another PEFT method that can be merged
            (docs/how-to/other-peft-methods.md).
        dataloader (`Iterable`):
            Batches as for training: mappings of the model's keyword arguments, with padding marked by
            `attention_mask`, or tuples of positional ones.
        adapter_name (`str`, *optional*):
            The adapter to measure. Defaults to the active one.
        max_samples (`int`, *optional*, defaults to 256):
            Stop after the batch that reaches this number of rows, over all processes; `None` reads all.
        also_measure (`Sequence[str]` or `str`, *optional*):
            Linear layers to measure besides the adapted ones, matched like `target_modules`, or `"all-linear"`: layers
            that other tasks train and this one does not. Those that read an adapted layer's input are measured anyway.
        rank (`int`, *optional*):
            The most directions kept of a covariance. Defaults to 256, and to all with `energy=1.0` and no
            `error_budget`, which holds whole matrices of `d × d` in float64.
        energy (`float`, *optional*):
            The share of each covariance's trace that is kept, in (0, 1], as far as `rank` allows. Defaults to
            `MAnyConfig.energy`, and to 0.9999 for adapters of other types.
        error_budget (`float`, *optional*):
            Keep as few directions, up to `rank`, as change a merged delta's outputs by no more than this share of
            their size, 0.05 say, in place of `energy`. Fewer are kept where no delta reads an input. LoRA only.
        dtype (`torch.dtype`, defaults to `torch.float16`):
            What the kept directions are stored in: `torch.float16`, or `torch.int8` for half the size.
        weigh_tokens (`bool`, defaults to `False`):
            Count tokens by how far they move the answers, for better plain merges, by a backward pass for each forward
            pass (docs/method.md). Needs `labels`, and twice the memory of training; the same for all tasks of a merge.
        keep_prompts (`int`, defaults to 0):
            Keep the prompts of so many samples, word for word, and mean and covariance of their image tokens where
            these enter the language model, so that [`refit_merge`] needs no samples. 16 are enough. Needs `labels`.
        forward_fn (`Callable`, *optional*):
            `forward_fn(model, batch)`, for models that are not called as above.
        share_inputs (`bool`, defaults to `True`):
            Measure a tensor that arrives at several layers once. `False` measures every layer by itself.
        across_processes (`bool`, defaults to `True`):
            Combine what all processes of a distributed run measured; all of them must make this call. `False` measures
            in this process alone, for calls that only some processes make.
        progress (`bool`, defaults to `True`):
            Show a progress bar.

    Returns:
        [`AdapterStatistics`]: What was measured, of one task.

    Raises:
        UnmergeableAdapterError: The adapter cannot be merged; no batch is read then.
        ValueError: There is no such adapter, it is a merge, the dataloader is empty, or weights are sharded in a way
            that cannot be measured.
        RuntimeError: An activation holds NaN or Inf, layers shared an input in some batches only, or another process
            failed.
        TimeoutError: Another process did not make the call.

    Example:

        ```py
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_many import MAnyConfig, collect_statistics

        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100}
        >>> config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
        >>> base = LlamaForCausalLM(config)
        >>> model = get_peft_model(base, MAnyConfig(r=4, task_name="demo"))  # and train it
        >>> batches = [{"input_ids": torch.randint(0, 100, (4, 16))} for _ in range(8)]
        >>> statistics = collect_statistics(model, batches, progress=False)
        >>> statistics.tasks[0].samples
        32
        >>> model.save_pretrained("demo")  # with what was measured
        ```
    """
    peft_model = unwrapped(model)
    processes = all_processes("collect_statistics") if across_processes else ALONE

    def prepare() -> Measuring:
        check_batches(dataloader, max_samples, forward_fn)
        sharded = is_sharded(model, across_processes)
        name = adapter_to_measure(peft_model, adapter_name)
        base, config = base_of(peft_model), peft_model.peft_config[name]
        truncation = _truncation(config, rank, energy, error_budget, dtype)
        layers, projectors = adapted_layers(base, name), _projectors(base, config)
        answers = answer_gradients(base, sharded) if weigh_tokens else None
        inputs = _input_hooks(base, layers, also_measure, projectors, truncation.followed, share_inputs, answers)
        images = PrototypeHooks({path: base.get_submodule(path) for path in projectors})
        asked, prompts = InstructionHook(base), PromptHooks(base, keep_prompts)
        return Measuring(peft_model, base, name, layers, sharded, truncation, inputs, images, asked, prompts)

    measuring = processes.together(prepare)
    weights = processes.together(lambda: weights_of(peft_model, measuring.adapter_name, measuring.layers))
    samples = measuring.run(dataloader, max_samples, forward_fn, processes, progress)
    finish = partial(kept, measuring.truncation, weights.deltas)
    features = measuring.features(samples, processes)
    gathered = gather_inputs(processes.together(measuring.inputs.result), finish, processes, device_of(peft_model))
    config = peft_model.peft_config[measuring.adapter_name]
    task = replace(
        features,
        inputs=gathered.inputs,
        input_of=gathered.input_of,
        fingerprints=weights.fingerprints,
        shapes=weights.shapes,
        weighed=weigh_tokens,
    )
    _warn_of_little(task)
    measuring.asked.warn_of_untold()
    statistics = AdapterStatistics((task,))
    give_statistics(config, statistics)
    if config.auto_mapping is None:  # PEFT notes down the model's class only where no task type is said
        kind = type(measuring.base)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    hang_on_layers(measuring.base, measuring.adapter_name, statistics)
    return statistics


def _truncation(
    config: Any, rank: int | None, energy: float | None, error_budget: float | None, dtype: torch.dtype
) -> Truncation:
    if error_budget is not None and not is_plain_lora(config):
        raise ValueError(
            f"`error_budget` reads LoRA matrices, but the adapter {described(config)}; choose by `rank` or `energy`."
        )
    usual = config.energy if isinstance(config, MAnyConfig) else DEFAULT_ENERGY
    return Truncation(rank, usual if energy is None else energy, error_budget, dtype)


def _input_hooks(
    base: nn.Module,
    layers: Mapping[str, nn.Module],
    also_measure: Sequence[str] | str | None,
    projectors: Sequence[str],
    size: int | None,
    share: bool,
    answers: AnswerGradients | None,
) -> CovarianceHooks:
    """The hooks for the adapted layers and those asked for; the others are watched for shared inputs."""
    parts = parts_of(base)
    linears = {name: base.get_submodule(name) for name in language_model_linears(base, parts)}
    measured = {**layers, **{name: linears[name] for name in further_layers(linears, also_measure)}}
    bystanders = {name: layer for name, layer in linears.items() if name not in measured}
    visual = tuple(f"{name}." for name in [*(parts.towers if parts is not None else ()), *projectors])
    unmasked = {name for name in measured if name.startswith(visual)}
    tokens = TokenRows(measured, base, unmasked, text_encoder(base))
    return CovarianceHooks(measured, bystanders, tokens, size, share, answers)


def _projectors(base: nn.Module, config: Any) -> list[str]:
    """All projectors: tasks that do not train a projector need prototypes too, to be told from those that do."""
    own = getattr(config, "projector_modules", None) or []
    return list(dict.fromkeys([*own, *find_projectors(base)]))


def _warn_of_little(task: TaskStatistics) -> None:
    if task.samples == 1:
        warnings.warn(
            "The statistics are of a single sample, so a merge will keep of this task what matters to that one. Give "
            "more of the task's data; 32 to 128 samples are enough.",
            PeftWarning,
            stacklevel=3,
        )
    norms_of_B = [fingerprint[0] for fingerprint in task.fingerprints.values()]
    if not task.shapes and norms_of_B and not any(norms_of_B):  # of a plain LoRA, whose shapes need not be kept
        warnings.warn(
            "The adapter's LoRA is zero in all layers, as it is before training: a merge will keep nothing of this "
            "task. Train the adapter first, and measure it then.",
            PeftWarning,
            stacklevel=3,
        )
    unseen = sorted(name for name in task.input_of if task.tokens_of(name) == 0)
    if unseen:
        warnings.warn(
            f"No token reached {counted(len(unseen), 'adapted layer')} while measuring, among them '{unseen[0]}'. In "
            "a merge, this task will not count there. More samples may help.",
            PeftWarning,
            stacklevel=3,
        )
