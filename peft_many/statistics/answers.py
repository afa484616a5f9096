"""How much the tokens of a layer's input move a model's answers, by a backward pass: weights for its covariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..families.parts import text_encoder


class AnswerGradients:
    """Runs a backward pass after each forward pass in the `with` block, from the logits that answers are read from.

    Each watched output `y` of a layer is told, of each of its tokens `i`, an estimate of

        ‖∂z/∂y_i‖²_F / V  =  E_ε ‖∂(εᵀz)/∂y_i‖²,       ε random signs of size 1/√V without their mean,

    with `z` the logits, of a vocabulary of `V`, at all positions of a row whose next token has a label: the diagonal
    blocks of a Gauss-Newton matrix, by one sample. The mean of the logits changes no answer. Padding moves nothing.
    Gradients of the loss would not do: a trained model is sure of its answers, so that they are small, and largest
    where it is wrong.

    Args:
        model (`torch.nn.Module`): Whose weights get no gradient; who calls puts back whether they require one.
        head (`torch.nn.Module`): Its part that makes logits of hidden states.
        shifted (`bool`): Whether labels are those of the next position's logits, as in decoder-only models.
    """

    def __init__(self, model: nn.Module, head: nn.Module, shifted: bool = True) -> None:
        self.model, self.head, self.shifted = model, head, shifted
        self._labels: Tensor | None = None
        self._logits: Tensor | None = None
        self._watched: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._generator = torch.Generator().manual_seed(0)
        self._hooks = ExitStack()

    def __enter__(self) -> AnswerGradients:
        self.model.requires_grad_(False)
        self._hooks.enter_context(torch.enable_grad())
        self._hooks.enter_context(self.head.register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()
        self._hooks.close()

    def begin_batch(self, batch: Any) -> None:
        """Take the labels of a batch."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise ValueError(
                "`weigh_tokens` needs to know where the answers are: batches with `labels` of shape (rows, length), "
                "-100 wherever there is no answer."
            )
        self._forget()
        if self.shifted:
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        self._labels = labels

    def watch(self, output: Tensor, tell: Callable[[Tensor], None]) -> None:
        """Have the squared gradients of an output's tokens told after this batch; not if it moves no answer."""
        if not output.requires_grad:
            output.requires_grad_()  # the graph begins here
        self._watched.append((output, tell))

    def end_batch(self) -> None:
        """The backward pass."""
        labels, logits = self._labels, self._logits
        if labels is None or logits is None or logits.shape[:-1] != labels.shape:
            there = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise RuntimeError(
                f"`weigh_tokens` needs logits at every label, but the model made {there} of a batch with labels of "
                f"shape {None if labels is None else tuple(labels.shape)}; `weigh_tokens=False` needs none."
            )
        answers = logits[(labels != -100).to(logits.device)]
        if len(answers) and self._watched:
            bits = torch.randint(2, answers.shape, generator=self._generator, dtype=torch.int8).float()
            probe = 2 * (bits - bits.mean(1, keepdim=True)) / answers.shape[1] ** 0.5
            outputs = [output for output, _ in self._watched]
            gradients = torch.autograd.grad([answers], outputs, [probe.to(answers)], allow_unused=True)
            for (_, tell), gradient in zip(self._watched, gradients):
                if gradient is not None:
                    tell(gradient.float().square().sum(-1).reshape(-1))
        self._forget()

    def _keep(self, head: nn.Module, args: Any, output: Tensor) -> None:
        self._logits = output

    def _forget(self) -> None:
        self._labels, self._logits, self._watched = None, None, []


def answer_gradients(base: nn.Module, sharded: bool) -> AnswerGradients:
    """Those of a language model; a `ValueError` if it has no logits, or its weights are elsewhere."""
    find: Any = getattr(base, "get_output_embeddings", lambda: None)
    head = find()
    if head is None or sharded:
        why = "weights are sharded over processes" if sharded else f"{type(base).__name__} has no output embeddings"
        raise ValueError(f"`weigh_tokens` needs a backward pass from the logits, but {why}.")
    return AnswerGradients(base, head, shifted=text_encoder(base) is None)
