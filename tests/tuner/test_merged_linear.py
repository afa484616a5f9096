"""In a model of half precision a merge computes in that, and is saved as exact as it was made."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from peft_many import merge_adapter_files, refit_merge
from peft_many.algebra.half_precision import loses_little
from peft_many.tuner.merged_linear import MergedLinear
from tests import tiny
from tests.files import making
from tests.routing.test_gates import HARD, inputs_of, logits

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
gates = pytest.mark.parametrize("gate_lora", [False, True])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gated"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of three tasks."""
    folders = [making.adapter_folder("llava", task) for task in range(3)]
    out = tmp_path_factory.mktemp("merges") / "merge"
    return merge_adapter_files(folders, out, temperature=HARD, gate_lora=request.param, progress=False)


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PeftModel:
    model = PeftModel.from_pretrained(tiny.build("llava", dtype=dtype), folder, **options)
    return model.eval()


def factors(model: torch.nn.Module) -> list[MergedLinear]:
    return [module for module in model.modules() if isinstance(module, MergedLinear)]


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for factor in factors(model) for parameter in factor.parameters()}


def state(model: PeftModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = get_peft_model_state_dict(model)
    return found


def lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "lora_" in key}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        assert torch.equal(tensor, two[key])


@halves
def test_it_computes_in_half_precision_and_saves_what_it_was(folder: Path, dtype: torch.dtype) -> None:
    exact, model = lora(state(load(folder, torch.float32))), load(folder, dtype)
    assert dtypes(load(folder, torch.float32)) == {torch.float32}
    assert dtypes(model) == {dtype}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            x = torch.ones(1, layer.in_features, dtype=dtype)
            assert layer.lora_B["default"](layer.lora_A["default"](x)).dtype == dtype
    for changed in (
        model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).to(dtype),
        copy.deepcopy(model).float(),
        load(folder, dtype, low_cpu_mem_usage=True),
    ):
        assert_same(lora(state(changed)), exact)
    assert dtypes(copy.deepcopy(model).float()) == {torch.float32}
    assert dtypes(copy.deepcopy(model).to(dtype)) == {dtype}


def test_what_is_trained_stays_float32(folder: Path) -> None:
    trained = load(folder, is_trainable=True)
    assert dtypes(trained) == {torch.float32}
    as_the_base = load(folder, autocast_adapter_dtype=False)
    assert dtypes(as_the_base) == {torch.bfloat16}
    assert {tensor.dtype for tensor in lora(state(as_the_base)).values()} == {torch.bfloat16}, "as PEFT does it"


def test_beside_another_adapter_that_is_loaded(folder: Path) -> None:
    model, expected = load(folder), load(folder)
    model.load_adapter(making.adapter_folder("llava", 1), "task")
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    assert dtypes(model) == {torch.bfloat16}
    assert torch.equal(logits(model, inputs_of("llava")), logits(expected, inputs_of("llava")))


def test_weights_that_change_are_saved_as_they_have_become(folder: Path) -> None:
    model, exact = load(folder), state(load(folder, torch.float32))
    changed = factors(model)[0]
    with torch.no_grad():
        changed.weight[0] *= 2
    found = state(model)
    others = [key for key, tensor in exact.items() if not torch.equal(found[key], tensor)]
    assert len(others) == 1
    assert torch.equal(found[others[0]][0], changed.weight[0].float())
    assert torch.equal(found[others[0]][1:], exact[others[0]][1:])
    set_peft_model_state_dict(model, exact)
    assert_same(state(model), exact)
    assert dtypes(model) == {torch.bfloat16}


def test_what_it_costs_in_accuracy(folder: Path) -> None:
    """Hardly more than the base model's own rounding."""
    inputs = inputs_of("llava")
    expected, mask = logits(load(folder, torch.float32), inputs), inputs["attention_mask"].bool()

    def error(model: PeftModel) -> float:
        return ((logits(model, inputs).float() - expected)[mask].norm() / expected[mask].norm()).item()

    with_float32 = load(folder, is_trainable=True).eval()
    assert error(load(folder)) < 1.5 * error(with_float32)


def test_folding_is_of_the_exact_weights(folder: Path) -> None:
    if "gated" in str(folder):
        pytest.skip("of a gated merge it folds the same")
    found = load(folder).merge_and_unload().state_dict()
    expected = load(folder, is_trainable=True).merge_and_unload().state_dict()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)


@halves
def test_layers_whose_blocks_cancel_stay_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 64, generator=generator), torch.randn(64, 8, generator=generator)
    assert loses_little(A, B, dtype)
    large = torch.randn(8, 64, generator=generator)
    stacked = (
        torch.cat([A, 10 * large, -10 * large]),
        torch.cat([B, B, B + 0.01 * torch.randn(64, 8, generator=generator)], dim=1),
    )
    assert not loses_little(*stacked, dtype)
    assert not loses_little(A, torch.zeros_like(B), dtype), "still to be loaded"
    assert not loses_little(1e5 * A, 1e-5 * B, torch.float16), "beyond its range"
    assert loses_little(1e5 * A, 1e-5 * B, torch.bfloat16)


def test_a_refit_is_of_the_exact_weights() -> None:
    merged = making.merge("llava", tasks=2, dtype=torch.bfloat16)
    batches = [list(making.task_batches(merged, "llava", style)) for style in making.STYLES[:2]]
    refit_merge(merged, {f"task-{t}": data for t, data in enumerate(batches)}, targets="deltas", progress=False)
    assert dtypes(merged) == {torch.bfloat16}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in lora(state(merged)).values())


def test_a_combination_is_of_the_exact_weights(folder: Path) -> None:
    found = []
    for trainable in (False, True):
        model = load(folder, is_trainable=trainable)
        model.add_weighted_adapter(["default"], [0.5], "scaled", combination_type="linear")
        found.append({name: part["scaled"].weight for name, part in model.named_modules() if name.endswith("lora_B")})
    assert_same(*found)
