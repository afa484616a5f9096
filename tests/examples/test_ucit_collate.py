"""Batches: the real processors on tiny images, the published prompt, and labels on nothing but answers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from peft_many.data.conversations import question_about
from tests import tiny
from tests.examples import toy

collate = toy.example("collate")


def rows(*answers, question="What colour is it ?", picture=None):
    picture = picture or Image.new("RGB", (20, 16), "red")
    messages = list(question_about([picture], question).messages)
    return [
        {"id": number, "messages": messages, "images": [picture], "answer": answer}
        for number, answer in enumerate(answers)
    ]


@pytest.fixture(params=["llava", "internvl"])
def family(request):
    if request.param == "internvl":
        pytest.importorskip("torchvision", reason="InternVL's processor needs it")
    return request.param


def test_only_the_answer_is_a_label(family):
    processor = toy.processor(family)
    batch = collate.Collator(processor, family).training(rows("red", "blue red green"))
    tokens, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert tokens.shape == labels.shape == mask.shape
    for row, answer in enumerate(("red", "blue red green")):
        chosen = labels[row] != collate.IGNORED
        assert torch.equal(labels[row][chosen], tokens[row][chosen])
        end = processor.tokenizer.eos_token
        assert processor.tokenizer.decode(labels[row][chosen]).replace(" ", "") == f"{answer}{end}".replace(" ", "")
        assert bool(chosen[int(mask[row].sum()) - 1]), "the end of the text is learnt"
        assert not chosen[mask[row] == 0].any()
    assert tokens[0, -1] == processor.tokenizer.pad_token_id, "training rows are padded on the right"
    model = tiny.build(family)
    assert torch.isfinite(model(**batch).loss)
    expected = (batch["pixel_values"].shape[0]) * (16 if family == "llava" else 4)
    assert int((tokens == tiny.IMAGE).sum()) == expected


def test_questions_are_what_training_showed_before_the_answer(family):
    processor = toy.processor(family)
    collator = collate.Collator(processor, family)
    asked, trained = collator.questions(rows("red")), collator.training(rows("red"))
    length = asked["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], asked["input_ids"])
    assert (trained["labels"][:, :length] == collate.IGNORED).all()
    assert (trained["labels"][:, length:] != collate.IGNORED).all()
    two = collator.questions([*rows("red"), *rows("red", question="What ?")])
    assert two["input_ids"][1, 0] == processor.tokenizer.pad_token_id, "questions are padded on the left"


def test_llava_is_asked_as_it_was_trained():
    collator = collate.Collator(toy.processor("llava"), "llava")
    prompt = collator._prompt(*rows("red", question="What ?"))
    assert prompt == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat ? ASSISTANT:"
    )
    assert collator._with_answer(prompt, "red").endswith("What ? ASSISTANT: red</s>")


def test_images_are_padded_to_squares_where_they_would_be_cropped():
    picture = Image.new("RGB", (32, 16), "black")
    picture.paste("white", (0, 0, 4, 16))  # at the left end, which a square from the middle does not have
    row = rows("red", picture=picture)
    padded, cropped = (
        collate.Collator(toy.processor("llava"), "llava", pad_images=pads).questions(row)["pixel_values"][0]
        for pads in (True, False)
    )
    assert cropped.max() < 0
    assert padded[:, 4:12].max() > 1
    assert padded[:, :2].abs().max() < 0.02, "the padding is the mean colour"


def test_long_examples_are_cut_but_never_without_an_answer():
    collator = collate.Collator(toy.processor("llava"), "llava")
    whole = collator.training(rows("red blue green"))
    length = whole["input_ids"].shape[1]
    cut = collate.Collator(toy.processor("llava"), "llava", max_length=length - 2).training(rows("red blue green"))
    assert torch.equal(cut["labels"], whole["labels"][:, :-2])
    assert int((cut["labels"] != collate.IGNORED).sum()) == 2
    with pytest.raises(ValueError, match=rf"example 0 has its answer behind {length - 4} tokens"):
        collate.Collator(toy.processor("llava"), "llava", max_length=length - 4).training(rows("red blue green"))
