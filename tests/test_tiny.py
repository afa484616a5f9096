"""The promises of `tiny`: its models build fast, padding changes nothing, generation runs, and images matter."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import tiny

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on busy cores waiting for them costs a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(tiny.FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return tiny.build(family)


def picture(family: str, number: int) -> torch.Tensor:
    """Pictures of different styles, and where the family allows it of different sizes."""
    sizes = tiny.sizes(family)
    return tiny.random_image(family, number, style=number, size=sizes[number % len(sizes)])


def mixed_rows(family: str) -> list[list[torch.Tensor]]:
    """One picture, three, none, and two."""
    return [[picture(family, number) for number in row] for row in ([0], [1, 2, 3], [], [4, 5])]


def logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**inputs).logits
    return output


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_gives_the_same_as_that_row_alone(family: str, model: PreTrainedModel, side: str) -> None:
    rows = mixed_rows(family)
    inputs = tiny.batch(model, family, rows, PROMPTS, padding_side=side)
    joint = logits(model, inputs)
    for row, prompt, mask, scores in zip(rows, PROMPTS, inputs["attention_mask"].bool(), joint, strict=True):
        alone = logits(model, tiny.batch(model, family, [row], [prompt]))[0]
        torch.testing.assert_close(scores[mask], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}])
def test_generation_of_a_batch_is_that_of_each_row(
    family: str, model: PreTrainedModel, options: dict[str, Any]
) -> None:
    def generate(rows: list[list[torch.Tensor]], prompts: list[list[int]]) -> torch.Tensor:
        inputs = tiny.batch(model, family, rows, prompts)
        tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
        return tokens[:, -4:]

    rows = mixed_rows(family)
    joint = generate(rows, PROMPTS)
    assert not set(joint.flatten().tolist()) & set(tiny.SPECIAL_TOKENS)
    alone = [generate([row], [prompt]) for row, prompt in zip(rows, PROMPTS, strict=True)]
    assert torch.equal(joint, torch.cat(alone))


def test_one_picture_per_row_and_rows_of_text_only(family: str, model: PreTrainedModel) -> None:
    pictures = [[picture(family, number)] for number in range(3)]
    text_only: list[list[torch.Tensor]] = [[], []]
    for rows in (pictures, text_only):
        inputs = tiny.batch(model, family, rows)
        scores = logits(model, inputs)
        assert scores.shape == (len(rows), inputs["input_ids"].shape[1], tiny.VOCABULARY)
        assert ("pixel_values" in inputs) == any(map(bool, rows))


def test_pictures_and_their_order_matter(family: str, model: PreTrainedModel) -> None:
    def last(*numbers: int) -> torch.Tensor:
        row = [tiny.random_image(family, number, style=number) for number in numbers]
        return logits(model, tiny.batch(model, family, [row], [[5, 6, 7]]))[0, -1]

    for one, other in ((last(0), last(3)), (last(0, 3), last(3, 0))):
        assert (one - other).std() > 0.1 * one.std()


def test_styles_are_apart_at_the_projector(family: str, model: PreTrainedModel) -> None:
    name = re.compile(r"(.*\.)?(multi_modal_projector|connector|merger)")
    (projector,) = [module for path, module in model.named_modules() if name.fullmatch(path)]
    features: list[torch.Tensor] = []
    hook = projector.register_forward_pre_hook(lambda _, args: features.append(args[0].flatten(0, -2).mean(0)))
    for style in range(4):
        for seed in range(3):
            logits(model, tiny.batch(model, family, [[tiny.random_image(family, seed, style)]]))
    hook.remove()
    groups = torch.stack(features).view(4, 3, -1)
    centres = groups.mean(1)
    assert torch.pdist(centres).min() > 2 * (groups - centres[:, None]).norm(dim=-1).max()


def test_weights_follow_the_seed_and_none_is_degenerate(family: str, model: PreTrainedModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert not model.training
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    twin, other = tiny.build(family), tiny.build(family, seed=1)
    assert torch.equal(torch.rand(1), expected)
    others = dict(other.named_parameters())
    twins = dict(twin.named_parameters())
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, twins[path])
        assert not torch.equal(parameter, others[path])
        assert parameter.numel() == 1 or parameter.std() > 0


def test_half_precision(family: str) -> None:
    model = tiny.build(family, dtype=torch.bfloat16)
    inputs = tiny.batch(model, family, mixed_rows(family))
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert logits(model, inputs).isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_text_models(kind: Any) -> None:
    model = tiny.build_text(kind)
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    scores = logits(model, {"input_ids": tokens} | decoder)
    assert scores.shape == (2, 3, tiny.VOCABULARY)
    assert scores.std() > 0.1
    new = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert new.shape == (2, 5 if decoder else 7)
