"""The formulas of docs/scaling.md against a tiny collection and a tiny merge."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scaling
from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, plan_merge
from peft_many.algebra.sketch import CovarianceSketch
from peft_many.statistics import inputs

ROOT = Path(__file__).parent.parent
TINY = scaling.Sizes(
    layers=2, width=64, intermediate=160, key_width=32, tasks=3, r=4, statistics_rank=8, test_bytes=4, tokens=128
)


def tensors_in(held: Any) -> Iterator[Tensor]:
    """All tensors that an object holds, each once."""
    if isinstance(held, Tensor):
        yield held
    elif hasattr(held, "__dict__"):
        for value in vars(held).values():
            yield from tensors_in(value)


def bytes_in(folder: Path, name: str) -> int:
    """Of the tensors in a file, its header and the images' prototypes left out."""
    with safe_open(folder / name, framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys() if "prototype" not in key)  # noqa: SIM118


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[Path]:
    """Of the same shapes as `TINY`, but for k and v."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        synthesise = importlib.import_module("synthesise")
    sizes = synthesise.Sizes(tasks=3, layers=2, width=64, intermediate=160, image_width=32, r=4, statistics_rank=8)
    return synthesise.synthesise(tmp_path_factory.mktemp("scaling"), sizes, progress=False)["lora"]


SQUARE = replace(TINY, key_width=64)


def test_collecting_holds_what_the_formula_says(monkeypatch):
    held: list[int] = []
    finish = inputs.finished

    def counted(sums: dict[str, CovarianceSketch]) -> Any:
        held.append(sum(tensor.nbytes for one in sums.values() for tensor in tensors_in(one.sums)))
        return finish(sums)

    monkeypatch.setattr(inputs, "finished", counted)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=TINY.width,
        intermediate_size=TINY.intermediate,
        num_hidden_layers=TINY.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), MAnyConfig(r=TINY.r, target_modules="all-linear"))
    batches = [{"input_ids": torch.randint(0, 50, (4, 16))} for _ in range(2)]
    collect_statistics(model, batches, rank=TINY.statistics_rank, progress=False)
    assert held[0] == pytest.approx(scaling.sketch_bytes(TINY), abs=8 * TINY.layers * 4)  # the energies
    trained = [value for name, value in model.named_parameters() if "lora_" in name]
    assert sum(value.nbytes for value in trained) == scaling.lora_bytes(TINY, TINY.r)


def test_files_have_the_bytes_that_the_formulas_say(adapters, tmp_path):
    assert bytes_in(adapters[0], "adapter_statistics.safetensors") == scaling.statistics_bytes(SQUARE)
    of_one = sum(bytes_in(adapters[0], path.name) for path in adapters[0].glob("*.safetensors"))
    assert 3 * of_one == scaling.read_bytes(SQUARE)
    merged = merge_adapter_files(adapters, tmp_path / "merged", progress=False)
    assert bytes_in(merged, "adapter_model.safetensors") == scaling.lora_bytes(SQUARE, 12)
    assert sum(bytes_in(merged, path.name) for path in merged.glob("*.safetensors")) == scaling.merge_bytes(SQUARE)


class Made(TorchDispatchMode):
    """The shapes of the float64 tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.dtype == torch.float64]
        self.shapes |= {tuple(one.shape) for one in found}
        return result


def test_merging_computes_with_the_matrices_that_the_formulas_say(adapters, tmp_path):
    assert 2 * plan_merge(adapters, progress=False).multiplications == scaling.solving_flops(SQUARE)
    with Made() as made:
        merge_adapter_files(adapters, tmp_path / "merged", progress=False)
    rank = 3 * SQUARE.statistics_rank
    stacked, kernel = (rank, SQUARE.intermediate), (rank, rank)
    assert {stacked, kernel} <= made.shapes
    assert max(torch.Size(shape).numel() for shape in made.shapes) == rank * SQUARE.intermediate
    assert scaling.solving_bytes(SQUARE) == 8 * (rank * SQUARE.intermediate + rank**2)


def test_many_tasks_are_merged_by_the_whole_matrix():
    many = replace(SQUARE, tasks=40)
    assert scaling.solving_bytes(many) == 8 * 160**2
    assert scaling.solving_flops(replace(many, tasks=80)) < 2.2 * scaling.solving_flops(many)


def test_the_page_has_the_tables_of_the_script():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.tables(scaling.Sizes()):
        assert table in page, "python benchmarks/scaling.py prints them anew"
