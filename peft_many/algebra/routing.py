"""CPM, cross-modal projection merging: which task an image resembles, and how the projectors' outputs are mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spread import FeatureMetric

# Tasks of less weight are left out. They would change the mixed output by less than the float32 rounding of the
# projectors that are mixed: a product over d inputs is off by about √d · 6e-8 of its size, 2e-6 at d = 1024.
NEGLIGIBLE_WEIGHT = 1e-6


def pool_segments(rows: Tensor, lengths: Tensor) -> Tensor:
    """Means of consecutive segments of rows, one for each image: `(Σ lengths, d)` to `(images, d)`, float32."""
    places = torch.arange(len(lengths), device=rows.device)
    images = torch.repeat_interleave(places, lengths, output_size=len(rows))  # or a GPU has to be asked for it
    sums = rows.new_zeros(len(lengths), rows.shape[1], dtype=torch.float32).index_add_(0, images, rows.float())
    return sums / lengths[:, None].clamp(min=1)


def task_weights(
    features: Tensor,
    prototypes: Tensor,
    metric: FeatureMetric | None,
    temperature: float,
    top_k: int | None = None,
    limits: Sequence[float] | None = None,
) -> Tensor:
    """What each task counts for each image: [`routing_weights`], or, where there is a metric, Gaussian ones.

    These are the tasks' posterior probabilities, were their images Gaussian about the prototypes with one covariance:
    `softmax(−d_t² / 2τ)`, with the squared Mahalanobis distances `d_t²` of the metric: linear discriminant analysis
    (Fisher 1936), in which directions that vary within every task count little; `τ = 1` is the posterior. Shapes, and
    what is negligible, as in [`routing_weights`]. Tasks take no images whose `d_t²` is above theirs of the `limits`;
    of images that none takes, all weights are zero.
    """
    if metric is None:
        return routing_weights(features, prototypes, temperature, top_k)
    return _softmax(gaussian_scores(features, prototypes, metric, temperature, limits), top_k)


def routing_weights(features: Tensor, prototypes: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """Softmax of the cosine similarities between centred features and centred prototypes, without what is negligible.

    Of the pooled frozen features of each image, shape `(images, d)`, and one prototype for each task, `(tasks, d)`,
    these weights have shape `(images, tasks)`, float32, and rows that sum to one. Both are centred on the mean of the
    prototypes: frozen vision features share a large common part, which would make every similarity nearly one. A
    smaller temperature `τ > 0` routes harder. Weights below `NEGLIGIBLE_WEIGHT` become exactly zero, and so do all but
    the `top_k` largest, of equal ones those that come first; the others make up for it.
    """
    centre = prototypes.float().mean(dim=0)
    return _softmax(_cosines(features.float() - centre, prototypes.float() - centre) / temperature, top_k)


def gaussian_scores(
    features: Tensor,
    prototypes: Tensor,
    metric: FeatureMetric,
    temperature: float,
    limits: Sequence[float] | None = None,
) -> Tensor:
    """The log-likelihoods `−d_t² / 2τ` of [`task_weights`], `(rows, tasks)`; `-inf` above a task's limit."""
    distances = metric.squared_distances(features.float(), prototypes.float())
    scores = -distances / (2 * temperature)
    if limits is None:
        return scores
    return scores.masked_fill(distances > torch.tensor(limits, device=distances.device), -torch.inf)


def tasks_that_take(
    features: Tensor, prototypes: Tensor, metric: FeatureMetric | None, limits: Sequence[float] | None
) -> Tensor | None:
    """Which tasks take each row at all, `(rows, tasks)`, bool, on the CPU; `None` if any may.

    Weights do not tell: those of tasks that another one is much likelier than are zero too.
    """
    if metric is None or limits is None:
        return None
    return gaussian_scores(features, prototypes, metric, 1.0, limits).isfinite().cpu()


def joint_weights(scores: Tensor, image_weights: Tensor | None, fits: Tensor | None = None) -> Tensor:
    """The tasks' weights of rows by their instructions' `scores` and, if there are any, their images' weights.

    `α_t ∝ exp(s_t) (α_t(images) + ε)`, shapes `(rows, tasks)`. Images are believed up to `1 / ε`, as no weight below
    that is told from zero: they decide among tasks that ask the same, and instructions among those that show the same.
    A task takes no row whose instruction it does not take, `s_t = -inf`, or whose images do not fit it, by `fits`,
    shape `(rows, tasks)`. Each is judged by itself, or else what a task asks would make up for images that it never
    showed. Rows that no task takes are zero.
    """
    if image_weights is not None:
        strange = (image_weights == 0).all(dim=-1, keepdim=True)
        scores = (scores + (image_weights + NEGLIGIBLE_WEIGHT).log()).masked_fill(strange, -torch.inf)
    return _softmax(scores if fits is None else scores.masked_fill(~fits, -torch.inf), None)


def among_all(rows: Tensor, columns: Sequence[int], tasks: int, missing: float = 0.0) -> Tensor:
    """What is known of some tasks, `(rows, len(columns))`, among all of them, `(rows, tasks)`; `missing` of others."""
    places = torch.tensor(columns, device=rows.device)
    return rows.new_full((len(rows), tasks), missing).index_copy(1, places, rows)


def _softmax(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax of each row without negligible weights, and without all but the `top_k` largest; zero if all `-inf`."""
    nothing = torch.isneginf(logits).all(dim=-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(nothing, 0.0), dim=-1)
    weights = weights.masked_fill(weights < NEGLIGIBLE_WEIGHT, 0.0)
    if top_k is not None:
        weights = _keep_largest(weights, top_k)
    return (weights / weights.sum(dim=-1, keepdim=True)).masked_fill(nothing, 0.0)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between the rows of `a`, `(m, d)`, and those of `b`, `(n, d)`, all float32: `(m, n)`.

    From distances, `a·b = (‖a‖² + ‖b‖² − ‖a − b‖²) / 2`. A matrix product would round an entry by its place in the
    matrix, so that tasks with equal prototypes would not tie, and in 8 bits under autocast.
    """
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (a.square().sum(dim=-1)[:, None] + b.square().sum(dim=-1) - distances.square()) / 2


def _keep_largest(weights: Tensor, count: int) -> Tensor:
    """Each row's `count` largest entries, of equal ones the first, and zeros elsewhere."""
    order = torch.sort(weights, dim=-1, descending=True, stable=True).indices  # `topk` promises nothing about ties
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order[:, :count], True)
    return weights.masked_fill(~kept, 0.0)
