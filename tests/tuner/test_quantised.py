"""Quantised bases: the layers are dispatched as LoRA's are, measured and merged; a quantised projector is refused.

Libraries that are not installed are skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, PreTrainedModel, QuantoConfig

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.files.errors import UnmergeableAdapterError
from tests import tiny
from tests.adapters import covariances, distance, make, recorded

PROJECTOR = "model.multi_modal_projector"
UNTOUCHED = (PROJECTOR, "lm_head")


def by_bitsandbytes(folder: Path, skip: tuple[str, ...]) -> PreTrainedModel:
    quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip))
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=quantisation)


def by_torchao(folder: Path, skip: tuple[str, ...]) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantisation = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(skip))
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=quantisation)


def by_quanto(folder: Path, skip: tuple[str, ...]) -> PreTrainedModel:
    quantisation = QuantoConfig(weights="int8", modules_to_not_convert=list(skip))
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=quantisation)


def by_hqq(folder: Path, skip: tuple[str, ...]) -> PreTrainedModel:
    """By hand: transformers 5 does not load HQQ's models yet."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and not name.startswith(skip):
            parent, _, child = name.rpartition(".")
            how = BaseQuantizeConfig(nbits=8, group_size=16)
            quantised = HQQLinear(layer, how, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), child, quantised)
    return model


LIBRARIES = {"bitsandbytes": by_bitsandbytes, "torchao": by_torchao, "optimum.quanto": by_quanto, "hqq": by_hqq}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.build("llava").save_pretrained(path)
    return path


@pytest.fixture(params=LIBRARIES)
def load(request, folder) -> Callable[..., PreTrainedModel]:
    try:
        importlib.import_module(request.param)
    except ImportError:
        pytest.skip(f"{request.param} is not installed")
    return lambda skip=UNTOUCHED: LIBRARIES[request.param](folder, skip)


def q_proj(model: Any) -> nn.Module:
    return model.base_model.model.model.language_model.layers[0].self_attn.q_proj


def images(model: Any) -> dict[str, torch.Tensor]:
    return tiny.batch(model, "llava", [[tiny.random_image("llava", 0)], [tiny.random_image("llava", 1, style=5)]])


def test_quantised_layers_train_are_measured_and_merge(load, tmp_path):
    as_lora = get_peft_model(load(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = get_peft_model(load(), MAnyConfig(r=2, init_lora_weights=False, energy=1.0))
    assert type(q_proj(model)) is type(q_proj(as_lora))
    assert type(getattr(q_proj(model).get_base_layer(), "weight", None)) is not nn.Parameter  # but a library's own
    batch = images(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert q_proj(model).lora_A["default"].weight.grad.abs().sum() > 0
    model.eval()
    with recorded(model) as inputs:
        task = collect_statistics(model, [batch], progress=False).tasks[0]
    assert len(task.input_of) == 14
    for name, covariance in covariances(task).items():
        rows = torch.cat(inputs[name])
        assert distance(covariance.matrix, rows.T @ rows / len(rows)) < 1e-5, name
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter_sequence(load(), [tmp_path / "adapter"], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)


def test_images_are_routed_one_by_one(load, tmp_path):
    """A joint batch of images of two tasks gives what each image alone does."""
    folders = [make(tmp_path / name, seed=seed, task_name=name).folder for seed, name in ((0, "a"), (5, "b"))]
    merged = merge_adapter_sequence(load(), folders, progress=False)
    both = images(merged)
    with torch.no_grad():
        together = merged(**both).logits
        alone = [merged(**{name: value[row : row + 1] for name, value in both.items()}).logits for row in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-2, rtol=2e-2)  # int8 kernels round by batch


def test_a_delta_on_quantised_weights_is_refused(load, tmp_path):
    model = get_peft_model(tiny.build("llava"), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "dora")
    words = r"dora: its delta depends on the base weight of '.*q_proj', which is quantised"
    with pytest.raises(UnmergeableAdapterError, match=words):
        merge_adapter_sequence(load(), [tmp_path / "dora"], method="average", progress=False)


def test_merging_files_needs_no_base_model(load, tmp_path):
    folders = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(load(), MAnyConfig(r=2, init_lora_weights=False)).eval()
        collect_statistics(model, [images(model)], progress=False)
        model.save_pretrained(tmp_path / f"{seed}")
        folders.append(tmp_path / f"{seed}")
    merged = merge_adapter_files(folders, tmp_path / "merged", task_names=["a", "b"], progress=False)
    loaded = PeftModel.from_pretrained(load(), merged)
    with torch.no_grad():
        assert loaded(**images(loaded)).logits.isfinite().all()


def test_a_quantised_projector_is_refused_with_a_way_out(folder):
    pytest.importorskip("bitsandbytes")
    base = by_bitsandbytes(folder, ("lm_head",))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"'{PROJECTOR}' is quantised.*llm_int8_skip_modules"):
        get_peft_model(base, MAnyConfig(r=2))
    assert [name for name, _ in base.named_modules()] == names
    get_peft_model(base, MAnyConfig(r=2, projector_modules=[]))
