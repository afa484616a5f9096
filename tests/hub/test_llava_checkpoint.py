"""Checkpoints of the LLaVA repository: what is imported computes what the checkpoint says, and nothing of it runs."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_many import MAnyConfig, collect_statistics, import_llava_checkpoint, merge_adapter_files
from tests import tiny
from tests.adapters import batches
from tests.hub.llava_files import LAYERS, checkpoint, lora, projector


def by_hand(
    weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], scaling: Any = lambda name: 2.0
) -> torch.nn.Module:
    """The tiny LLaVA with the checkpoint's deltas added to its weights and its projector put in, name by name."""
    model = tiny.build("llava")
    with torch.no_grad():
        for layer, block in enumerate(model.model.language_model.layers):
            for name in LAYERS:
                path = f"base_model.model.model.layers.{layer}.{name}"
                A, B = weights[f"{path}.lora_A.weight"], weights[f"{path}.lora_B.weight"]
                delta = scaling(f"model.layers.{layer}.{name}") * (B.double() @ A.double())
                weight = block.get_submodule(name).weight
                weight.copy_(weight.double() + delta)
        for key, tensor in others.items():
            _, index, part = key.rsplit(".", 2)
            linear = model.model.multi_modal_projector.get_submodule({"0": "linear_1", "2": "linear_2"}[index])
            getattr(linear, part).copy_(tensor)
    return model


def assigned(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A fresh adapter on the tiny LLaVA whose weights are set one by one, with no file in between."""
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, lora_alpha=8)).eval()
    inner = model.base_model.model.model
    with torch.no_grad():
        for layer, block in enumerate(inner.language_model.layers):
            for name in LAYERS:
                for half in "AB":
                    parameter = getattr(block.get_submodule(name), f"lora_{half}")["default"].weight
                    parameter.copy_(weights[f"base_model.model.model.layers.{layer}.{name}.lora_{half}.weight"])
        own = inner.multi_modal_projector.modules_to_save["default"]
        for index, linear in (("0", own.linear_1), ("2", own.linear_2)):
            linear.weight.copy_(others[f"base_model.model.model.mm_projector.{index}.weight"])
            linear.bias.copy_(others[f"base_model.model.model.mm_projector.{index}.bias"])
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits.flatten() for batch in batches(tiny.build("llava"), "llava", 3)])


def test_the_imported_adapter_computes_what_the_weights_say(tmp_path):
    folder = import_llava_checkpoint(checkpoint(tmp_path / "iconqa"), tmp_path / "imported")
    assert folder == tmp_path / "imported"
    model = PeftModel.from_pretrained(tiny.build("llava"), folder)
    assert torch.equal(logits(model), logits(assigned(lora(), projector())))
    torch.testing.assert_close(logits(model), logits(by_hand(lora(), projector())), atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(tiny.build("llava"))).abs().max() > 0.1
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 14
    assert not any("vision" in name for name in adapted)
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == 14 * 2 + 4
    assert all(
        torch.equal(stored[key.replace("model.layers", "model.language_model.layers")], lora()[key]) for key in lora()
    )
    config = PeftConfig.from_pretrained(folder)
    assert (config.peft_type, config.task_name, config.base_model_name_or_path) == ("MANY", "iconqa", None)
    assert config.projector_modules == ["model.multi_modal_projector"]
    assert "somebody" not in (folder / "adapter_config.json").read_text() + (folder / "README.md").read_text()


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_alphas_and_rslora_are_kept(tmp_path, rslora):
    ranks = {"model.layers.1.self_attn.q_proj": 2, "model.layers.0.mlp.down_proj": 2}
    config = {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2, r"layers\.0\.mlp\.down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": rslora,
    }
    weights = lora(ranks=ranks)
    folder = import_llava_checkpoint(checkpoint(tmp_path / "c", weights, config=config), tmp_path / "imported")

    def scaling(name):
        rank = ranks.get(name, 4)
        return (3 if name.endswith("v_proj") else 8) / (math.sqrt(rank) if rslora else rank)

    model = PeftModel.from_pretrained(tiny.build("llava"), folder)
    expected = logits(by_hand(weights, projector(), scaling))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_measured_it_merges(tmp_path):
    for seed in range(2):
        source = checkpoint(tmp_path / f"c{seed}", lora(seed), projector(seed))
        folder = import_llava_checkpoint(source, tmp_path / f"imported{seed}", task_name=f"task{seed}")
        with pytest.raises(ValueError, match=r"has no statistics.*collect_statistics"):
            merge_adapter_files([folder], tmp_path / "unmeasured", progress=False)
        model = PeftModel.from_pretrained(tiny.build("llava"), folder)
        collect_statistics(model, batches(model, "llava", seed), progress=False)
        model.save_pretrained(tmp_path / f"measured{seed}")
    measured = [tmp_path / f"measured{seed}" for seed in range(2)]
    merged = PeftConfig.from_pretrained(merge_adapter_files(measured, tmp_path / "merged", progress=False))
    assert merged.merge.names == ["task0", "task1"]
    assert [task.trained for task in merged.merge.routing["model.multi_modal_projector"].tasks] == [True, True]
    alone = merge_adapter_files(measured[:1], tmp_path / "alone", progress=False)
    outputs = logits(PeftModel.from_pretrained(tiny.build("llava"), alone))
    torch.testing.assert_close(outputs, logits(by_hand(lora(0), projector(0))), atol=1e-4, rtol=1e-4)


def test_a_frozen_projector_stays_the_base_models(tmp_path):
    folder = import_llava_checkpoint(checkpoint(tmp_path / "c", others={}), tmp_path / "imported")
    assert PeftConfig.from_pretrained(folder).projector_modules == []
    model = PeftModel.from_pretrained(tiny.build("llava"), folder)
    torch.testing.assert_close(logits(model), logits(by_hand(lora(), {})), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_prefixes_and_dtypes(tmp_path, prefix, dtype):
    others = {f"{prefix}mm_projector.{key.split('mm_projector.')[1]}": t.to(dtype) for key, t in projector().items()}
    weights = {key: tensor.to(dtype) for key, tensor in lora().items()}
    folder = import_llava_checkpoint(checkpoint(tmp_path / "c", weights, others), tmp_path / "imported")
    stored = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    found = stored["base_model.model.model.multi_modal_projector.linear_2.weight"]
    assert torch.equal(found, others[f"{prefix}mm_projector.2.weight"])


def test_safetensors_come_before_the_pickle(tmp_path):
    source = checkpoint(tmp_path / "c", weights={})
    save_file(lora(), source / "adapter_model.safetensors")
    folder = import_llava_checkpoint(source, tmp_path / "imported", base_model="llava-hf/llava-1.5-7b-hf")
    assert len(load_file(folder / "adapter_model.safetensors")) == 32
    assert PeftConfig.from_pretrained(folder).base_model_name_or_path == "llava-hf/llava-1.5-7b-hf"


class Evil:
    """A pickle of it calls `os.system` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
@pytest.mark.parametrize("format", ["zip", "pickle"])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, name, format):
    source, marker = checkpoint(tmp_path / "c"), tmp_path / "executed"
    content = {**lora(), "more": Evil(marker)}
    if format == "zip":
        torch.save(content, source / name)
    else:
        (source / name).write_bytes(pickle.dumps(Evil(marker), protocol=2))
    with pytest.raises(ValueError, match=rf"{name}' is refused.*Nothing of it was executed"):
        import_llava_checkpoint(source, tmp_path / "imported")
    assert not marker.exists()
    assert not (tmp_path / "imported").exists()
    torch.load(source / name, weights_only=False) if format == "zip" else pickle.loads((source / name).read_bytes())
    assert marker.exists(), "the test's pickle is harmless"


def without(tensors: dict[str, torch.Tensor], end: str) -> dict[str, torch.Tensor]:
    assert any(key.endswith(end) for key in tensors)
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def replaced(tensors: dict[str, torch.Tensor], end: str, tensor: Any) -> dict[str, Any]:
    key = next(key for key in tensors if key.endswith(end))
    return {**tensors, key: tensor}


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("weights", "others", "config", "message"),
    [
        (
            {**lora(), "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
            None,
            None,
            r"'base_model.model.lm_h",
        ),
        ({**lora(), f"{Q}.lora_A.loraA.0.weight": torch.ones(4, 32)}, None, None, "no plain LoRA weights: .*loraA.0"),
        (
            None,
            {**projector(), "base_model.model.model.vision_tower.x": torch.ones(1)},
            None,
            "1 tensors.*vision_tower",
        ),
        (None, {**projector(), "model.mm_projector.0.bias": torch.ones(32)}, None, "both belong at .*linear_1.bias"),
        (None, {**projector(), f"{Q}.lora_A.weight": torch.ones(4, 32)}, None, "both belong at .*q_proj.lora_A"),
        (without(lora(), "1.mlp.up_proj.lora_B.weight"), None, None, r"model.layers.1.mlp.up_proj' lacks its lora_B"),
        (replaced(lora(), "q_proj.lora_B.weight", torch.ones(32, 5)), None, None, r"\(4, 32\) and \(32, 5\).*rank 4"),
        (replaced(lora(), "q_proj.lora_B.weight", torch.ones(4)), None, None, "is no linear layer"),
        ({}, None, None, "holds no LoRA weights"),
        (None, None, {"r": 8}, "its config says rank 8"),
        (None, None, {"r": "4"}, "adapter_config.json cannot be used"),
        (None, None, {"r": 0}, "must be (positive|a positive)"),
        (None, None, {"rank_pattern": {"q_proj": -1}}, "ranks must be positive"),
        (None, None, {"lora_alpha": "8"}, "`lora_alpha` cannot be 8"),
        (None, None, {"rank_pattern": {"(": 2}}, "regular expressions cannot be used"),
        (None, None, {"peft_type": "MOE_LORA_CoIN"}, "MOE_LORA_CoIN' is unknown"),
        (None, None, {"peft_type": "IA3"}, "is of PEFT type IA3; only a plain LoRA"),
        (None, None, {"bias": "all"}, "trains biases"),
        (None, None, {"init_lora_weights": "pissa"}, "changes the base weights of 'model.layers.0"),
        (None, None, {"use_dora": True}, "use_dora`; only a plain LoRA"),
        (None, without(projector(), "2.bias"), None, r"linear_2.bias' has shape none, it is missing"),
        (None, replaced(projector(), "0.weight", torch.ones(31, 24)), None, r"linear_1.weight' .* must be \(32, 24\)"),
        (None, replaced(projector(), "2.weight", torch.ones(32, 31)), None, r"linear_2.weight' .* must be \(32, 32\)"),
        (
            None,
            {k: torch.ones([16 if n == 32 else n for n in t.shape]) for k, t in projector().items()},
            None,
            r"linear_1.weight' has shape \(16, 24\).* must be \(32, 24\)",
        ),
        (replaced(lora(), "q_proj.lora_A.weight", [1.0]), None, None, "is no dense tensor"),
        (
            replaced(lora(), "q_proj.lora_A.weight", torch.ones(4, 32, dtype=torch.long)),
            None,
            None,
            "is no dense tensor",
        ),
        (replaced(lora(), "q_proj.lora_A.weight", torch.ones(1).expand(4, 2**40)), None, None, "claims more numbers"),
        (replaced(lora(), "q_proj.lora_A.weight", torch.tensor(1.0)), None, None, "is no dense tensor"),
        (replaced(lora(), "k_proj.lora_B.weight", torch.full((16, 4), torch.nan)), None, None, "NaN"),
        (None, replaced(projector(), "2.bias", torch.full((32,), torch.inf)), None, "NaN or Inf"),
        ([1, 2], None, None, "holds no tensors by name"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, weights, others, config, message):
    source = checkpoint(tmp_path / "c", weights, others, config)
    with pytest.raises(ValueError, match=message):
        import_llava_checkpoint(source, tmp_path / "imported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_missing_and_damaged_files(tmp_path, name, damage):
    source = checkpoint(tmp_path / "c")
    path = source / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x00\xffgarbage")
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match=name):
        import_llava_checkpoint(source, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        import_llava_checkpoint(checkpoint(tmp_path / "c"), tmp_path / "imported")
    assert [path.name for path in (tmp_path / "imported").iterdir()] == ["mine"]
