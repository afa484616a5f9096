"""The forward hooks that measure layers: they see inputs pass by, and sum them up or keep them."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils import PeftWarning
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..algebra.covariance import Covariance, CovarianceAccumulator, mean_covariance
from ..algebra.sketch import CovarianceSketch
from ..families.linears import features_of_linear
from ..families.projector_call import features_of
from .routed_rows import RoutedRows

# Of the text, and of the decoder's text in an encoder-decoder model.
MASK_NAMES = ("attention_mask", "decoder_attention_mask")


@dataclass
class _Arrival:
    """A tensor of the running forward pass and the layers that it arrived at."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: str | None = None
    waiting: list[str] = field(default_factory=list)


class CovarianceHooks:
    """Accumulates the input covariance of each layer while the `with` block runs; a shared input only once.

    Layers share an input if the very same tensor arrives at them in every call. The first measured layer that it
    arrives at sums it up for all; what reads the inputs of two such layers in turn gets the sum of both.

    Args:
        measured (`Mapping[str, nn.Module]`): Linear layers by path, each of which gets a covariance.
        bystanders (`Mapping[str, nn.Module]`):
            Further linear layers, which get a covariance only if they share the input of a measured one.
        size (`int`, *optional*): The most directions that are followed of an input; `None` follows all.
        share (`bool`): Whether to look for shared inputs.
        text_encoder (`nn.Module`, *optional*): The text encoder of an encoder-decoder model.
        model (`nn.Module`, *optional*): What the layers are parts of, to follow padding into mixtures of experts.
        unmasked (`Collection[str]`): Layers whose inputs are no text, so that attention masks mean nothing there.
    """

    def __init__(
        self,
        measured: Mapping[str, Any],
        bystanders: Mapping[str, nn.Module],
        size: int | None = None,
        share: bool = True,
        text_encoder: nn.Module | None = None,
        unmasked: Collection[str] = (),
        model: nn.Module | None = None,
    ) -> None:
        self.measured = measured
        self.bystanders = bystanders if share else {}
        self.size = size
        self.share = share
        self.text_encoder = text_encoder
        self.unmasked = unmasked
        self._routed = RoutedRows([] if model is None else [name for name in measured if name not in unmasked])
        self._around = {} if model is None else {path: model.get_submodule(path) for path in self._routed.around}
        # Set before each batch: which positions are tokens, `(rows, length)`; see `MASK_NAMES`.
        self.masks: Mapping[str, Tensor] = {}
        self._encoding = False
        self._encoded: weakref.ref[Tensor] | None = None
        self._accumulators: dict[str, CovarianceAccumulator | CovarianceSketch] = {}
        self._calls: Counter[str] = Counter()
        self._led_by: dict[str, Counter[str]] = {name: Counter() for name in [*measured, *self.bystanders]}
        self._arrivals: dict[int, _Arrival] = {}
        self._handles: list[RemovableHandle] = []
        self._warned = False

    def __enter__(self) -> CovarianceHooks:
        for name, layer in [*self.measured.items(), *self.bystanders.items()]:
            self._handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        for path, module in self._around.items():
            self._handles.append(module.register_forward_pre_hook(self._passing(path), with_kwargs=True))
        if self.text_encoder is not None:
            self._handles.append(self.text_encoder.register_forward_pre_hook(self._encoder_begins))
            self._handles.append(self.text_encoder.register_forward_hook(self._encoder_ends))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._arrivals.clear()
        self._routed.forget()

    def _passing(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = features_of(args, kwargs) if args or kwargs else None
            masks = [mask for mask in self._masks_of(path, inputs) if not mask.all()]
            if masks:
                self._routed.note(path, inputs, _mask_that_fits(inputs, masks))

        return hook

    def _encoder_begins(self, *_: object) -> None:
        self._encoding = True

    def _encoder_ends(self, encoder: nn.Module, args: Any, output: Any) -> None:
        self._encoding = False
        self._encoded = weakref.ref(output if isinstance(output, Tensor) else output[0])

    def end_of_batch(self) -> None:
        """Forget the tensors of this batch, whose identity may be reused in the next."""
        self._arrivals.clear()
        self._routed.forget()

    def result(self) -> dict[str, Covariance]:
        """The covariance of every layer that has one; layers that always got the same inputs share one object.

        Raises:
            RuntimeError: A measured layer shared another's input in some of that one's calls only.
        """
        if self._routed.searched and not self._routed.recognised:
            warnings.warn(
                "No row of padding was found again among the rows that routers sent on, so some of it may have been "
                "counted. Batches without padding avoid this.",
                PeftWarning,
                stacklevel=3,
            )
        parts: dict[str, Covariance] = {}
        for name in list(self._accumulators):  # each is let go before the next is finished: they are large
            parts[name] = self._accumulators.pop(name).result()
        sums: dict[tuple[str, ...], Covariance] = {}
        found: dict[str, Covariance] = {}
        for name, layer in self.measured.items():
            if self._calls[name] == 0:
                found[name] = self._accumulator(_input_width(layer), torch.device("cpu")).result()
                continue
            leaders = self._leaders(name)
            if leaders is None:
                raise RuntimeError(
                    f"'{name}' shared its input with {sorted(self._led_by[name])} in some calls and not in others; "
                    "call collect_statistics with share_inputs=False."
                )
            if leaders not in sums:
                of_leaders = [parts[leader] for leader in leaders]
                sums[leaders] = of_leaders[0] if len(leaders) == 1 else mean_covariance(of_leaders)
            found[name] = sums[leaders]
        for name in self.bystanders:
            leaders = self._leaders(name)
            if leaders in sums:
                found[name] = sums[leaders]
        return found

    def _leaders(self, name: str) -> tuple[str, ...] | None:
        """The layers whose sums make up all that arrived at this one, and nothing else; `None` if none do.

        They are several where a layer reads two inputs in turn, of which others read one: keys in attention over
        decoder and encoder at once read those of the queries, and the encoder's.
        """
        led = self._led_by[name]
        whole = all(times == self._led_by[leader][leader] for leader, times in led.items())
        return tuple(sorted(led)) if led and whole and led.total() == self._calls[name] else None

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = features_of(args, kwargs)
            self._calls[name] += 1
            arrival = self._arrival(name, inputs)
            if name in self.measured and arrival.leader is None:
                arrival.leader = name
                self._accumulate(name, layer, inputs)
                for earlier in arrival.waiting:
                    self._led_by[earlier][name] += 1
            if arrival.leader is None:
                arrival.waiting.append(name)
            else:
                self._led_by[name][arrival.leader] += 1

        return hook

    def _arrival(self, name: str, inputs: Tensor) -> _Arrival:
        arrival = self._arrivals.get(id(inputs)) if self.share else None
        version = 0 if inputs.is_inference() else inputs._version  # inference tensors have none
        if (
            arrival is not None
            and arrival.tensor() is inputs
            and arrival.version == version
            and arrival.leader != name
        ):
            return arrival
        arrival = self._arrivals[id(inputs)] = _Arrival(weakref.ref(inputs), version)
        return arrival

    def _accumulate(self, name: str, layer: Any, inputs: Tensor) -> None:
        width = _input_width(layer)
        if inputs.shape[-1] != width:
            raise RuntimeError(f"The input of '{name}' has {inputs.shape[-1]} features, not {width} as the layer.")
        rows = self._without_padding(name, inputs)
        if name not in self._accumulators:
            self._accumulators[name] = self._accumulator(width, inputs.device)
        try:
            self._accumulators[name].update(rows)
        except FloatingPointError:
            raise RuntimeError(f"The input of '{name}' holds NaN or Inf; its covariance would be worthless.") from None

    def _accumulator(self, width: int, device: torch.device) -> CovarianceAccumulator | CovarianceSketch:
        if self.size is not None and self.size < width:
            return CovarianceSketch(width, self.size, device)
        return CovarianceAccumulator(width, "cpu" if device.type == "mps" else device)  # there is no float64 on "mps"

    def _without_padding(self, name: str, inputs: Tensor) -> Tensor:
        """The rows of `inputs` that are tokens, shape `(tokens, in)`."""
        masks = self._masks_of(name, inputs)
        rows, masked = _tokens(inputs, masks)
        if masked or all(mask.all() for mask in masks):
            return rows
        tokens = self._routed.tokens(name, rows)
        if tokens is not None:
            return rows[tokens]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The input of '{name}', of shape {tuple(inputs.shape)}, fits no attention mask of the batch, so "
                "padding could not be left out of its covariance. Batches without padding avoid this.",
                PeftWarning,
                stacklevel=2,
            )
        return rows

    def _masks_of(self, name: str, inputs: object) -> Sequence[Tensor]:
        """The masks that can belong to an input. In an encoder-decoder, cross-attention reads the encoder's output."""
        if name in self.unmasked:
            return []
        if self.text_encoder is None:
            return list(self.masks.values())
        of_encoder = self._encoding or (self._encoded is not None and self._encoded() is inputs)
        mask = self.masks.get(MASK_NAMES[0] if of_encoder else MASK_NAMES[1])
        return [] if mask is None else [mask]


def _tokens(inputs: Tensor, masks: Iterable[Tensor]) -> tuple[Tensor, bool]:
    """The rows of `inputs` that are tokens by the mask that fits, shape `(tokens, in)`, and whether one does.

    Not a copy if there is no mask, or all are tokens.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    mask = _mask_that_fits(inputs, masks)
    if mask is None:
        return rows, False
    kept = mask.reshape(-1).to(rows.device)
    return rows if kept.all() else rows[kept], True


def _mask_that_fits(inputs: object, masks: Iterable[Tensor]) -> Tensor | None:
    """The mask of the rows of an input, `(rows, length, in)` or flattened."""
    if not isinstance(inputs, Tensor):
        return None
    for mask in masks:
        if inputs.shape[:-1] == mask.shape or (inputs.dim() == 2 and len(inputs) == mask.numel()):
            return mask
    return None


def _input_width(layer: Any) -> int:
    width = features_of_linear(layer, 1)
    assert width is not None
    return width


class _Enough(Exception):  # noqa: N818 - no error
    """Ends a forward pass once everything has been seen."""


class LayerCapture:
    """Keeps inputs and outputs of some layers that share an input, and ends each forward pass after them.

    Each `with` block is for one forward pass; the next one adds to what was seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        # Set before each pass: which positions are tokens, `(rows, length)`; see `MASK_NAMES`.
        self.masks: Mapping[str, Tensor] = {}
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._waiting: set[str] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCapture:
        self._waiting = set(self.layers)
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        while self._handles:
            self._handles.pop().remove()
        return kind is _Enough

    def inputs(self, name: str) -> Tensor:
        """All tokens that arrived at a layer, shape `(tokens, in)`."""
        return torch.cat(self._inputs[name])

    def outputs(self, name: str) -> Tensor:
        """What came out of a layer for them, shape `(tokens, out)`."""
        return torch.cat(self._outputs[name])

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = features_of(args, kwargs)
            self._inputs[name].append(_tokens(inputs, self.masks.values())[0].clone())
            self._outputs[name].append(_tokens(output, self.masks.values())[0].clone())
            self._waiting.discard(name)
            if not self._waiting:
                raise _Enough

        return hook


def layers_by_input(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """The layers in the order in which they run in one forward pass, those that share an input together.

    Raises:
        RuntimeError: A layer does not take part, or takes part more than once.
    """
    arrived: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: arrived.append((name, features_of(args, kwargs))), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(name for name, _ in arrived)
    strange = next((name for name in layers if calls[name] != 1), None)
    if strange is not None:
        raise RuntimeError(f"'{strange}' runs {calls[strange]} times in a forward pass; it has to run once.")
    groups: dict[int, list[str]] = {}
    for name, inputs in arrived:  # which keeps the tensors alive, so that no two have one id
        groups.setdefault(id(inputs), []).append(name)
    return list(groups.values())
