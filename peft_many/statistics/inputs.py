"""The hooks that measure the inputs of layers: each distinct input is summed up once, whichever layers read it."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra.sketch import CovarianceAccumulator, CovarianceSketch, finished, running_covariance
from ..algebra.sums import mean_covariance
from ..algebra.total import FiniteCheck
from ..families.linears import features_of_linear
from ..families.projector_call import features_of
from ..files.statistics import InputStatistics
from ..files.upstream import times_written
from .answers import AnswerGradients
from .tokens import TokenRows


@dataclass(frozen=True)
class MeasuredInputs:
    """Distinct inputs by id, and the id of the input that each layer reads, as in [`TaskStatistics`]."""

    inputs: Mapping[str, InputStatistics]
    input_of: Mapping[str, str]


@dataclass
class _Weighed:
    """An input that is summed up once it is known how much its tokens count."""

    leader: str
    rows: Tensor  # its tokens, (tokens, in)
    selection: Callable[[Tensor], Tensor]  # picks them
    squares: list[Tensor] = field(default_factory=list)  # (rows,), of each layer that reads it


@dataclass
class _Arrival:
    """A tensor of the running forward pass and the layers that it arrived at."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: str | None = None
    waiting: list[str] = field(default_factory=list)  # layers that are yet to be noted as led by it


class SharedInputs:
    """Which layers share an input: those at which the very same tensor arrives in every call.

    The first `measured` layer that a tensor arrives at leads: its sum is that of all others. Without `share`, each
    layer leads itself.
    """

    def __init__(self, measured: Collection[str], share: bool = True) -> None:
        self.measured, self.share = measured, share
        self._calls: Counter[str] = Counter()
        self._led_by: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._arrivals: dict[int, _Arrival] = {}

    def arrived(self, name: str, inputs: Tensor) -> bool:
        """Note that a tensor arrived at a layer; whether the layer leads, so that it is the one to sum it up."""
        self._calls[name] += 1
        arrival = self._arrival(name, inputs)
        leads = name in self.measured and arrival.leader is None
        if leads:
            arrival.leader = name
        arrival.waiting.append(name)
        if arrival.leader is not None:
            for led in arrival.waiting:
                self._led_by[led][arrival.leader] += 1
            arrival.waiting.clear()
        return leads

    def forget(self) -> None:
        """Forget the tensors of this batch, whose identity may be reused in the next."""
        self._arrivals.clear()

    def leaders(self, name: str) -> tuple[str, ...]:
        """The layers whose sums make up all that arrived at this one, and nothing else; none if it has no such sum.

        They are several where a layer reads two inputs in turn, of which others read one: keys in attention over
        decoder and encoder at once read those of the queries, and the encoder's. A `RuntimeError` if a measured layer
        shared another's input in some of that one's calls only.
        """
        led = self._led_by[name]
        whole = all(times == self._led_by[leader][leader] for leader, times in led.items())
        if whole and led.total() == self._calls[name]:
            return tuple(sorted(led))
        if name in self.measured:
            raise RuntimeError(
                f"'{name}' shared its input with {sorted(led)} in some calls and not in others; "
                "call collect_statistics with share_inputs=False."
            )
        return ()

    def _arrival(self, name: str, inputs: Tensor) -> _Arrival:
        arrival = self._arrivals.get(id(inputs)) if self.share else None
        version = times_written(inputs)
        if (
            arrival is not None
            and arrival.tensor() is inputs
            and arrival.version == version
            and arrival.leader != name
        ):
            return arrival
        arrival = self._arrivals[id(inputs)] = _Arrival(weakref.ref(inputs), version)
        return arrival


class CovarianceHooks:
    """Sums up the inputs of `measured` linear layers while the `with` block runs, a shared input only once.

    Linear layers among the `bystanders` get a covariance only if they share the input of a measured one. Of each input
    `size` directions are followed, or all.

    With `answers` the sums are `Σ w_i x_i x_iᵀ` over the tokens of an input, where `w_i` is how far token `i` moves
    the answers through the measured layers that read it: the root of the sum of their squared gradients. They are
    still divided by the number of tokens.
    """

    def __init__(
        self,
        measured: Mapping[str, Any],
        bystanders: Mapping[str, nn.Module],
        tokens: TokenRows | None = None,
        size: int | None = None,
        share: bool = True,
        answers: AnswerGradients | None = None,
    ) -> None:
        self.measured = measured
        self.bystanders = bystanders if share else {}
        self.tokens = tokens or TokenRows()
        self.size, self.answers = size, answers
        self.shared = SharedInputs(measured, share)
        self._sums: dict[str, CovarianceAccumulator | CovarianceSketch] = {}
        self._waiting: list[_Weighed] = []  # of the running forward pass
        self._weighed: dict[int, _Weighed] = {}  # the latest of them by the tensor's identity
        self._read_by: dict[str, _Weighed] = {}  # by the layers that are running now
        self._hooks = ExitStack()

    def __enter__(self) -> CovarianceHooks:
        self.tokens.__enter__()
        for name, layer in [*self.measured.items(), *self.bystanders.items()]:
            # Before hooks that were there: DeepSpeed's give each layer a view of its own.
            hook = layer.register_forward_pre_hook(partial(self._sum_up, name), with_kwargs=True, prepend=True)
            self._hooks.enter_context(hook)
        if self.answers is not None:
            self._hooks.enter_context(self.answers)
            for name, layer in self.measured.items():
                self._hooks.enter_context(layer.register_forward_hook(partial(self._watch, name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        self._forget()
        self.tokens.__exit__(*error)

    def begin_batch(self, batch: Any) -> None:
        """Take the attention masks of a batch, and forget the tensors of the one before."""
        self._forget()
        self.tokens.begin_batch(batch)
        if self.answers is not None:
            self.answers.begin_batch(batch)

    def end_batch(self) -> None:
        """Sum up what has to wait for a backward pass."""
        if self.answers is None or not self._waiting:
            return
        self.answers.end_batch()
        for one in self._waiting:
            if one.squares:
                weights = one.selection(torch.stack(one.squares).sum(0)).sqrt()
            else:  # it moves no answer
                weights = one.rows.new_zeros(len(one.rows), dtype=torch.float32)
            self._add(one.leader, one.rows * weights.sqrt()[:, None])
        self._forget()

    def check(self) -> FiniteCheck:
        """Asks whether any input held NaN or Inf: the one read of a batch from a GPU, for all inputs at once.

        Other processes may need the whole pass, so it is not asked before.
        """
        squares = {name: running.sum_of_squares for name, running in self._sums.items()}
        return FiniteCheck(squares, "The input of '{}' holds NaN or Inf; its covariance would be worthless.")

    def result(self) -> MeasuredInputs:
        """What was measured of every layer that has a sum; sketches stay on their devices."""
        self.check().refuse()
        tokens = {name: running.tokens for name, running in self._sums.items()}
        sums = {name: InputStatistics(found, tokens[name]) for name, found in finished(self._sums)}
        inputs: dict[str, InputStatistics] = {}
        input_of: dict[str, str] = {}
        id_of: dict[tuple[str, ...], str] = {}
        for name, layer in self.measured.items():
            leaders = self.shared.leaders(name)
            if not leaders:  # it never ran
                nothing = running_covariance(features_of_linear(layer, 1) or 0, self.size).result()
                inputs[name], input_of[name] = InputStatistics(nothing, 0), name
                continue
            if leaders not in id_of:
                id_of[leaders], inputs[name] = name, added_inputs([sums[leader] for leader in leaders])
            input_of[name] = id_of[leaders]
        for name in self.bystanders:
            leaders = self.shared.leaders(name)
            if leaders in id_of:
                input_of[name] = id_of[leaders]
        return MeasuredInputs(inputs, input_of)

    def _sum_up(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = features_of(args, kwargs)
        if self.shared.arrived(name, inputs):
            self._lead(name, layer, inputs)
        if self.answers is not None and name in self.measured:
            self._read_by[name] = self._weighed[id(inputs)]

    def _lead(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        width = features_of_linear(layer, 1) or 0
        if inputs.shape[-1] != width:
            raise RuntimeError(f"The input of '{name}' has {inputs.shape[-1]} features, not {width} as the layer.")
        selection = self.tokens.selection(name, inputs)
        rows = selection(inputs.detach().reshape(-1, width))
        if self.answers is None:
            self._add(name, rows)
        else:
            self._weighed[id(inputs)] = _Weighed(name, rows, selection)
            self._waiting.append(self._weighed[id(inputs)])

    def _add(self, name: str, rows: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = running_covariance(rows.shape[1], self.size, rows.device)
        self._sums[name].update(rows)

    def _watch(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        """Have the gradients of a layer's output told to the input that it read."""
        read = self._read_by.pop(name)
        if self.answers is not None:
            self.answers.watch(output, read.squares.append)

    def _forget(self) -> None:
        self.shared.forget()
        self._waiting.clear()
        self._weighed.clear()
        self._read_by.clear()


def added_inputs(parts: list[InputStatistics]) -> InputStatistics:
    """One input that was measured in parts; at least one."""
    if len(parts) == 1:
        return parts[0]
    counts, place = [part.tokens for part in parts], parts[0].covariance.device
    return InputStatistics(mean_covariance([part.covariance.on(place) for part in parts], counts), sum(counts))
