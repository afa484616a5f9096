"""Refitting a merge: nearer to the task models, still mergeable, and whole or not at all."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_many import merge_adapter_sequence, refit_merge
from tests.adapters import WEIGHTS, base, batches, make

FAMILIES = ("llava", "llama", "qwen2_vl")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    made = {}

    def get(family, seed):
        if (family, seed) not in made:
            made[family, seed] = make(root / f"{family}-{seed}", family, seed=seed, task_name=f"task {seed}").folder
        return made[family, seed]

    return get


def merge(shelf, family, seeds=(0, 1)):
    return merge_adapter_sequence(base(family), [shelf(family, seed) for seed in seeds], progress=False)


def samples(family, seeds=(0, 1), rows=8):
    return {f"task {seed}": batches(base(family), family, seed, rows=rows) for seed in seeds}


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}


def deltas(model):
    state = weights(model)
    names = [key.removesuffix("lora_A.default.weight") for key in state if "lora_A" in key]
    return {name: state[f"{name}lora_B.default.weight"] @ state[f"{name}lora_A.default.weight"] for name in names}


@torch.no_grad()
def logits(model, part):
    return model(**part).logits


@torch.no_grad()
def distance_to_task(model, shelf, family, seed):
    own = PeftModel.from_pretrained(base(family), shelf(family, seed)).eval()
    parts = samples(family, (seed,))[f"task {seed}"]
    errors = [(logits(model, part) - logits(own, part)).square().sum() for part in parts]
    return torch.stack(errors).sum().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_comes_nearer_to_the_task_models(shelf, family):
    model = merge(shelf, family)
    before = sum(distance_to_task(model, shelf, family, seed) for seed in (0, 1))
    refit_merge(model, samples(family), progress=False)
    after = sum(distance_to_task(model, shelf, family, seed) for seed in (0, 1))
    assert after < 0.9 * before


def test_where_inputs_do_not_depend_on_the_merge_refitting_to_deltas_is_lpm(tmp_path):
    first_layer = r".*layers\.0\.self_attn\.[qkv]_proj"
    folders = [
        make(tmp_path / str(seed), "llama", seed=seed, rows=8, task_name=f"task {seed}", target_modules=first_layer)
        for seed in (0, 1)
    ]
    model = merge_adapter_sequence(base("llama"), [made.folder for made in folders], ridge=1e-3, progress=False)
    before = weights(model)
    refit_merge(model, samples("llama"), targets="deltas", ridge=1e-3, progress=False)
    after = weights(model)
    for name in (key.removesuffix("lora_A.default.weight") for key in before if "lora_A" in key):
        one, two = (
            state[f"{name}lora_B.default.weight"] @ state[f"{name}lora_A.default.weight"] for state in (before, after)
        )
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def labelled(family, seeds=(0, 1)):
    """The last two tokens of a row are its answer."""
    found = samples(family, seeds)
    for part in (part for parts in found.values() for part in parts):
        places = part["attention_mask"].flip(1).cumsum(1).flip(1)  # how many tokens are left
        part["labels"] = part["input_ids"].where((places <= 2) & part["attention_mask"].bool(), -100)
    return found


@torch.no_grad()
def distance_of_answers(model, shelf, seed):
    own = PeftModel.from_pretrained(base("llava"), shelf("llava", seed)).eval()
    errors = []
    for part in labelled("llava", (seed,))[f"task {seed}"]:
        asked = part["labels"][:, 1:] != -100
        errors.append((logits(model, part) - logits(own, part))[:, :-1][asked].square().sum())
    return torch.stack(errors).sum().item()


def test_weighing_tokens_brings_answers_nearer(shelf):
    errors = []
    for weigh in (False, True):
        model = merge(shelf, "llava")
        refit_merge(model, labelled("llava"), weigh_tokens=weigh, rank=2, progress=False)
        errors.append(sum(distance_of_answers(model, shelf, seed) for seed in (0, 1)))
        assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())
    assert errors[1] < 0.9 * errors[0]


def test_weighing_tokens_needs_labels(shelf):
    model = merge(shelf, "llava")
    before = weights(model)
    with pytest.raises(ValueError, match="labels"):
        refit_merge(model, samples("llava"), weigh_tokens=True, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("targets", ["outputs", "deltas"])
def test_a_merge_of_one_stays_what_it_is(shelf, targets):
    model = merge(shelf, "llava", (0,))
    part = samples("llava")["task 0"][0]
    before = logits(model, part)
    refit_merge(model, samples("llava", (0,)), targets=targets, progress=False)
    torch.testing.assert_close(logits(model, part), before, rtol=1e-4, atol=1e-4)


def test_a_refitted_merge_merges_further_as_its_tasks_do(shelf, tmp_path):
    model = merge(shelf, "llava")
    refit_merge(model, samples("llava"), progress=False)
    model.save_pretrained(tmp_path / "refitted")
    loaded = PeftModel.from_pretrained(base("llava"), tmp_path / "refitted")
    part = samples("llava")["task 1"][0]
    torch.testing.assert_close(logits(loaded, part), logits(model, part))
    for folder, adapters in (
        ("further", [tmp_path / "refitted", shelf("llava", 2)]),
        ("at once", [shelf("llava", seed) for seed in (0, 1, 2)]),
    ):
        merge_adapter_sequence(base("llava"), adapters, progress=False).save_pretrained(tmp_path / folder)
    further, at_once = (load_file(tmp_path / folder / WEIGHTS) for folder in ("further", "at once"))
    assert further.keys() == at_once.keys()
    assert all(torch.equal(further[key], at_once[key]) for key in further)


def test_the_rank_is_a_budget(shelf):
    model = merge(shelf, "llava")
    refit_merge(model, samples("llava"), rank=3, progress=False)
    A = {key: value for key, value in weights(model).items() if "lora_A" in key}
    assert {int(torch.linalg.matrix_rank(value)) for value in A.values()} == {3}


def test_nothing_is_left_behind(shelf):
    model = merge(shelf, "llava")
    logits(model, samples("llava")["task 0"][0])  # transformers installs some hooks at the first call
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    refit_merge(model, samples("llava"), progress=False)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_if_it_fails_the_weights_are_as_before(shelf):
    model = merge(shelf, "llava")
    before = weights(model)
    broken = samples("llava")
    broken["task 1"][0]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"'task 1'.*holds NaN or Inf"):
        refit_merge(model, broken, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_what_does_not_fit_is_said(shelf, tmp_path):
    model = merge(shelf, "llava")
    with pytest.raises(ValueError, match="missing: task 1"):
        refit_merge(model, samples("llava", (0,)))
    with pytest.raises(ValueError, match="unknown: task 7"):
        refit_merge(model, samples("llava", (0, 1, 7)))
    with pytest.raises(ValueError, match="no batch of 'task 1'"):
        refit_merge(model, {**samples("llava"), "task 1": []})
    for options, message in (
        ({"targets": "logits"}, "`targets`"),
        ({"ridge": 0.0}, "`ridge`"),
        ({"rank": 0}, "`rank`"),
    ):
        with pytest.raises(ValueError, match=message):
            refit_merge(model, samples("llava"), **options)
    single = PeftModel.from_pretrained(base("llava"), shelf("llava", 0))
    with pytest.raises(ValueError, match="is no merge"):
        refit_merge(single, samples("llava"))
    gated = merge_adapter_sequence(
        base("llava"), [shelf("llava", 0), shelf("llava", 1)], gate_lora=True, progress=False
    )
    with pytest.raises(ValueError, match="gate_lora=False"):
        refit_merge(gated, samples("llava"))
