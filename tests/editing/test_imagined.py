"""Samples that are imagined from what statistics keep, and a merge that is refitted on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence, pool_adapters, refit_merge
from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.spread import gaussian
from peft_many.editing.imagined import imagined
from peft_many.files.statistics import AdapterStatistics
from peft_many.files.stored_features import Prompts
from tests import tiny
from tests.adapters import STATISTICS, base, batches
from tests.files.making import perturb

FAMILIES = ("llava", "llama", "qwen2_vl")
QUIET: dict[str, Any] = {"progress": False}


def labelled(family: str, seed: int, rows: int = 8) -> list[dict[str, Tensor]]:
    """The last two tokens of a row are its answer."""
    found = batches(base(family), family, seed, rows=rows)
    for part in found:
        mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
        left = mask.flip(1).cumsum(1).flip(1)
        part["labels"] = part["input_ids"].where((left <= 2) & mask.bool(), -100)
    return found


def measured(family: str, seed: int, keep_prompts: int = 8, **options: Any) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base(family), MAnyConfig(r=4, task_name=f"task {seed}"))
    perturb(model, "default", seed)
    collect_statistics(model, labelled(family, seed), keep_prompts=keep_prompts, **QUIET, **options)
    return model


def prompts_of(model: PeftModel) -> Prompts:
    prompts: Prompts = model.peft_config["default"].statistics.tasks[0].prompts  # type: ignore[attr-defined]
    return prompts


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("shelf")

    def get(family: str, seed: int, **options: Any) -> Path:
        folder = root / "-".join(map(str, [family, seed, *options.values()]))
        if not folder.exists():
            measured(family, seed, **options).save_pretrained(folder)
        return folder

    return get


def merge(shelf: Any, family: str, **options: Any) -> PeftModel:
    folders = [shelf(family, seed, **options) for seed in (0, 1)]
    return merge_adapter_sequence(base(family), folders, **QUIET)


@torch.no_grad()
def distance(model: PeftModel, own: PeftModel, samples: list[dict[str, Tensor]]) -> float:
    """From a task model, on samples."""
    return sum((model(**part).logits - own(**part).logits).square().sum().item() for part in samples)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weigh", [False, True])
def test_without_samples_it_is_refitted_on_what_the_task_models_imagine(shelf: Any, family: str, weigh: bool) -> None:
    tasks = {f"task {seed}": PeftModel.from_pretrained(base(family), shelf(family, seed)).eval() for seed in (0, 1)}
    with torch.no_grad():
        samples = {name: imagined(own, prompts_of(own), 12) for name, own in tasks.items()}
    given, imagining = merge(shelf, family), merge(shelf, family)
    before = sum(distance(given, own, samples[name]) for name, own in tasks.items())
    refit_merge(given, samples, weigh_tokens=weigh, **QUIET)
    refit_merge(imagining, weigh_tokens=weigh, max_samples=12, **QUIET)
    after = [sum(distance(model, own, samples[name]) for name, own in tasks.items()) for model in (given, imagining)]
    assert weigh or after[0] < 0.9 * before  # tokens that are weighed need not come nearer all in all
    assert after[0] != before
    assert after[1] == pytest.approx(after[0], rel=1e-2)


@pytest.mark.parametrize("family", [one for one in tiny.FAMILIES if one not in FAMILIES])
def test_every_family_imagines(shelf: Any, family: str) -> None:
    model = measured(family, 0)
    for batch in imagined(model.eval(), prompts_of(model), None):
        with torch.no_grad():
            assert torch.isfinite(model(**batch).logits).all()


def test_prompts_are_saved_with_a_merge(shelf: Any, tmp_path: Path) -> None:
    merge(shelf, "llava").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "prompts kept, word for word" in card
    assert "| 8 | 8 |" in card  # samples, images, prompts
    model = PeftModel.from_pretrained(base("llava"), tmp_path)
    refit_merge(model, **QUIET)
    again = merge(shelf, "llava")
    refit_merge(again, **QUIET)
    part = labelled("llava", 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(**part).logits, again(**part).logits, rtol=1e-3, atol=1e-3)


def test_text_is_answered_as_the_adapter_answers(shelf: Any) -> None:
    model = measured("llama", 0).eval()
    prompts = prompts_of(model)
    model.generation_config.eos_token_id = None
    rows = [row[row >= 0].long() for row in prompts.ids]
    said = [row for row in rows]
    for _ in range(2):
        with torch.no_grad():
            said = [torch.cat([row, model(input_ids=row[None]).logits[0, -1:].argmax(-1)]) for row in said]
    embed = model.get_input_embeddings()
    found: list[Tensor] = []
    for batch in imagined(model, prompts, None):
        assert (batch["labels"] != -100).sum(1).tolist() == [2] * len(batch["labels"])
        found += [row[mask.bool()] for row, mask in zip(batch["inputs_embeds"], batch["attention_mask"])]
    assert len(found) == len(said) == 8
    expected = sorted((embed(row) for row in said), key=lambda row: (len(row), row.sum().item()))
    for one, two in zip(sorted(found, key=lambda row: (len(row), row.sum().item())), expected):
        torch.testing.assert_close(one, two)


def test_answers_stop_at_their_end(shelf: Any) -> None:
    model = measured("llama", 0).eval()
    prompts = replace(prompts_of(model), answer_tokens=6)
    model.get_base_model().generation_config.eos_token_id = None
    end = int(imagined(model, prompts, None)[0]["labels"][0, -4])  # what one of them says
    for ends in (end, [end, 99]):
        model.get_base_model().generation_config.eos_token_id = ends
        said = []
        for batch in imagined(model, prompts, None):
            for labels, mask in zip(batch["labels"], batch["attention_mask"]):
                said.append(labels[labels != -100].tolist())
                assert end not in said[-1][:-1]
                assert len(said[-1]) == 6 or said[-1][-1] in (end, 99)
                assert mask.tolist() == [1] * int(mask.sum()) + [0] * int(len(mask) - mask.sum())  # padding behind it
                assert labels[int(mask.sum()) - 1] != -100
        assert min(map(len, said)) < 6


def test_image_tokens_are_drawn_in_the_places_of_pictures(shelf: Any) -> None:
    model = measured("llava", 0).eval()
    prompts = prompts_of(model)
    embed = model.get_input_embeddings()
    assert prompts.image_tokens is not None
    rows = [row[row >= 0].long() for row in prompts.ids]
    drawn = []
    for batch in imagined(model, prompts, None):
        for embeds, labels in zip(batch["inputs_embeds"], batch["labels"]):
            words = embeds[: int((labels == -100).sum())]
            ids = next(  # the prompt with these words
                ids
                for ids in rows
                if len(ids) == len(words)
                and torch.allclose(words[ids != tiny.IMAGE], embed(ids[ids != tiny.IMAGE]), atol=1e-5)
            )
            drawn.append(words[ids == tiny.IMAGE])
    tokens = torch.cat(drawn)
    assert len(tokens) == (prompts.ids == tiny.IMAGE).sum()
    spread = tokens.double().T.cov().trace().item()
    assert 0.7 < spread / prompts.image_tokens.spread.trace < 1.4  # type: ignore[union-attr]


@pytest.mark.parametrize("remainder", [0.0, 0.5])
def test_drawn_vectors_have_the_mean_and_the_covariance(remainder: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, generator=generator)
    covariance = LowRankCovariance(remainder, torch.randn(3, 6, generator=generator))
    drawn = gaussian(mean, covariance, 200_000, generator)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.double().mean(0), mean.double(), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.double().T.cov(), covariance.dense(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("most", "family", "count"), [(3, "llama", 3), (20, "llama", 8), (20, "llava", 20)])
def test_so_many_are_imagined(shelf: Any, most: int, family: str, count: int) -> None:
    """More than there are prompts only if pictures make a difference."""
    model = measured(family, 0).eval()
    batches = imagined(model, prompts_of(model), most)
    assert sum(len(batch["labels"]) for batch in batches) == count
    rows = {tuple(row.flatten().tolist()) for batch in batches for row in batch["inputs_embeds"]}
    assert len(rows) == count


def test_positions_that_are_learnt_are_those_of_the_prompt_alone(shelf: Any) -> None:
    """Of GPT-2 padding on the left would move the words."""
    model = measured("gpt2", 0).eval()
    (own,) = (row[row >= 0] for row in prompts_of(model).ids[:1])
    longer = torch.cat([own, own])
    pair = replace(
        prompts_of(model),
        ids=torch.stack([longer, torch.cat([torch.full_like(own, -1), own])]),
        answer_tokens=4,
    )
    alone = replace(pair, ids=own[None])
    (said,) = (batch["labels"][0, -4:] for batch in imagined(model, alone, None))
    found = [batch["labels"][0, -4:] for batch in imagined(model, pair, None)]
    assert torch.equal(found[0], said)


def test_few_of_many_prompts_are_taken_evenly(shelf: Any) -> None:
    model = measured("llama", 0).eval()
    ids = torch.arange(5, 13, dtype=torch.int32)[:, None]
    prompts = replace(prompts_of(model), ids=ids, answer_tokens=1)
    first = model.get_input_embeddings()(ids[::2, 0].long())
    (batch,) = imagined(model, prompts, 4)
    torch.testing.assert_close(batch["inputs_embeds"][:, 0], first)


def test_the_same_is_imagined_again(shelf: Any) -> None:
    model = measured("llava", 0).eval()
    one, two = (imagined(model, prompts_of(model), None) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two) for name in a)


def test_tasks_without_prompts_are_named(shelf: Any) -> None:
    folders = [shelf("llava", 0), shelf("llava", 1, keep_prompts=0)]
    model = merge_adapter_sequence(base("llava"), folders, **QUIET)
    with pytest.raises(ValueError, match=r"No prompts were kept of 'task 1'.*keep_prompts=16"):
        refit_merge(model, **QUIET)


@pytest.mark.parametrize("changed", ["ids", "width", "no image tokens"])
def test_prompts_of_another_model_are_refused(shelf: Any, changed: str) -> None:
    model = merge(shelf, "llava")
    config: Any = model.peft_config["default"]
    first, second = config.statistics.tasks
    tokens = first.prompts.image_tokens
    other = {
        "ids": replace(first.prompts, ids=first.prompts.ids + tiny.VOCABULARY),
        "width": replace(first.prompts, image_tokens=replace(tokens, prototype=torch.zeros(5))),
        "no image tokens": replace(first.prompts, image_tokens=None),
    }[changed]
    config.statistics = AdapterStatistics((replace(first, prompts=other), second))
    with pytest.raises(ValueError, match="'task 0' are not of this base model"):
        refit_merge(model, **QUIET)


def test_a_pool_keeps_the_prompts_of_all_its_tasks(shelf: Any, tmp_path: Path) -> None:
    folders = [shelf("llava", seed) for seed in (0, 1)]
    (pool,) = AdapterStatistics.load(pool_adapters(folders, tmp_path / "pool", **QUIET) / STATISTICS).tasks
    own = [AdapterStatistics.load(folder / STATISTICS).tasks[0].prompts for folder in folders]
    assert pool.prompts is not None
    rows = [row for prompts in own for row in prompts.ids.tolist()]  # type: ignore[union-attr]
    words, found = ([[t for t in row if t >= 0] for row in some] for some in (rows, pool.prompts.ids.tolist()))
    assert sorted(found) == sorted(words)
    assert pool.prompts.image_tokens is not None
    assert pool.prompts.image_tokens.count == sum(one.image_tokens.count for one in own)  # type: ignore[union-attr]
    (none,) = AdapterStatistics.load(
        pool_adapters([folders[0], shelf("llava", 1, keep_prompts=0)], tmp_path / "without", **QUIET) / STATISTICS
    ).tasks
    assert none.prompts is None


def test_a_pool_of_pools_keeps_no_more_than_a_pool(
    shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_many.editing.pooling._MOST_PROMPTS", 10)
    first = pool_adapters([shelf("llava", 0), shelf("llava", 1)], tmp_path / "first", **QUIET)
    both = pool_adapters([first, shelf("llava", 2)], tmp_path / "both", **QUIET)
    (pool,) = AdapterStatistics.load(both / STATISTICS).tasks
    assert pool.prompts is not None
    assert len(pool.prompts.ids) == 10
    own = AdapterStatistics.load(shelf("llava", 2) / STATISTICS).tasks[0].prompts
    assert own is not None
    kept = {tuple(token for token in row if token >= 0) for row in pool.prompts.ids.tolist()}
    assert kept & {tuple(token for token in row if token >= 0) for row in own.ids.tolist()}


@pytest.mark.parametrize("count", [0, -1, "5", 1.5])
def test_a_number_of_samples_that_is_none(shelf: Any, count: Any) -> None:
    with pytest.raises(ValueError, match="max_samples"):
        refit_merge(merge(shelf, "llava"), max_samples=count, **QUIET)


def test_a_function_of_batches_needs_batches(shelf: Any) -> None:
    with pytest.raises(ValueError, match="forward_fn"):
        refit_merge(merge(shelf, "llava"), forward_fn=lambda model, batch: model(**batch), **QUIET)


def test_lora_on_the_vision_tower_needs_samples(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = MAnyConfig(r=2, task_name=f"task {seed}", target_modules=r".*(vision_tower|language_model).*v_proj")
        model = get_peft_model(base("llava"), config)
        collect_statistics(model, labelled("llava", seed), keep_prompts=4, **QUIET)
        model.save_pretrained(tmp_path / str(seed))
    merged = merge_adapter_sequence(base("llava"), [tmp_path / "0", tmp_path / "1"], **QUIET)
    with pytest.raises(ValueError, match=r"reads pictures.*give samples"):
        refit_merge(merged, **QUIET)


def test_a_task_without_weight_needs_no_prompts(shelf: Any) -> None:
    folders = [shelf("llava", 0), shelf("llava", 1, keep_prompts=0)]
    model = merge_adapter_sequence(base("llava"), folders, weights=[1.0, 0.0], **QUIET)
    refit_merge(model, weigh_tokens=True, **QUIET)
