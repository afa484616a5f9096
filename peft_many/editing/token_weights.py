"""How far the tokens of calibration samples move the answers, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..statistics.answers import AnswerGradients
from ..statistics.tokens import masks_of, rows_by_mask


def squared_gradients(
    layers: Mapping[str, nn.Module], answers: AnswerGradients, batches: Sequence[Any], run: Callable[[Any], None]
) -> dict[str, Tensor]:
    """By layer, the squared gradient of each token of its output, as [`AnswerGradients`] says, float32 `(tokens,)`."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output
        answers.watch(output, partial(squares.__setitem__, name))

    with answers, ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
        for batch in batches:
            answers.begin_batch(batch)
            run(batch)
            answers.end_batch()
            masks = masks_of(batch, has_encoder=False).values()
            for name, output in outputs.items():
                none = torch.zeros(output.shape[:-1].numel(), device=output.device)  # it moves no answer
                own = squares.get(name, none).reshape(*output.shape[:-1], 1)
                found[name].append(rows_by_mask(own, masks)[:, 0])
            outputs.clear()
            squares.clear()
    return {name: torch.cat(parts) for name, parts in found.items()}
