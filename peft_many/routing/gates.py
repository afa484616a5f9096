"""From the images and instructions of a call to the LoRA layers that run in it, for merges with `gate_lora`.

The routed projector notes the task weights of its images in the running call; the LoRA layers ask for their gates, and
the first of them has the instructions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.gating import decided
from ..algebra.routing import among_all, joint_weights
from ..families.image_rows import ImageRows
from .calls import Call, asked_for, running
from .noted import ImageMethod, ImageWeights
from .row_weights import Gates, cached_length, refuse_checkpointing, repeats_of_rows, warn_of_merged


@dataclass(frozen=True)
class GateTarget:
    """Whose LoRA layers a projector's routing gates."""

    adapter_name: str
    columns: tuple[int, ...]  # the place of each routed task among the tasks of the merge
    tasks: int  # of the merge


@dataclass(frozen=True)
class SeenImages:
    """What a projector's router says of its images, on the CPU."""

    weights: Tensor  # (images, routed tasks), float32
    fits: Tensor | None  # which tasks take them at all, bool, of the same shape; `None` if any may
    rows: ImageRows


def note_images(target: GateTarget, seen: SeenImages) -> None:
    """Note in the running call what a projector's router says of its images."""
    if not seen.rows.real_images.any():
        return
    call, told = _batch_and_method()
    if call is None or call.noted is None:
        warn_of_merged("images were encoded outside of the model's `forward` and `generate`")
        return
    refuse_checkpointing(call.owner, target.adapter_name)
    weights = among_all(seen.weights, target.columns, target.tasks)
    fits = None if seen.fits is None else among_all(seen.fits, target.columns, target.tasks)
    start = cached_length(call.arguments.get("past_key_values"))
    call.noted.add(target.adapter_name, ImageWeights(weights, fits, seen.rows, told, start))


def with_instructions(target: GateTarget, seen: SeenImages, alone: bool) -> Tensor:
    """The routing weights of a projector's images, `(images, routed tasks)`, by the instructions of their rows too.

    By these `alone`, if so. An image that a single task is trusted with goes through its projector alone, as its row
    gets that task's LoRA. Where instructions cannot be read, or nobody can tell whose image is whose, the images' own.
    """
    call, told = _batch_and_method()
    weights, real = seen.weights, seen.rows.real_images
    if call is None or call.noted is None or not real.any():
        return weights
    scores = call.noted.scores_of_images(target.adapter_name, ImageWeights(weights, None, seen.rows, told, 0))
    if scores is None:
        return weights
    found = weights.clone()
    of_images = (None, None) if alone else (weights[real], None if seen.fits is None else seen.fits[real])
    found[real] = decided(joint_weights(scores[:, list(target.columns)], *of_images))
    return found


def _batch_and_method() -> tuple[Call | None, ImageMethod | None]:
    """The call whose batch is running, and the image method in which it encodes images."""
    call = running.get()
    images = None if call is None else call.images
    return (None if call is None else call.of_batch), (None if images is None else images.told)


def current_gates(adapter_name: str, ranks: tuple[int, ...], x: Tensor) -> Gates | None:
    """The gates of a layer in the running call; `None` where all rows get the merged delta.

    Its input `x` has shape `(rows, …, in)` or `(rows · tokens, in)`, and task `t` has the rank `ranks[t]` in it.
    """
    if not torch.compiler.is_compiling():
        return _gates(adapter_name, ranks, x.shape, x.dtype, x.device)
    # A graph is for all images, and its layers share what they multiply by, as few operations wait for Python as can.
    key = (adapter_name, ranks, x.dim() > 2, x.dtype, x.device)
    known = asked_for.gates.get(key)
    if known is None or len(known[0]) != len(x):
        known = asked_for.gates[key] = _gates_in_graph(adapter_name, ranks, x.shape, x.dtype, x.device)
    return Gates(*known)


def _gates(
    adapter_name: str, ranks: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Gates | None:
    running_call = running.get()
    if running_call is None or running_call.images is not None:  # what the vision tower sees are images, not rows
        return None
    call = running_call.of_batch
    assert call is not None
    assert call.noted is not None
    weights = call.noted.get(adapter_name)
    if weights is None:
        return None
    repeats = repeats_of_rows(shape, len(weights.images), call.arguments)
    return None if repeats is None else weights.gates(tuple(ranks), repeats, dtype, device)


# An operation of a graph, which looks at the running call whenever the graph runs. It stands apart from CUDA graphs,
# which would replay what it gave at first, and neither is its result known beforehand nor can it be had again in a
# backward pass.
_TAGS = tuple(getattr(torch.Tag, name, None) for name in ("nondeterministic_seeded", "cudagraph_unsafe"))


@torch.library.custom_op("peft_many::gates", mutates_args=(), tags=[tag for tag in _TAGS if tag is not None])
def _gates_in_graph(
    adapter_name: str, ranks: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """As `_gates`, of tensors that are there in any case and are the graph's to change."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("This version of torch would put a gate into a CUDA graph; compile without CUDA graphs.")
    found = _gates(adapter_name, ranks, shape, dtype, device)
    rows, rank = shape[0], sum(ranks)
    if found is None:
        return torch.ones(rows, 1, dtype=dtype, device=device), torch.zeros(rows, rank, dtype=dtype, device=device)
    merged = torch.zeros(rows, 1, dtype=dtype, device=device) if found.merged is None else found.merged.clone()
    return merged, found.own.clone()


@_gates_in_graph.register_fake
def _(
    adapter_name: str, ranks: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, rank = shape[0], sum(ranks)
    return torch.empty(rows, 1, dtype=dtype, device=device), torch.empty(rows, rank, dtype=dtype, device=device)
