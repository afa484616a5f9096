"""Tasks of text alone on a multimodal model: their copy of the projector never moved, so it is the base model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftWarning
from safetensors.torch import load_file

from peft_many import (
    MAnyConfig,
    add_task,
    collect_statistics,
    inspect_adapter,
    merge_adapter_files,
    merge_adapter_sequence,
    merge_report,
    plan_merge,
    pool_adapters,
    remove_task,
)
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, base, batches, but_operations, logits, make, scatter


def text_task(folder: Path, seed: int = 5, kind: Any = MAnyConfig, moved: float = 0.0, **options: Any) -> Path:
    """As training on text leaves it; or `moved` all the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base("llava"), kind(**{"r": 4, "lora_alpha": 8, **options}))
    wrapper = model.get_base_model().get_submodule(PROJECTOR)
    before = {name: value.clone() for name, value in wrapper.modules_to_save["default"].state_dict().items()}
    scatter(model, seed)
    with torch.no_grad():
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            parameter.copy_(before[name] + moved)
    collect_statistics(model, batches(model, "llava", seed, images=False), energy=1.0, progress=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shelf")
    plain = {"kind": LoraConfig, "target_modules": r".*language_model.*q_proj", "modules_to_save": [PROJECTOR]}
    return {
        "a": make(root / "a", seed=0, task_name="a").folder,
        "b": make(root / "b", seed=1, task_name="b").folder,
        "words": text_task(root / "words"),
        "plain": text_task(root / "plain", seed=6, **plain),
    }


def projectors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if PROJECTOR in key}


@pytest.mark.parametrize("name", ["words", "plain"])
@pytest.mark.parametrize("options", [{}, {"router": "gaussian"}, {"projectors": "mean"}, {"gate_lora": True}], ids=str)
def test_the_other_tasks_are_routed_as_without_it(shelf: Any, tmp_path: Path, name: str, options: Any) -> None:
    merged = merge_adapter_files([shelf["a"], shelf[name], shelf["b"]], tmp_path / "m", progress=False, **options)
    alone = merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "alone", progress=False, **options)
    found, expected = projectors(merged), projectors(alone)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    told, told_alone = inspect_adapter(merged), inspect_adapter(alone)
    assert (told.routing, told.averaged_projectors) == (told_alone.routing, told_alone.averaged_projectors)
    (task,) = [task for task in told.tasks if task.name == name]
    assert (task.projectors, task.images) == ([], 0)
    assert task.layers > 0


def test_what_else_is_done_with_it(shelf: Any, tmp_path: Path) -> None:
    a, words = shelf["a"], shelf["words"]
    plan = plan_merge([a, words], progress=False)
    assert plan.problems == []
    assert f"'words' saw no image at '{PROJECTOR}', so no image is sent to it." in plan.notes
    merged = merge_adapter_files([a, words], tmp_path / "merged", progress=False)
    alone = merge_adapter_files([a], tmp_path / "alone", progress=False)
    assert but_operations(add_task(alone, words, tmp_path / "added", progress=False)) == but_operations(merged)
    assert but_operations(remove_task(merged, "words", tmp_path / "less", progress=False)) == but_operations(alone)
    only = remove_task(merged, "a", tmp_path / "only", progress=False)
    own = logits(PeftModel.from_pretrained(base("llava"), words).eval(), "llava")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base("llava"), only), "llava"), own)
    sequence = merge_adapter_sequence(base("llava"), [words], progress=False)
    torch.testing.assert_close(logits(sequence, "llava"), own)
    assert set(merge_report(merged, progress=False).interference) == {"a", "words"}
    assert inspect_adapter(pool_adapters([a, words], tmp_path / "pool", progress=False)).tasks[0].images == 4
    assert inspect_adapter(words).problem is None


def test_a_copy_that_moved_needs_images(shelf: Any, tmp_path: Path) -> None:
    with pytest.warns(PeftWarning, match=f"trained the projector '{PROJECTOR}', but no image passed"):
        moved = text_task(tmp_path / "moved", moved=1e-3)
    with pytest.raises(UnmergeableAdapterError, match="no visual prototype: no image passed"):
        merge_adapter_files([shelf["a"], moved], tmp_path / "merged", progress=False)


def test_a_copy_that_was_trained_after_measuring(shelf: Any, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base("llava"), shelf["words"], is_trainable=True)
    with torch.no_grad():
        for parameter in model.get_base_model().get_submodule(PROJECTOR).modules_to_save.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "later")
    with pytest.raises(UnmergeableAdapterError, match=f"'{PROJECTOR}' has changed.*run `collect_statistics` again"):
        merge_adapter_files([shelf["a"], tmp_path / "later"], tmp_path / "merged", progress=False)


def test_a_copy_of_another_precision_than_the_base(tmp_path: Path) -> None:
    """It is compared as it is: a step that bfloat16 would round away is one."""
    model = get_peft_model(base("llava").bfloat16(), MAnyConfig(r=2))
    copy = model.get_base_model().get_submodule(PROJECTOR).modules_to_save["default"].float()
    for step, expected in ((0.0, [PROJECTOR]), (1e-6, [])):
        with torch.no_grad():
            copy.linear_1.bias.add_(step)
        statistics = collect_statistics(model, batches(model, "llava", 0, images=False), progress=False)
        assert [*statistics.tasks[0].unmoved_projectors] == expected


def test_the_shapes_of_projectors_stay_with_their_tasks(shelf: Any, tmp_path: Path) -> None:
    """Through merging, merging further, and pooling."""
    merged = merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "merged", progress=False)
    further = merge_adapter_files([merged, shelf["words"]], tmp_path / "further", progress=False)
    pool = pool_adapters([shelf["a"], shelf["b"]], tmp_path / "pool", rank=4, progress=False)
    expected = {
        key: tuple(tensor.shape) for key, tensor in base("llava").get_submodule(PROJECTOR).state_dict().items()
    }
    for folder in (shelf["a"], merged, further, pool):
        tasks = AdapterStatistics.load(folder / STATISTICS).tasks
        assert all(task.projector_shapes == {PROJECTOR: expected} for task in tasks)
