"""The deltas of adapters that are no plain LoRA, computed by PEFT's own layers when the merge comes to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..algebra.factoring import RankError, factored
from ..algebra.lpm import LowRankDelta
from ..families.linears import features_of_linear, is_linear
from ..families.module_names import names_on
from .bare_model import BareLinear, bare_model, dense_delta
from .fingerprints import same_weights, tensors_fingerprint
from .peft_methods import PeftMethod, described, method_of
from .statistics import TaskStatistics
from .stored_delta import KEY_PREFIX, StoredDelta, UnmergeableAdapterError, check_finite
from .tensor_file import TensorFile

# Entries of the largest layer that is believed on the word of a statistics file; real ones have a third of that.
LARGEST_LAYER = 1 << 31
# Numbers in configs by which PEFT makes room before it looks at the tensors; real ones are hundreds.
LARGEST_SIZE = 1 << 14
_SIZES = ("r", "init_r", "hybrid_r", "num_vectors", "vector_length")


@dataclass(frozen=True)
class TensorKeys:
    """What an adapter's tensors belong to, by their keys.

    Args:
        own (`dict[str, list[str]]`): By layer, sorted.
        shared (`list[str]`): To all layers; sorted.
        rest (`list[str]`): To modules that are saved whole.
    """

    own: dict[str, list[str]]
    shared: list[str]
    rest: list[str]

    def of_layer(self, module: str) -> list[str]:
        """The keys of all tensors that the delta of a layer may depend on."""
        return [*self.own.get(module, []), *self.shared]


def tensor_keys(config: PeftConfig, keys: Iterable[str]) -> TensorKeys:
    """Tell the tensors of an adapter apart by PEFT's prefix of the method."""
    marker = f".{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
    found = TensorKeys({}, [], [])
    for key in sorted(keys):
        if not key.startswith(KEY_PREFIX):
            found.shared.append(key)
        elif marker in key:
            found.own.setdefault(key.removeprefix(KEY_PREFIX).rpartition(marker)[0], []).append(key)
        else:
            found.rest.append(key)
    return found


def fingerprint_of(tensors: Mapping[str, Tensor], keys: TensorKeys, module: str) -> list[float]:
    """What tells whether the tensors behind a layer's delta are still the same."""
    return tensors_fingerprint([tensors[key] for key in keys.of_layer(module)])


def deltas_by_peft(
    adapter: str, config: PeftConfig, weights: TensorFile, measured: TaskStatistics, base: nn.Module | None
) -> tuple[dict[str, StoredDelta], dict[str, Tensor]]:
    """The deltas of an adapter by layer, and its tensors of modules that are saved whole, without PEFT's prefix.

    Args:
        adapter (`str`): Its name, for messages.
        config ([`~peft.PeftConfig`]): Its config.
        weights (`TensorFile`): Its tensors.
        measured ([`TaskStatistics`]): Its statistics, which know how large its layers are.
        base (`torch.nn.Module`, *optional*): The base model, which knows that too.

    Raises:
        UnmergeableAdapterError: The method adds no delta to linear layers, the sizes of the layers or the base weights
            are needed and not known, or the tensors do not fit the config.
    """
    try:
        method = method_of(config)
    except ValueError as error:
        raise UnmergeableAdapterError(f"{adapter} {error}; it cannot be merged.") from None
    keys = tensor_keys(config, weights)
    if method.needs_base and base is None:
        layer = next(iter(keys.own), "its layers")
        raise UnmergeableAdapterError(
            f"{adapter} {described(config)}: its delta on '{layer}' depends on the base weights. Merge it with "
            "`merge_adapter_sequence`, which has the base model."
        )
    for name in _SIZES:
        size = getattr(config, name, None)
        if isinstance(size, int) and size > LARGEST_SIZE:
            raise UnmergeableAdapterError(f"{adapter}: its config gives `{name}` as {size}, which no adapter has.")
    linears = (
        _of_statistics(adapter, config, keys, measured)
        if base is None
        else _of_model(adapter, config, keys, base, with_weights=method.needs_base)
    )
    mine = {key: weights[key] for key in weights if key not in keys.rest}
    try:
        model = bare_model(config, mine, linears)
    except ValueError as error:
        raise UnmergeableAdapterError(f"{adapter} {described(config)}: {error}.") from error

    def factors(module: str) -> LowRankDelta:
        delta = dense_delta(model, module, linears[module])
        check_finite(delta, f"{adapter}: the delta of '{module}'")
        try:
            return factored(delta, _rank_of(method, config, keys, weights, linears[module], module))
        except RankError as error:
            raise UnmergeableAdapterError(
                f"{adapter}: the delta of '{module}' is not what its config says: {error}."
            ) from None

    latest = functools.lru_cache(maxsize=1)(factors)  # reading, `rows` and `columns` come one after another

    def stored(module: str) -> StoredDelta:
        def read() -> LowRankDelta:
            for key in keys.of_layer(module):
                check_finite(weights[key], f"{weights.path}: tensor '{key}'")
            known = measured.fingerprints.get(module)
            if known is not None and not same_weights(known, fingerprint_of(weights, keys, module)):
                raise UnmergeableAdapterError(
                    f"{adapter} was trained further after its statistics were collected ('{module}' has changed); "
                    "run `collect_statistics` again."
                )
            return latest(module)

        rank = _rank_of(method, config, keys, weights, linears[module], module)
        rows, columns = (lambda: latest(module).A), (lambda: latest(module).B)
        return StoredDelta(linears[module].shape, rank, read, rows=rows, columns=columns)

    rest = {key.removeprefix(KEY_PREFIX): weights[key] for key in keys.rest}
    for name, tensor in rest.items():
        check_finite(tensor, f"{weights.path}: tensor '{KEY_PREFIX}{name}'")
    return {module: stored(module) for module in linears}, rest


def _rank_of(
    method: PeftMethod, config: PeftConfig, keys: TensorKeys, weights: TensorFile, linear: BareLinear, module: str
) -> int:
    if method.rank is None:
        return min(linear.shape)
    prefix = f"{KEY_PREFIX}{module}."
    shapes = {key.removeprefix(prefix): weights.shape(key) for key in keys.own.get(module, [])}
    return max(1, min(method.rank(shapes, config), *linear.shape))


def _of_model(
    adapter: str, config: PeftConfig, keys: TensorKeys, base: nn.Module, with_weights: bool
) -> dict[str, BareLinear]:
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
        weight = _base_weight(adapter, name, module) if with_weights else None
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
    if isinstance(weight, Tensor) and weight.is_meta:
        raise UnmergeableAdapterError(
            f"{adapter}: its delta depends on the base weight of '{name}', which is not in memory (offloaded?). Merge "
            "on a base model that is loaded whole."
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise UnmergeableAdapterError(
            f"{adapter}: its delta depends on the base weight of '{name}', which is quantised. Merge on the base "
            "model as it was before; the merge can be loaded on the quantised one."
        )
    return weight.detach().cpu()


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
            raise UnmergeableAdapterError(f"{adapter}: by its statistics '{name}' is {shape[0]} x {shape[1]}.")
        if keys.own and name not in keys.own:
            raise UnmergeableAdapterError(f"{adapter}: it holds no tensor for '{name}', which its statistics know.")
        linears[name] = BareLinear(shape, is_conv1d=bool(getattr(config, "fan_in_fan_out", False)))
    return linears
