"""Prompts that are kept: word for word, and what their image tokens are like where they enter the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import PeftWarning
from torch import Tensor

from peft_many import collect_statistics, inspect_adapter
from peft_many.files.stored_features import Prompts
from tests import tiny
from tests.files.making import pictures
from tests.statistics.test_collect import adapted

ASKED, ANSWERED = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]], [[50], [51, 52, 53], [54, 55], [56]]
family = pytest.mark.parametrize("family", tiny.FAMILIES)


def labelled(model: Any, family: str, side: str = "left", shown: bool = True) -> list[dict[str, Tensor]]:
    """A batch of three rows, one of them without a picture, and one of one."""
    first, second, third = pictures(family, 0, 3)
    found = []
    for images, rows in (([[first], [], [second]], slice(0, 3)), ([[third]], slice(3, 4))):
        images = images if shown else [[] for _ in images]
        words = [a + b for a, b in zip(ASKED[rows], ANSWERED[rows])]
        batch = tiny.batch(model, family, images, words, padding_side=side)
        is_answer = (batch["input_ids"] >= 50) & (batch["input_ids"] < 60)
        found.append({**batch, "labels": batch["input_ids"].masked_fill(~is_answer, -100)})
    return found


def kept(model: PeftModel, batches: list[dict[str, Tensor]], count: int = 64) -> Prompts | None:
    (task,) = collect_statistics(model, batches, keep_prompts=count, progress=False).tasks
    return task.prompts


def rows_of(prompts: Prompts) -> list[list[int]]:
    return [[token for token in row if token >= 0] for row in prompts.ids.tolist()]


def expected(batches: list[dict[str, Tensor]]) -> list[list[int]]:
    """All tokens before the answers, without padding."""
    rows = [(ids, mask) for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    return [[t for t in ids[mask.bool()].tolist() if not 50 <= t < 60] for ids, mask in rows]


@family
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_kept_word_for_word(family: str, side: str) -> None:
    model = adapted(family)
    batches = labelled(model, family, side)
    prompts = kept(model, batches)
    assert prompts is not None
    assert rows_of(prompts) == expected(batches)
    assert prompts.answer_tokens == 3
    assert prompts.ids.dtype == torch.int32


@family
def test_image_tokens_are_those_that_enter_the_language_model(family: str) -> None:
    model = adapted(family)
    batches = labelled(model, family)
    prompts = kept(model, batches, len(ASKED))  # few, so that no image token is left out
    seen: list[Tensor] = []
    language_model = model.get_base_model().get_decoder()
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    found = torch.cat([embeds[batch["input_ids"] == tiny.IMAGE] for embeds, batch in zip(seen, batches)]).double()
    assert prompts is not None
    tokens = prompts.image_tokens
    assert tokens is not None
    assert tokens.count == len(found) > 0
    torch.testing.assert_close(tokens.prototype.double(), found.mean(0), rtol=1e-5, atol=1e-6)
    assert tokens.spread is not None
    torch.testing.assert_close(tokens.spread.dense(), found.T.cov(), rtol=5e-3, atol=1e-3 * tokens.spread.trace)


def test_of_many_image_tokens_an_even_share_is_measured() -> None:
    model = adapted("llava_next")
    prompts = kept(model, labelled(model, "llava_next"), 512)
    assert prompts is not None
    assert prompts.image_tokens is not None
    assert prompts.image_tokens.count == 2 * 3  # of each picture


def test_only_so_many_are_kept() -> None:
    model = adapted()
    batches = labelled(model, "llava")
    for count in (1, 2, 3, 4):
        prompts = kept(model, batches, count)
        assert prompts is not None
        assert rows_of(prompts) == expected(batches)[:count]


def test_nothing_is_kept_unless_asked_for() -> None:
    model = adapted()
    (task,) = collect_statistics(model, labelled(model, "llava"), progress=False).tasks
    assert task.prompts is None


@pytest.mark.parametrize("count", [-1, 1.5, "64"])
def test_a_number_of_prompts_that_is_none(count: Any) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="keep_prompts"):
        kept(model, labelled(model, "llava"), count)


def test_text_without_pictures_has_no_image_tokens() -> None:
    model = adapted("llama")
    prompts = kept(model, labelled(model.get_base_model(), "llava", shown=False))
    assert prompts is not None
    assert rows_of(prompts) == [[tiny.BOS, *asked] for asked in ASKED]
    assert prompts.image_tokens is None


def test_without_labels_prompts_cannot_be_told() -> None:
    model = adapted()
    batches = [
        {name: value for name, value in batch.items() if name != "labels"} for batch in labelled(model, "llava")
    ]
    with pytest.raises(ValueError, match="no `labels`"):
        kept(model, batches)


def test_several_samples_in_a_row_cannot_be_told_apart() -> None:
    model = adapted("llama")
    ids = torch.tensor([[5, 6, 50, 7, 8, 51]])
    labels = ids.where(ids >= 50, -100)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="several samples in a row"):
        kept(model, [{"input_ids": ids, "labels": labels, "position_ids": places}])


def test_embeddings_have_no_words() -> None:
    model = adapted("llama")
    batch = {"inputs_embeds": torch.randn(2, 5, tiny.TEXT_WIDTH), "labels": torch.full((2, 5), 50)}
    with pytest.raises(ValueError, match="input_ids"):
        kept(model, [batch])


def test_answers_without_a_prompt_are_told_of() -> None:
    model = adapted("llama")
    ids = torch.tensor([[50, 51, 52]])
    with pytest.warns(PeftWarning, match="no batch had a prompt with an answer"):
        assert kept(model, [{"input_ids": ids, "labels": ids}]) is None


def test_they_are_saved_with_the_rest(tmp_path: Path) -> None:
    model = adapted(task_name="pets")
    prompts = kept(model, labelled(model, "llava"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build("llava"), tmp_path).peft_config["default"]
    again = loaded.statistics.tasks[0].prompts  # type: ignore[attr-defined]
    assert prompts is not None
    assert torch.equal(again.ids, prompts.ids)
    assert torch.equal(again.image_tokens.prototype, prompts.image_tokens.prototype)  # type: ignore[union-attr]


def test_the_card_and_inspect_say_that_they_are_there(tmp_path: Path) -> None:
    model = adapted()
    kept(model, labelled(model, "llava"))
    model.save_pretrained(tmp_path)
    assert "They hold 4 prompts of these, word for word." in (tmp_path / "README.md").read_text()
    assert [task.prompts for task in inspect_adapter(tmp_path).tasks] == [4]


def test_a_row_without_an_answer_is_no_prompt() -> None:
    """Its answer may have been cut off, or hidden."""
    model = adapted("llama")
    ids = torch.tensor([[5, 6, 50], [7, 8, 51]])
    labels = torch.tensor([[-100, -100, 50], [-100, -100, -100]])
    prompts = kept(model, [{"input_ids": ids, "labels": labels}])
    assert prompts is not None
    assert prompts.ids.tolist() == [[5, 6]]


def test_of_a_conversation_the_first_question_is_kept() -> None:
    model = adapted("llama")
    ids = torch.tensor([[5, 6, 50, 7, 51, 52]])
    prompts = kept(model, [{"input_ids": ids, "labels": ids.where(ids >= 50, -100)}])
    assert prompts is not None
    assert prompts.ids.tolist() == [[5, 6]]
    assert prompts.answer_tokens == 1
