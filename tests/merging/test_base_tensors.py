"""What PEFT saves beside adapters untrained: the weights of an adapted head, embeddings of a resized vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_many import (
    MAnyConfig,
    add_task,
    collect_statistics,
    export_lora,
    export_model,
    merge_adapter_files,
    merge_adapter_sequence,
    plan_merge,
    pool_adapters,
    remove_task,
)
from peft_many.files.errors import UnmergeableAdapterError
from tests.adapters import WEIGHTS, batches, scatter

HEAD = "base_model.model.lm_head.base_layer.weight"
RESIZED = ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """By whether head and embeddings are tied, a model on disk, where PEFT looks for the size of the vocabulary."""
    root = tmp_path_factory.mktemp("bases")
    with torch.random.fork_rng(devices=[]):
        for tied in (True, False):
            torch.manual_seed(3)
            config = LlamaConfig(**SHAPE, vocab_size=128, tie_word_embeddings=tied)
            LlamaForCausalLM(config).save_pretrained(root / str(tied))
    return {tied: root / str(tied) for tied in (True, False)}


def load(folder: Path, rows: int | None = None, seed: int = 0) -> LlamaForCausalLM:
    """The model, with a vocabulary of so many rows, the new ones as random as they usually are."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def make(
    folder: Path, model: LlamaForCausalLM, seed: int, kind: type[LoraConfig] = MAnyConfig, **options: Any
) -> Path:
    adapted = get_peft_model(model, kind(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **options}))
    scatter(adapted, seed)
    collect_statistics(adapted, batches(adapted, "llama", seed), energy=1.0, progress=False)
    adapted.save_pretrained(folder)
    return folder


def beside(folder: Path) -> list[str]:
    """The tensors of a file that are no LoRA."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return sorted(key for key in file.keys() if ".lora_" not in key)  # noqa: SIM118  (a file, no dictionary)


@torch.no_grad()
def outputs(model: torch.nn.Module) -> Tensor:
    return torch.cat([model(**batch).logits.flatten() for batch in batches(model, "llama", 9)])


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_the_head_merges_and_is_edited_and_exported(tmp_path: Path, bases: Any, tied: bool) -> None:
    targets = {"target_modules": ["q_proj", "lm_head"]}
    a = make(tmp_path / "a", load(bases[tied]), 1, **targets)
    b = make(tmp_path / "b", load(bases[tied]), 2, LoraConfig, **targets)
    c = make(tmp_path / "c", load(bases[tied]), 3)  # adapts no head
    merged = merge_adapter_files([a, b, c], tmp_path / "merged", progress=False)
    assert beside(merged) == [HEAD]
    expected = outputs(merge_adapter_sequence(load(bases[tied]), [c, b, a], progress=False))
    assert torch.equal(outputs(PeftModel.from_pretrained(load(bases[tied]), merged)), expected)
    one = outputs(merge_adapter_sequence(load(bases[tied]), [a], progress=False))
    torch.testing.assert_close(one, outputs(PeftModel.from_pretrained(load(bases[tied]), a)))

    left = remove_task(merged, "b", tmp_path / "left", progress=False)
    assert weights(left) == weights(merge_adapter_files([a, c], tmp_path / "a+c", progress=False))
    assert weights(add_task(left, b, tmp_path / "added", progress=False)) == weights(merged)
    without = remove_task(left, "a", tmp_path / "without", progress=False)
    assert beside(without) == []
    assert weights(without) == weights(merge_adapter_files([c], tmp_path / "only c", progress=False))
    pool = pool_adapters([a, b, c], tmp_path / "pool", progress=False)
    assert beside(pool) == [HEAD]
    pooled = outputs(merge_adapter_sequence(load(bases[tied]), [pool], progress=False))
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)

    exported = export_model(merged, tmp_path / "model", base_model=bases[tied]).folder
    torch.testing.assert_close(outputs(LlamaForCausalLM.from_pretrained(exported)), expected, atol=1e-5, rtol=1e-4)
    lora = export_lora(merged, tmp_path / "lora")
    assert "'lm_head.weight'" in lora.notes[1]
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(load(bases[tied]), lora.folder)), expected)


def test_vocabularies_that_were_resized_alike(tmp_path: Path, bases: Any) -> None:
    folder = bases[False]
    a = make(tmp_path / "a", load(folder, 136), 1)
    b = make(tmp_path / "b", load(folder, 136), 2, target_modules=["q_proj", "lm_head"])
    assert (beside(a), beside(b)) == (RESIZED, [HEAD])
    merged = merge_adapter_files([a, b], tmp_path / "merged", progress=False)
    assert beside(merged) == [HEAD, RESIZED[1]]
    expected = outputs(merge_adapter_sequence(load(folder, 136), [a, b], progress=False))
    assert torch.equal(
        outputs(PeftModel.from_pretrained(load(folder, 136, seed=5), merged)), expected
    )  # brings its own
    half = merge_adapter_sequence(load(folder, 136).bfloat16(), [a, b], progress=False)  # the same but for rounding
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    exported = export_model(merged, tmp_path / "model", base_model=folder).folder
    torch.testing.assert_close(outputs(LlamaForCausalLM.from_pretrained(exported)), expected, atol=1e-5, rtol=1e-4)
    left = remove_task(merged, "a", tmp_path / "left", progress=False)
    assert weights(left) == weights(merge_adapter_files([b], tmp_path / "b alone", progress=False))


def test_vocabularies_that_do_not_agree(tmp_path: Path, bases: Any) -> None:
    folder = bases[False]
    seeds = {"a": 0, "b": 0, "c": 1}
    a, b, c = (make(tmp_path / name, load(folder, 136, seed), ord(name)) for name, seed in seeds.items())
    for adapters in ([a, b, c], [c, b]):
        with pytest.raises(UnmergeableAdapterError, match=r"'(lm_head|model.embed_tokens).weight'.*/[ab] and .*/c,"):
            merge_adapter_files(adapters, tmp_path / "merged", progress=False)
        assert "resize" in plan_merge(adapters, progress=False).problems[0].lower()
    for model, why in (
        (load(folder), r"the shape \(128, 32\) .*resize_token_embeddings\(136\)"),
        (load(folder, 136, seed=1), "not the same .*random rows"),
    ):
        before = model.get_input_embeddings().weight.clone()
        with pytest.raises(UnmergeableAdapterError, match=why):
            merge_adapter_sequence(model, [a, b], progress=False)
        assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("shape", [(4,), (1, 128, 32)])
def test_embeddings_of_an_impossible_shape(tmp_path: Path, bases: Any, shape: tuple[int, ...]) -> None:
    a = make(tmp_path / "a", load(bases[False]), 1)
    tensors = load_file(a / WEIGHTS)
    save_file({**tensors, RESIZED[0]: torch.ones(shape)}, a / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnmergeableAdapterError, match=r"lm_head.weight' has the impossible shape"):
        merge_adapter_files([a], tmp_path / "merged", progress=False)
