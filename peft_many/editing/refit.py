"""Refitting a merge with calibration samples, layer by layer, to what the tasks' own adapters make of them."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..algebra.devices import device_of, float64_device
from ..algebra.lpm import LowRankDelta
from ..algebra.refit import LayerRefit
from ..algebra.scatter import SingularMergeError
from ..files.fingerprints import weight_fingerprint
from ..files.statistics import AdapterStatistics
from ..merging.operations import REFIT, operation
from ..records import MergeRecord
from ..statistics.answers import AnswerGradients, answer_gradients
from ..statistics.capture import LayerCapture, layers_by_input
from ..statistics.forward import forward, in_inference
from ..statistics.tokens import masks_of
from ..tuner.config import MAnyConfig
from ..tuner.layers import lora_layers
from ..tuner.merged_linear import exact_weights
from .calibration import check_can_be_refitted, check_numbers, samples_of
from .imagined import check_prompts, imagined
from .lora_pair import LoraPair, own_in_place, put_back
from .resumed import ResumedPasses
from .token_weights import squared_gradients

DEFAULT_REFIT_RIDGE = 1e-4
_TOKENS = 8192  # whose inputs and outputs are in float64 at once


def refit_merge(
    model: PeftModel,
    calibration: Mapping[str, Iterable[Any]] | None = None,
    *,
    targets: Literal["outputs", "deltas"] = "outputs",
    ridge: float = DEFAULT_REFIT_RIDGE,
    rank: int | None = None,
    max_samples: int | None = 128,
    weigh_tokens: bool = False,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> None:
    """Refit a merge's LoRA weights, in place, on a few samples of each task, or without any.

    LPM is the optimum of each layer on inputs as they are with one task's adapter. In the merge every layer changes
    the inputs of the next. This goes through the layers in the order in which they run, and fits each in closed form
    on the inputs that it gets in the merge so far:

    - `targets="deltas"`: to what the tasks' deltas make of these inputs (RegMean++, arXiv 2508.03121);
    - `targets="outputs"`: to what comes out of the layer when the task's own adapter is in place, which also makes up
      for what earlier layers changed. The result is brought to the rank by reduced-rank regression.

    Each distinct layer input takes two passes over all samples, through the block that it is in, and is fitted on the
    layer's own device. What the block before gave is kept in the CPU's memory, as long as that lasts. Projectors and
    routing stay as they are, and the statistics too, so that the refitted merge can still be merged further, from its
    tasks' own deltas.

    Args:
        model ([`~peft.PeftModel`]):
            What [`merge_adapter_sequence`] returned, or a merge that was loaded with its statistics.
        calibration (`Mapping[str, Iterable]`, *optional*):
            For each of the merge's tasks, by name, batches as for training; each is read once. Without it, samples are
            made up: prompts that were kept (`collect_statistics(keep_prompts=16)`), image tokens drawn from a
            Gaussian with the mean and covariance of the task's, and what the task's own adapter answers.
        targets (`str`, defaults to `"outputs"`): `"outputs"` or `"deltas"`, as above.
        ridge (`float`, defaults to 1e-4):
            `λ`, the share of the mean input energy with which each layer is pulled to the tasks' own deltas.
        rank (`int`, *optional*):
            The largest rank of a refitted layer; defaults to what the layer has in the merge, and cannot be more.
        max_samples (`int`, *optional*, defaults to 128):
            Of each task; `None` reads all. Without `calibration` each prompt gets pictures in turn until there are so
            many, or, if it is `None` or there are no pictures, one sample.
        weigh_tokens (`bool`, defaults to `False`):
            Count tokens by how far they move the answers, as in [`collect_statistics`]: one backward pass for each
            batch, which needs `labels`.
        forward_fn (`Callable`, *optional*):
            Runs the model on a batch, `forward_fn(model, batch)`, where `model(**batch)` is not right.
        progress (`bool`, defaults to `True`): Show a progress bar.

    Raises:
        ValueError: The model's active adapter is no merge with statistics, or `calibration` does not fit its tasks.
        RuntimeError: A layer saw no token, or other tokens in the merge than with a task's own adapter; activations
            hold NaN or Inf; the model runs other parts when it reads a batch again. The weights are then as before.

    Example:

        ```py
        >>> from peft_many import merge_adapter_sequence, refit_merge

        >>> merged = merge_adapter_sequence(base, ["iconqa", "clevr"])
        >>> refit_merge(merged, {"iconqa": dataloader, "clevr": dataloader}, max_samples=32)
        ```
    """
    if targets not in ("outputs", "deltas"):
        raise ValueError(f"`targets` must be 'outputs' or 'deltas', but it is {targets!r}.")
    check_numbers(ridge, rank, max_samples)
    if calibration is None and forward_fn is not None:
        raise ValueError("`forward_fn` runs the model on your batches; without `calibration` there are none.")
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    name, config, merge, statistics = _merge_to_refit(model, calibration)
    tasks = {task.name or "": task for task in statistics.tasks}
    layers = lora_layers(model.get_base_model(), name)
    if calibration is None:
        check_prompts(tasks, model.get_base_model(), layers)
    exact = exact_weights(model.get_base_model(), name, config)
    pairs = {path: LoraPair(layer, name) for path, layer in layers.items()}
    own = {task: _own_deltas(statistics, t, pairs) for t, task in enumerate(tasks)}
    with exact, put_back(pairs.values(), after_errors_only=True), in_inference(model, name):
        samples = {}
        for task, measured in tasks.items():
            if calibration is not None:
                samples[task] = samples_of(calibration[task], max_samples, task, device_of(model))
            elif measured.prompts is not None and measured.weight > 0:
                with own_in_place(pairs, own[task]):
                    samples[task] = imagined(model, measured.prompts, max_samples)
        weights = {task: measured.weight for task, measured in tasks.items()}

        def run(batch: Any) -> None:
            forward(model, batch, forward_fn)

        answers = answer_gradients(model.get_base_model(), sharded=False) if weigh_tokens else None
        passes = ResumedPasses(model.get_base_model(), layers)
        refit = _Refit(layers, pairs, own, weights, samples, run, targets == "outputs", ridge, rank, answers, passes)
        groups = layers_by_input(layers, lambda: run(next(iter(samples.values()))[0]))
        for group in tqdm(groups, desc="Refitting", unit="input", disable=not progress):
            refit.group(group)
    config.statistics = _rewritten(statistics, own, pairs)
    # What merging costs each task was told of the deltas before.
    config.merge = replace(
        merge,
        tasks=[replace(task, interference=None) for task in merge.tasks],
        operations=[*merge.operations, operation(REFIT, [*tasks], {"targets": targets, "ridge": ridge, "rank": rank})],
    )


@dataclass(frozen=True)
class _Refit:
    """What refitting one group of layers after another needs."""

    layers: Mapping[str, Any]  # the LoRA layers, by path
    pairs: Mapping[str, LoraPair]  # their weights, which are written
    own: Mapping[str, Mapping[str, LowRankDelta]]  # by task and layer, the task's own deltas
    weights: Mapping[str, float]  # `w_t` by task
    samples: Mapping[str, list[Any]]  # batches by task
    run: Callable[[Any], None]  # runs the model on a batch
    by_outputs: bool  # whether to fit what comes out of a layer, or what its delta makes of its inputs
    ridge: float
    rank: int | None
    answers: AnswerGradients | None  # what weighs tokens
    passes: ResumedPasses

    @functools.cached_property
    def squares(self) -> dict[str, dict[str, Tensor]]:
        """By task and layer, how far each token moves the answers of the task's own adapter."""
        found = {}
        if self.answers is not None:
            for task in self.samples:
                with own_in_place(self.pairs, self.own[task]):
                    found[task] = squared_gradients(self.layers, self.answers, self.samples[task], self.run)
        return found

    def group(self, group: Sequence[str]) -> None:
        """Refit layers that share an input."""
        width = self.pairs[group[0]].A.shape[1]
        fits = {
            path: LayerRefit(len(self.pairs[path].B), width, self.ridge, float64_device(self.pairs[path].A.device))
            for path in group
        }
        for task, weight in self.weights.items():
            trained = [path for path in group if path in self.own[task]]
            if weight == 0 or not trained:
                continue
            wanted = self._with_own_deltas(task, group) if self.by_outputs else None
            seen = self._observed(task, group)
            counts = None
            if self.answers is not None:
                counts = torch.stack([self.squares[task][path] for path in group]).sum(0).sqrt()
            for path in trained:
                own, x = self.own[task][path], seen.inputs(path)
                y = None if wanted is None else wanted.outputs(path)
                _check_tokens(path, task, x, y)
                try:
                    for rows, delta in _examples(x, y, self.layers[path], own, counts):
                        fits[path].add(rows, delta, own, weight * len(rows) / len(x))
                except FloatingPointError:
                    raise RuntimeError(f"On '{task}', what passes through '{path}' holds NaN or Inf.") from None
        for path, fit in fits.items():
            pair = self.pairs[path]
            try:
                pair.set(fit.solve(min(pair.A.shape[0], self.rank or pair.A.shape[0])))
            except SingularMergeError as error:
                raise RuntimeError(f"'{path}' cannot be refitted: {error}.") from None
        self.passes.settle(group)

    def _with_own_deltas(self, task: str, group: Sequence[str]) -> LayerCapture:
        """What the layers see and give where the task's own adapter is in place everywhere."""
        with own_in_place(self.pairs, self.own[task]):
            return self._observed(task, group, own=True)

    def _observed(self, task: str, group: Sequence[str], own: bool = False) -> LayerCapture:
        """One pass over a task's samples, up to the layers of the group."""
        capture = LayerCapture({path: self.layers[path] for path in group})
        for number, batch in enumerate(self.samples[task]):
            capture.masks = masks_of(batch, has_encoder=False)
            with self.passes.over((task, own, number)), capture:
                # In a context of its own: transformers' capturing of outputs does not clean up after a pass that is
                # cut short.
                contextvars.copy_context().run(self.run, batch)
        return capture


def _check_tokens(path: str, task: str, x: Tensor, y: Tensor | None) -> None:
    if len(x) == 0:
        raise RuntimeError(f"No token of '{task}' reached '{path}', so it cannot be refitted; more samples may help.")
    if y is not None and len(y) != len(x):
        raise RuntimeError(
            f"'{path}' saw {len(x)} tokens of '{task}' in the merge and {len(y)} with the task's own adapter, so "
            "outputs cannot be compared; `targets='deltas'` does not need them."
        )


def _examples(
    x: Tensor, y: Tensor | None, layer: Any, own: LowRankDelta, counts: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs in the merge and what the layer's delta should make of them, in float64, for some tokens at a time.

    Both are scaled by the root of how much the token `counts`.
    """
    for start in range(0, len(x), _TOKENS):
        tokens = slice(start, start + _TOKENS)
        rows = x[tokens].to(float64_device(x.device), torch.float64)
        if y is None:
            delta = rows @ own.A.to(rows).T @ own.B.to(rows).T
        else:
            delta = y[tokens].to(rows) - layer.get_base_layer()(x[tokens]).to(rows)
        root = 1.0 if counts is None else counts[tokens].to(rows).sqrt()[:, None]
        yield root * rows, root * delta


def _merge_to_refit(
    model: Any, calibration: Mapping[str, Iterable[Any]] | None
) -> tuple[str, MAnyConfig, MergeRecord, AdapterStatistics]:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`model` must be a PeftModel that holds a merge, but it is a {type(model).__name__}; "
            "`PeftModel.from_pretrained(base, folder)` loads a saved one."
        )
    names = model.active_adapters
    if len(names) != 1:
        raise ValueError("Exactly one adapter has to be active, and it has to be a merge.")
    config: Any = model.peft_config[names[0]]
    merge, statistics = check_can_be_refitted(config, f"Adapter '{names[0]}'", calibration)
    return names[0], config, merge, statistics


def _own_deltas(statistics: AdapterStatistics, t: int, pairs: Mapping[str, LoraPair]) -> dict[str, LowRankDelta]:
    """A task's own deltas by layer, on the CPU, apart from the weights that are written."""
    deltas = {path: statistics.own_delta(t, path, pairs[path].B.cpu()) for path in statistics.tasks[t].lora_A}
    return {path: LowRankDelta(A=delta.A, B=delta.B.clone()) for path, delta in deltas.items()}


def _rewritten(
    statistics: AdapterStatistics, own: Mapping[str, Mapping[str, LowRankDelta]], pairs: Mapping[str, LoraPair]
) -> AdapterStatistics:
    """The statistics of the refitted merge: no block of its weights is a task's any more."""
    prints = {path: weight_fingerprint(pair.scaling * pair.A.cpu(), pair.B.cpu()) for path, pair in pairs.items()}
    return AdapterStatistics(
        tuple(
            replace(
                task,
                lora_B={path: delta.B for path, delta in own[task.name or ""].items()},
                fingerprints={path: prints[path] for path in task.lora_A},
            )
            for task in statistics.tasks
        )
    )
