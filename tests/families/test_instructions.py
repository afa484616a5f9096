"""Which tokens of a batch are the words of its instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from peft_many.families.instructions import instructions_of
from peft_many.families.prompts import PICTURE_INDEX
from tests import tiny
from tests.files import making

ASKED, ANSWERED = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [[50], [51, 52, 53], [54, 55]]


def words(model: nn.Module, **arguments: Any) -> list[list[int]]:
    """The words of each instruction, without the token that begins every prompt."""
    found = instructions_of(model, arguments)
    assert found is not None
    assert not found.ids[~found.kept].any()
    return [[int(token) for token in ids[kept] if token != tiny.BOS] for ids, kept in zip(found.ids, found.kept)]


def answered(model: nn.Module, family: str, side: str, images: list[list[Tensor]] | None = None) -> dict[str, Tensor]:
    """Prompts with answers, and labels of these."""
    rows = images or [[] for _ in ASKED]
    batch = tiny.batch(model, family, rows, [a + b for a, b in zip(ASKED, ANSWERED)], padding_side=side)
    is_answer = (batch["input_ids"] >= 50) & (batch["input_ids"] < 60)
    return {**batch, "labels": batch["input_ids"].masked_fill(~is_answer, -100)}


def told(model: nn.Module, **arguments: Any) -> list[bool]:
    found = instructions_of(model, arguments)
    assert found is not None
    return found.told.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_instruction_ends_where_the_labels_begin(side: str) -> None:
    model = tiny.build_text("llama")
    batch = answered(model, "llava", side)
    assert words(model, **batch) == ASKED
    assert told(model, **batch) == [True] * 3
    del batch["labels"]
    assert words(model, **batch) == [a + b for a, b in zip(ASKED, ANSWERED)]
    assert told(model, **batch) == [False] * 3
    del batch["attention_mask"]  # the token of padding is known
    assert words(model, **batch) == [a + b for a, b in zip(ASKED, ANSWERED)]


def test_what_padding_is_nobody_says() -> None:
    model = tiny.build_text("llama")
    model.config.eos_token_id = model.config.pad_token_id  # as many models have it: it may be a word of a chat, too
    batch = answered(model, "llava", "left")
    found = words(model, input_ids=batch["input_ids"])
    assert [row[-2:] for row in found] == [(a + b)[-2:] for a, b in zip(ASKED, ANSWERED)]
    assert {len(row) for row in found} == {6}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_placeholders_of_images_are_no_words(family: str, side: str) -> None:
    model = making.shared_base(family)
    images = [[tiny.random_image(family, n, size=size) for n in range(count)] for count, size in zip(
        (1, 2, 0), [tiny.sizes(family)[-1]] * 3)]  # fmt: skip
    found = words(model, **answered(model, family, side, images))
    assert [[token for token in row if token not in tiny.SPECIAL_TOKENS] for row in found] == ASKED
    assert not {tiny.IMAGE, tiny.VIDEO} & {token for row in found for token in row}
    assert found[2] == ASKED[2]


def test_images_as_llavas_own_code_writes_them() -> None:
    ids = torch.tensor([[tiny.BOS, PICTURE_INDEX, 5, 6], [tiny.BOS, 7, PICTURE_INDEX, 8]])
    assert words(tiny.build_text("llama"), input_ids=ids) == [[5, 6], [7, 8]]


def test_of_several_turns_the_first_question_is_asked() -> None:
    ids = torch.tensor([[5, 6, 50, 7, 8, 51], [5, 50, 7, 8, 9, 51]])
    labels = ids.masked_fill(ids < 50, -100)
    assert words(tiny.build_text("llama"), input_ids=ids, labels=labels) == [[5, 6], [5]]


def test_where_everything_is_an_answer_all_of_it_is_the_instruction() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 50], [8, 9, 0]])
    labels = torch.tensor([[5, 6, 7], [-100, -100, 50], [8, 9, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])
    model = tiny.build_text("llama")
    assert words(model, input_ids=ids, labels=labels, attention_mask=mask) == [[5, 6, 7], [8, 9], [8, 9]]
    assert told(model, input_ids=ids, labels=labels, attention_mask=mask) == [False, True, False]


def test_labels_of_another_kind_say_that_everything_is_asked() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    t5 = tiny.build_text("t5")
    for labels in (torch.tensor([[50, 51], [52, -100]]), torch.tensor([[50, 51, 52], [-100, 53, 54]])):
        assert words(t5, input_ids=ids, labels=labels) == ids.tolist()
        assert told(t5, input_ids=ids, labels=labels) == [True, True]
    assert told(t5, input_ids=ids) == [True, True]
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    assert words(bert, input_ids=ids, labels=torch.tensor([0, 1])) == ids.tolist()
    assert told(bert, input_ids=ids, labels=torch.tensor([0, 1])) == [True, True]
    assert told(bert, input_ids=ids) == [False, False]


# ------------------------------------------------------------------------------------------------- packing and masks

PACKED = {
    "input_ids": torch.tensor([[5, 6, 50, 7, 51, 52], [8, 50, 9, 10, 11, 51]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]),
}


def test_packed_rows_are_cut() -> None:
    model, labels = tiny.build_text("llama"), PACKED["input_ids"].clone()
    labels[labels < 50] = -100
    assert words(model, **PACKED, labels=labels) == [[5, 6], [7], [8], [9, 10, 11]]
    assert words(model, **PACKED) == [[5, 6, 50], [7, 51, 52], [8, 50], [9, 10, 11, 51]]
    found = instructions_of(model, PACKED)
    assert found is not None
    assert found.is_packed


def test_padding_of_packed_rows_is_no_sample() -> None:
    ids, places = PACKED["input_ids"].clone(), PACKED["position_ids"].clone()
    ids[0, 3:], places[0, 3:] = tiny.PAD, 0
    found = words(tiny.build_text("llama"), input_ids=ids, position_ids=places)
    assert found == [[5, 6, 50], [8, 50], [9, 10, 11, 51]]


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.arange(3).expand(2, -1)},
        {"position_ids": torch.tensor([[1, 0, 1], [0, 1, 2]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
        {"position_ids": torch.arange(3).expand(3, 2, -1)},  # of Qwen-VL
        {"position_ids": torch.tensor([[7], [5]]), "input_ids": torch.tensor([[5], [6]])},
    ],
)
def test_other_position_ids_pack_nothing(more: dict[str, Tensor]) -> None:
    found = instructions_of(tiny.build_text("llama"), {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), **more})
    assert found is not None
    assert not found.is_packed
    assert len(found.ids) == 2


def test_masks_of_other_shapes() -> None:
    model, ids = tiny.build_text("llama"), torch.tensor([[tiny.PAD, 5, 6], [7, 8, 9]])
    expected = [[5, 6], [7, 8, 9]]
    of_attention = torch.ones(2, 1, 3, 3).tril()
    assert words(model, input_ids=ids, attention_mask=of_attention) == expected
    assert words(model, input_ids=ids, attention_mask={"full_attention": of_attention}) == expected
    of_cached_too = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert words(model, input_ids=ids, attention_mask=of_cached_too) == expected
    for dtype in (torch.bool, torch.float32):
        assert words(model, input_ids=ids, attention_mask=of_cached_too[:, 3:].to(dtype)) == expected


def test_no_token_ids_no_instructions() -> None:
    model = tiny.build_text("llama")
    assert instructions_of(model, {"inputs_embeds": torch.randn(1, 3, 32)}) is None
    assert instructions_of(model, {"input_ids": torch.zeros(2, 0, dtype=torch.int64)}) is None
    assert instructions_of(model, {"inputs": torch.randn(1, 3)}) is None
    assert words(model, inputs=torch.tensor([[5, 6]])) == [[5, 6]]
