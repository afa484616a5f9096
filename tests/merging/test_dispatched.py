"""Compiled models, and models that Accelerate has dispatched: they are measured and routed like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_many import collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import TaskStatistics
from tests.adapters import PROJECTOR, base, batches, covariances, logits, make

PARTS = {"model.vision_tower": "cpu", PROJECTOR: "cpu", "model.language_model": "disk", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make(root / name, seed=seed, task_name=name).folder for seed, name in ((0, "a"), (5, "b"))]


def adapted(folders: list[Path], wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> PeftModel:
    return PeftModel.from_pretrained(wrap(base("llava")), folders[0]).eval()


def inputs() -> list[dict[str, torch.Tensor]]:
    return batches(base("llava"), "llava", 0)


def measured(model: nn.Module) -> TaskStatistics:
    return collect_statistics(model, inputs(), energy=1.0, progress=False).tasks[0]


def assert_same(found: TaskStatistics, expected: TaskStatistics) -> None:
    assert found.input_of.keys() == expected.input_of.keys()
    for name, covariance in covariances(expected).items():
        torch.testing.assert_close(found.covariance_of(name).matrix, covariance.matrix)
        assert found.fingerprints.get(name) == pytest.approx(expected.fingerprints.get(name))
    assert found.projectors.keys() == expected.projectors.keys()
    for name, seen in expected.projectors.items():
        torch.testing.assert_close(found.projectors[name].prototype, seen.prototype)


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, PARTS, main_device="cpu", offload_dir=str(folder))


def of_peft_model(model: nn.Module, folder: Path) -> nn.Module:
    inside = {f"base_model.model.{name}": place for name, place in PARTS.items()}
    return dispatch_model(model, inside, main_device="cpu", offload_dir=str(folder))


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu")) or model


def all_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu")) or model


@pytest.mark.parametrize("wrap", [of_peft_model, to_cpu, all_to_disk])
def test_an_adapter_that_is_offloaded_with_its_model_is_measured(folders, wrap, tmp_path):
    model = wrap(adapted(folders), tmp_path)
    assert any(parameter.is_meta for name, parameter in model.named_parameters() if "lora_" in name)
    assert_same(measured(model), measured(adapted(folders)))
    assert any(parameter.is_meta for parameter in model.parameters())  # as before


def test_an_adapter_on_a_dispatched_base_is_measured(folders, tmp_path):
    model = adapted(folders, lambda model: to_disk(model, tmp_path))
    assert_same(measured(model), measured(adapted(folders)))


def test_offloaded_adapters_of_other_methods_are_refused(tmp_path):
    model = get_peft_model(base("llava"), LoHaConfig(target_modules=r".*language_model.*q_proj"))
    to_cpu(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"tensor '.*hada_w1_a' is offloaded"):
        measured(model)


@pytest.mark.parametrize("wrap", [of_peft_model, to_cpu, all_to_disk])
def test_a_merge_that_is_offloaded_routes(folders, wrap, tmp_path):
    merged = merge_adapter_sequence(base("llava"), folders, progress=False)
    with torch.no_grad():
        expected = [merged(**batch).logits for batch in inputs()]
        merged = wrap(merged, tmp_path)
        torch.testing.assert_close([merged(**batch).logits for batch in inputs()], expected)


def test_a_merge_on_a_dispatched_base_routes(folders, tmp_path):
    expected = merge_adapter_sequence(base("llava"), folders, progress=False)
    dispatched = to_disk(base("llava"), tmp_path / "offloaded")
    merged = merge_adapter_sequence(dispatched, folders, adapter_name="both", progress=False)
    assert merged.active_adapters == ["both"]
    torch.testing.assert_close(logits(merged, "llava"), logits(expected, "llava"))
    assert merged.peft_config["both"].statistics.tasks[1].name == "b"
    merged.save_pretrained(tmp_path / "merged", selected_adapters=["both"])
    again = PeftModel.from_pretrained(base("llava"), tmp_path / "merged" / "both").eval()
    torch.testing.assert_close(logits(again, "llava"), logits(expected, "llava"))


def test_a_base_that_is_offloaded_without_a_map_is_refused(folders, tmp_path):
    model = to_cpu(base("llava"), tmp_path)
    with pytest.raises(ValueError, match=r"no device map .*cpu_offload.* offload the result"):
        merge_adapter_sequence(model, folders, progress=False)


def test_base_weights_that_a_delta_needs_must_be_there(tmp_path):
    dora = get_peft_model(base("llava"), LoraConfig(use_dora=True, target_modules=r".*language_model.*q_proj"))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(UnmergeableAdapterError, match=r"base weight of '.*q_proj', which is not in memory"):
        merge_adapter_sequence(
            to_disk(base("llava"), tmp_path / "off"), [tmp_path / "dora"], method="average", progress=False
        )


def one_layer(model: PeftModel) -> nn.Module:
    model.get_base_model().model.language_model.layers[0].compile(backend="eager")
    return model


def test_a_model_that_torch_compile_wraps_is_measured(folders):
    assert_same(measured(torch.compile(adapted(folders), backend="eager")), measured(adapted(folders)))


def test_a_model_of_which_a_part_is_compiled_is_measured(folders):
    torch._dynamo.reset()
    model = one_layer(adapted(folders))
    with torch.no_grad():
        model(**inputs()[0])  # what is compiled now knows of no hooks
    assert_same(measured(model), measured(adapted(folders)))
    layer = model.get_base_model().model.language_model.layers[0]
    assert layer._compiled_call_impl is not None  # and stays compiled


def test_a_compiled_merge_routes(folders):
    torch._dynamo.reset()
    merged = merge_adapter_sequence(base("llava"), folders, progress=False)
    expected = logits(merged, "llava")
    merged.get_base_model().model.multi_modal_projector.compile(backend="eager")
    torch.testing.assert_close(logits(one_layer(merged), "llava"), expected)


def test_a_merge_of_files_loads_on_a_dispatched_base(folders, tmp_path):
    merged = merge_adapter_files(folders, tmp_path / "merged", progress=False)
    loaded = PeftModel.from_pretrained(to_disk(base("llava"), tmp_path / "offloaded"), merged).eval()
    expected = PeftModel.from_pretrained(base("llava"), merged).eval()
    torch.testing.assert_close(logits(loaded, "llava"), logits(expected, "llava"))
