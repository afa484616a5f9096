"""A request's words count in a server what they count in PEFT: the same tensors, embeddings and arithmetic."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_many.routing.instructions import features_of_instructions, router_of
from peft_many.routing.row_weights import RowWeights
from peft_many.serving.merge import ServedMerge
from peft_many.serving.words import placeholders, router_of_words, scores_of_words, weights_of_request
from tests import tiny
from tests.adapters import base
from tests.exports.shelf import Shelf

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.mark.parametrize("above", [None, 0.35])
def test_the_scores_are_those_of_the_router(shelf, tmp_path, monkeypatch, above):
    monkeypatch.setattr("peft_many.algebra.instructions._AT_ONCE", 5)
    merged = shelf.merge("abc", tmp_path / "merged", gate_by="both", abstain_above=above)
    model = base("llava")
    router = router_of(PeftModel.from_pretrained(model, merged).base_model.model, "default")
    words = router_of_words(ServedMerge.read(str(merged)), CPU)
    image = model.config.image_token_id
    assert placeholders(model.config) == {image}
    prompts = [[1, *[image] * 4, *tiny.TEXT_TOKENS[place : place + 12]] for place in (0, 13, 26, 50)]
    expected = router.scores(features_of_instructions(model, {"input_ids": torch.tensor(prompts)})[1])
    embed = model.get_input_embeddings()
    found = torch.stack([scores_of_words(words, [one for one in ids if one != image], embed) for ids in prompts])
    torch.testing.assert_close(found, expected)
    assert torch.isneginf(found).any() == (above is not None)
    images = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.7]])
    for scores in found:
        rows = RowWeights(images.sum(0, keepdim=True), torch.tensor([2.0]), 0, scores[None])
        torch.testing.assert_close(weights_of_request(images, scores), rows.weights[0])
        rows = RowWeights(torch.zeros(1, 3), torch.zeros(1), 0, scores[None])
        torch.testing.assert_close(weights_of_request(None, scores), rows.weights[0])
        fits = torch.tensor([[True, False, False], [True, True, False]])
        rows = RowWeights(images.sum(0, keepdim=True), torch.tensor([2.0]), 0, scores[None], fits=fits.any(0)[None])
        torch.testing.assert_close(weights_of_request(images, scores, fits), rows.weights[0])
        assert weights_of_request(images, scores, fits)[2] == 0
        assert weights_of_request(images, scores, torch.zeros_like(fits)).tolist() == [0, 0, 0]


def test_what_nothing_tells():
    assert weights_of_request(None, None) is None
    assert weights_of_request(torch.zeros(0, 2), None) is None
    images = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert weights_of_request(images, None).tolist() == [0.75, 0.25]
    assert weights_of_request(None, torch.tensor([-torch.inf, -torch.inf])).tolist() == [0.0, 0.0]


def test_merges_without_it(shelf, tmp_path):
    assert router_of_words(ServedMerge.read(str(shelf.merge("ab", tmp_path / "images", gate_lora=True))), CPU) is None
    torn = shutil.copytree(shelf.merge("ab", tmp_path / "both", gate_by="both"), tmp_path / "torn")
    config = json.loads((torn / "adapter_config.json").read_text())
    config["merge"]["instructions"]["width"] += 1
    (torn / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks what instructions are compared with"):
        router_of_words(ServedMerge.read(str(torn)), CPU)


def test_a_prompt_without_words(shelf, tmp_path):
    words = router_of_words(ServedMerge.read(str(shelf.merge("ab", tmp_path / "merged", gate_by="both"))), CPU)
    assert scores_of_words(words, [], nn.Embedding(3, words.prototypes.shape[1] // 2)).isfinite().all()
