"""Batches of conversations: labels on answers alone, images where they belong, models of text by their tokenizer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from peft_many.data.batches import IGNORED, ChatCollator, Rows, batches
from peft_many.data.conversations import question_about
from peft_many.data.reading import read_examples
from tests import tiny
from tests.examples import toy

TEXT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def examples(*rows):
    return read_examples([{"question": "What colour is it ?", **row} for row in rows])


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


@pytest.fixture
def processor():
    return toy.processor("llava")


def answered(processor, batch) -> list[str]:
    decode = getattr(processor, "tokenizer", processor).decode
    answers = [decode(ids[labels != IGNORED]) for ids, labels in zip(batch["input_ids"], batch["labels"])]
    return [answer.replace(" </s>", "</s>") for answer in answers]


def test_rows_with_several_images_one_and_none(processor):
    rows = examples(
        {"images": [picture("red"), picture("blue")], "answer": "red"},
        {"image": picture("green"), "answer": "green"},
        {"answer": "grey</s>"},  # as trainers that add no end need it
    )
    (batch,) = batches(rows, ChatCollator(processor).training, 4)
    assert answered(processor, batch) == ["red</s>", "green</s>", "grey</s>"]
    assert (batch["input_ids"] == tiny.IMAGE).sum(1).tolist() == [32, 16, 0]
    assert len(batch["pixel_values"]) == 3
    assert torch.isfinite(tiny.build("llava")(**batch).loss)
    (alone,) = batches(rows[2:], ChatCollator(processor).training, 4)
    assert "pixel_values" not in alone


def test_only_the_last_answer_of_a_conversation_is_learnt(processor):
    turns = [("user", "What colour is it ?"), ("assistant", "red"), ("user", "How many ?"), ("assistant", "a")]
    one, two = read_examples([{"messages": [{"role": role, "content": said} for role, said in turns]}])
    (batch,) = batches([one, two], ChatCollator(processor).training, 2)
    assert answered(processor, batch) == ["red</s>", "a</s>"]
    sizes = [len(batch["input_ids"]) for batch in batches([one, two, one], ChatCollator(processor).training, 2)]
    assert sizes == [2, 1]


def test_a_system_prompt_is_added_where_there_is_none(processor):
    collator = ChatCollator(processor, "A chat between a human and an assistant .")
    own = read_examples(
        [{"messages": [{"role": r, "content": c} for r, c in (("system", "The"), ("user", "?"), ("assistant", "a"))]}]
    )
    plain = examples({"answer": "red"})
    asked = [collator._prompt(Rows(each)[0]) for each in (plain, own)]
    assert asked[0].startswith("A chat between")
    assert asked[1].startswith("The USER")
    assert plain[0].messages[0]["role"] == "user", "what was read stays as it is"


def test_models_of_text_are_asked_in_words(tmp_path):
    tokenizer = toy.tokenizer("llava")
    tokenizer.chat_template = TEXT
    tokenizer.save_pretrained(tmp_path)
    collator = ChatCollator(AutoTokenizer.from_pretrained(tmp_path))
    (batch,) = batches(examples({"answer": "red"}, {"answer": "blue green"}), collator.training, 2)
    assert answered(tokenizer, batch) == ["red</s>", "blue green</s>"]
    (asked,) = batches([question_about([], "How many ?"), *examples({"answer": "red"})], collator.questions, 2)
    assert asked["input_ids"][0, 0] == tokenizer.pad_token_id, "questions are padded on the left"
    with pytest.raises(ValueError, match="the model's processor takes none"):
        next(batches(examples({"image": picture("red"), "answer": "red"}), collator.questions, 1))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatCollator(tokenizer)


def test_images_for_a_model_of_text_show_before_it_is_loaded():
    tokenizer = toy.tokenizer("llava")
    tokenizer.chat_template = TEXT
    collator = ChatCollator(tokenizer)
    collator.check([question_about([], "What?")])
    with pytest.raises(ValueError, match="takes none: it is a model of text"):
        collator.check([question_about([], "What?"), question_about(["a.png"], "What?")])
