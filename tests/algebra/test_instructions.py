"""Features of instructions, and what instructions and images say of a row's task together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_many.algebra.instructions import instruction_features, token_weights
from peft_many.algebra.routing import NEGLIGIBLE_WEIGHT, gaussian_scores, joint_weights, task_weights
from peft_many.algebra.spread import centred, shared_metric
from peft_many.merging.routed_instructions import LEAST_VARIANCE
from tests.algebra.problems import seeds

WIDTH = 6
lengths = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def features(embedded: Tensor, kept: Tensor) -> Tensor:
    return instruction_features(embedded, token_weights(kept))


def padded(seed: int, counts: list[int], gaps: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of so many tokens among others that are not kept; these, and each row's own tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = max(counts) + 3
    embedded = torch.randn(len(counts), length, WIDTH, generator=generator)
    kept = torch.zeros(len(counts), length, dtype=torch.bool)
    for row, count in enumerate(counts):
        first = int(torch.randint(length - count + 1, (1,), generator=generator))
        places = torch.randperm(length, generator=generator)[:count] if gaps else torch.arange(first, first + count)
        kept[row, places] = True
    return embedded, kept, [tokens[mask] for tokens, mask in zip(embedded, kept)]


@given(seeds, lengths, st.booleans())
def test_features_are_those_of_the_definition(seed: int, counts: list[int], gaps: bool) -> None:
    embedded, kept, own = padded(seed, counts, gaps)
    found = features(embedded, kept)
    assert found.dtype == torch.float32
    for row, tokens in zip(found, own):
        tokens = tokens.double() / tokens.double().norm(dim=1, keepdim=True)
        places = torch.linspace(0, 1, len(tokens), dtype=torch.float64)[:, None]
        mean = tokens.sum(0) / max(1, len(tokens))
        later = (places * tokens).sum(0) / max(1, len(tokens))
        torch.testing.assert_close(row.double(), torch.cat([mean, later]), atol=1e-6, rtol=0)


@given(seeds, lengths)
def test_a_joint_batch_is_each_row_alone(seed: int, counts: list[int]) -> None:
    embedded, kept, own = padded(seed, counts)
    for row, tokens in zip(features(embedded, kept), own):
        alone = features(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool))[0]
        torch.testing.assert_close(row, alone, atol=1e-6, rtol=0)


@given(seeds, lengths, st.integers(1, 5))
def test_parts_of_the_tokens_add_up(seed: int, counts: list[int], tokens: int) -> None:
    embedded, kept, _ = padded(seed, counts)
    parts = zip(embedded.split(tokens, dim=1), token_weights(kept).split(tokens, dim=2))
    found = sum(instruction_features(some, weights) for some, weights in parts)
    torch.testing.assert_close(found, features(embedded, kept), atol=1e-6, rtol=0)


@given(seeds, st.integers(2, 7))
def test_the_same_words_in_another_order_are_another_instruction(seed: int, count: int) -> None:
    embedded, kept, _ = padded(seed, [count])
    backwards = features(embedded.flip(1), kept.flip(1))[0]
    forwards = features(embedded, kept)[0]
    torch.testing.assert_close(backwards[:WIDTH], forwards[:WIDTH], atol=1e-6, rtol=0)
    torch.testing.assert_close(backwards[WIDTH:], (forwards[:WIDTH] - forwards[WIDTH:]), atol=1e-6, rtol=0)
    assert (backwards - forwards).abs().max() > 1e-4


def test_how_long_embeddings_are_does_not_matter() -> None:
    embedded, kept, _ = padded(0, [3, 5])
    for factor in (1e-3, 45.0, torch.rand(2, 8, 1) + 0.1):
        torch.testing.assert_close(features(factor * embedded, kept), features(embedded, kept), atol=1e-6, rtol=1e-6)
    assert not features(torch.zeros(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.bool)).any()


def test_half_precision_and_autocast() -> None:
    embedded, kept, _ = padded(1, [3, 5])
    half = embedded.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = features(half, kept)
    assert found.dtype == torch.float32
    assert torch.equal(found, features(half.float(), kept))


def test_what_a_template_adds_to_every_instruction_does_not_matter() -> None:
    """Constant words before and behind draw the means together; no task's instructions vary there."""
    generator = torch.Generator().manual_seed(0)
    words, width = torch.randn(200, 64, generator=generator), 128

    def asked(task: int, count: int, around: int) -> Tensor:
        rows = []
        for _ in range(count):
            slot = int(torch.randint(150, 200, (1,), generator=generator))
            rows.append([*range(around), 100 + task, 110, slot, 111 + task, *range(around, around + around // 4)])
        embedded = words[torch.tensor(rows)]
        return features(embedded, torch.ones(embedded.shape[:2], dtype=torch.bool))

    for around in (0, 100):
        known = [asked(task, 60, around) for task in range(3)]
        metric = shared_metric([centred(rows) for rows in known], [60] * 3, least=LEAST_VARIANCE / width)
        prototypes = torch.stack([rows.mean(0) for rows in known])
        new = torch.cat([asked(task, 40, around) for task in range(3)])
        weights = joint_weights(gaussian_scores(new, prototypes, metric, 1.0), None)
        assert weights.argmax(1).tolist() == [task for task in range(3) for _ in range(40)], around
        assert weights.amax(1).min() > 0.9


# --------------------------------------------------------------------------------- instructions and images together


def scored(seed: int, rows: int = 5, tasks: int = 3) -> tuple[Tensor, Tensor]:
    """Some log-likelihoods, and some weights of images."""
    generator = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(rows, tasks, generator=generator)
    return scores, torch.softmax(5 * torch.randn(rows, tasks, generator=generator), dim=-1)


@given(seeds)
def test_instructions_alone_are_the_gaussian_posterior(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prototypes, spread = torch.randn(3, 8, generator=generator), centred(torch.randn(20, 8, generator=generator))
    metric = shared_metric([spread], [20])
    rows = prototypes.repeat(2, 1) + 0.1 * torch.randn(6, 8, generator=generator)
    found = joint_weights(gaussian_scores(rows, prototypes, metric, 1.0), None)
    torch.testing.assert_close(found, task_weights(rows, prototypes, metric, 1.0))


@given(seeds)
def test_the_joint_posterior_is_the_product_of_both(seed: int) -> None:
    scores, of_images = scored(seed)
    found = joint_weights(scores, of_images)
    expected = scores.double().exp() * (of_images.double() + NEGLIGIBLE_WEIGHT)
    torch.testing.assert_close(found.double(), expected / expected.sum(1, keepdim=True), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(len(found)))
    # Neither says anything where it is the same for all tasks.
    same = torch.full_like(scores, -7.0)
    torch.testing.assert_close(joint_weights(same, of_images), of_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(joint_weights(scores, torch.ones_like(scores)), joint_weights(scores, None))


def test_images_tell_tasks_apart_that_ask_the_same_and_instructions_those_that_show_the_same() -> None:
    scores = torch.tensor([[0.0, 0.0, -900.0, -900.0]])  # tasks 0 and 1 ask this
    of_images = torch.tensor([[0.5, 0.0, 0.5, 0.0]])  # tasks 0 and 2 show this
    assert joint_weights(scores, of_images).argmax() == 0
    assert joint_weights(scores, of_images).max() > 0.999
    # A task that saw no image has no weight by one, and may be asked for all the same.
    assert joint_weights(torch.tensor([[-900.0, 0.0]]), torch.tensor([[1.0, 0.0]])).argmax() == 1


def test_what_is_like_no_task_by_either_gets_no_weight() -> None:
    scores, of_images = scored(0)
    scores[1], of_images[3] = -torch.inf, 0.0
    found = joint_weights(scores, of_images)
    assert found.sum(1).round().tolist() == [1, 0, 1, 0, 1]
    assert joint_weights(scores, None).sum(1).round().tolist() == [1, 0, 1, 1, 1]
    # Tasks that are not compared with are no strangers' doing.
    scores[:, 2] = -torch.inf
    found = joint_weights(scores, of_images)
    assert found.isfinite().all()
    assert not found[:, 2].any()
    assert found[0].sum() == 1


def test_a_task_takes_a_row_only_if_images_and_instruction_fit_it_each() -> None:
    scores = torch.tensor([[0.0, -3.0], [0.0, -torch.inf], [-torch.inf, 0.0], [0.0, -9.0]])
    of_images = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    fits = torch.tensor([[False, True], [False, True], [False, True], [True, True]])
    found = joint_weights(scores, of_images, fits)
    assert found.tolist() == [[0, 1], [0, 0], [0, 1], [1, 0]]
    assert joint_weights(scores, of_images)[1].tolist() == [1, 0]  # by the sum, what it asks made up for its images
