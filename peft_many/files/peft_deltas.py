"""The deltas of adapters that are no plain LoRA, computed by PEFT's own layers when the merge comes to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..algebra.devices import moved
from ..algebra.factoring import RankError, factored
from ..algebra.lpm import LowRankDelta
from ..families.linears import features_of_linear, is_linear
from ..families.module_names import names_on
from .bare_model import BareLinear, bare_model, dense_delta
from .errors import UnmergeableAdapterError
from .peft_methods import described, needs_base, rank_bound
from .statistics import TaskStatistics
from .stored_delta import Reading, StoredDelta, check_as_measured, check_finite
from .tensor_file import TensorFile
from .tensor_keys import KEY_PREFIX, TensorKeys, fingerprint_of

# Entries of the largest layer that is believed on the word of a statistics file; real ones have a third of that.
LARGEST_LAYER = 1 << 31
# Numbers in configs by which PEFT makes room before it looks at the tensors; real ones are hundreds.
LARGEST_SIZE = 1 << 14
_SIZES = ("r", "init_r", "hybrid_r", "num_vectors", "vector_length")


def deltas_by_peft(
    adapter: str,
    config: PeftConfig,
    weights: TensorFile,
    keys: TensorKeys,
    measured: TaskStatistics,
    base: nn.Module | None,
) -> dict[str, StoredDelta]:
    """The deltas of an adapter by layer. Its statistics know how large the layers are, and the base model does."""
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size > LARGEST_SIZE:
            raise UnmergeableAdapterError(
                f"{adapter}: its config gives `{name}` as {size}, which is beyond what any adapter has."
            )
    if base is not None:
        linears = _of_model(adapter, config, keys, base)
    elif needs_base(config):
        layer = next(iter(keys.own), "its layers")
        raise UnmergeableAdapterError(
            f"{adapter} {described(config)}: its delta on '{layer}' depends on the base weights. Merge it with "
            "`merge_adapter_sequence`, which has the base model."
        )
    else:
        linears = _of_statistics(adapter, config, keys, measured)
    try:
        model = bare_model(config, {key: weights[key] for key in weights if key not in keys.rest}, linears)
    except ValueError as error:
        raise UnmergeableAdapterError(f"{adapter} {described(config)}: {error}.") from error
    layers = _Layers(adapter, config, weights, keys, measured, linears, model)
    return {module: layers.stored(module) for module in linears}


@dataclass(eq=False)
class _Layers:
    """An adapter on a bare model, and what is needed to read and check the delta of one of its layers."""

    adapter: str
    config: PeftConfig
    weights: TensorFile
    keys: TensorKeys
    measured: TaskStatistics
    linears: Mapping[str, BareLinear]
    model: PeftModel

    def __post_init__(self) -> None:
        # Reading a layer, its rows and its columns come one after another.
        self.factors = functools.lru_cache(maxsize=1)(self._compute)

    def stored(self, module: str) -> StoredDelta:
        return StoredDelta(
            self.linears[module].shape,
            self._rank(module),
            start=lambda device: Reading(self._read(module, device)),
            rows=lambda: self.factors(module).A,
            columns=lambda: self.factors(module).B,
        )

    def _rank(self, module: str) -> int:
        prefix = f"{KEY_PREFIX}{module}."
        shapes = {key.removeprefix(prefix): self.weights.shape(key) for key in self.keys.own.get(module, [])}
        return rank_bound(self.config, shapes, self.linears[module].shape)

    def _read(self, module: str, device: torch.device) -> LowRankDelta:
        for key in self.keys.of_layer(module):
            check_finite(self.weights[key], f"{self.weights.path}: tensor '{key}'")
        check_as_measured(self.measured, module, fingerprint_of(self.weights, self.keys, module), self.adapter)
        delta = self.factors(module)
        return LowRankDelta(A=moved(delta.A, device), B=moved(delta.B, device))

    def _compute(self, module: str) -> LowRankDelta:
        delta = dense_delta(self.model, module, self.linears[module])
        check_finite(delta, f"{self.adapter}: the delta of '{module}'")
        try:
            return factored(delta, self._rank(module))
        except RankError as error:
            raise UnmergeableAdapterError(
                f"{self.adapter}: the delta of '{module}' is not what its config says: {error}."
            ) from None


def _of_model(adapter: str, config: PeftConfig, keys: TensorKeys, base: nn.Module) -> dict[str, BareLinear]:
    """The layers of a base model that an adapter adapts, in the order of the model."""
    linears: dict[str, BareLinear] = {}
    names = names_on(base)
    trained = {names(name): name for name in keys.own}  # under its name of now, that of then
    if not trained:  # some methods keep everything in tensors that all layers share; then the config says which
        trained = {name: name for name, _ in base.named_modules() if check_target_module_exists(config, name)}
    for name, module in base.named_modules():
        if name not in trained:
            continue
        shape = (features_of_linear(module, 0), features_of_linear(module, 1)) if is_linear(module) else (None, None)
        if shape[0] is None or shape[1] is None:
            raise UnmergeableAdapterError(
                f"{adapter} adapts '{name}', which is no linear layer in this {type(base).__name__}, but a "
                f"{type(module).__name__}; only deltas of linear layers can be merged."
            )
        weight = _base_weight(adapter, name, module) if needs_base(config) else None
        linears[trained[name]] = BareLinear((shape[0], shape[1]), weight, isinstance(module, Conv1D))
    missing = next((name for name in keys.own if name not in linears), None)
    if missing is not None:
        raise UnmergeableAdapterError(
            f"{adapter}: the adapter's key '{keys.own[missing][0]}' matches no module of {type(base).__name__}: it "
            "was trained on another base model."
        )
    return linears


def _base_weight(adapter: str, name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    offloaded = isinstance(weight, Tensor) and weight.is_meta
    plain = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.is_floating_point()
    if isinstance(weight, Tensor) and plain and not offloaded:
        return weight.detach().cpu()
    why = "not in memory (offloaded?)" if offloaded else "quantised"
    raise UnmergeableAdapterError(
        f"{adapter}: its delta depends on the base weight of '{name}', which is {why}. Merge on the base model as it "
        "was, loaded whole; the merge can be loaded on this one."
    )


def _of_statistics(
    adapter: str, config: PeftConfig, keys: TensorKeys, measured: TaskStatistics
) -> dict[str, BareLinear]:
    """The layers that an adapter adapts as its statistics know them; most files do not tell their sizes."""
    unknown = next((name for name in keys.own if name not in measured.shapes), None)
    if unknown is not None or not measured.shapes:
        raise UnmergeableAdapterError(
            f"{adapter} {described(config)}, whose file does not tell how large "
            f"{'the layers are' if unknown is None else repr(unknown) + ' is'}. Run `collect_statistics` on it, which "
            "notes that, or merge with `merge_adapter_sequence`, which has the base model."
        )
    linears = {}
    for name, shape in measured.shapes.items():
        if min(shape) < 1 or math.prod(shape) > LARGEST_LAYER:
            raise UnmergeableAdapterError(
                f"{adapter}: by its statistics '{name}' is {shape[0]} x {shape[1]}, which no layer is; run "
                "`collect_statistics` again."
            )
        if keys.own and name not in keys.own:
            raise UnmergeableAdapterError(
                f"{adapter}: its statistics describe the layer '{name}', of which its weights hold no tensor; run "
                "`collect_statistics` again, or save or download the adapter again."
            )
        linears[name] = BareLinear(shape, is_conv1d=bool(getattr(config, "fan_in_fan_out", False)))
    return linears
