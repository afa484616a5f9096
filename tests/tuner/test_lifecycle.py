"""A task adapter through everything that users do with PEFT adapters: it must behave as LoRA does."""

import copy
import dataclasses
import gc
import textwrap
import weakref

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from tests import new_process, tiny

PROJECTOR = "model.multi_modal_projector"


def trained(base, adapter_name="default", seed=0, **options):
    """An adapter whose every trainable weight was moved, as training would."""
    model = get_peft_model(base, MAnyConfig(r=4, lora_alpha=8, **options), adapter_name)
    perturb(model, seed)
    return model.eval()


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.1 * noise).to(parameter.dtype)


@pytest.fixture
def base():
    return tiny.build("llava")


@pytest.fixture
def batch(base):
    return tiny.batch(base, "llava", [[tiny.random_image("llava", 0)], [tiny.random_image("llava", 1)]])


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_saved_and_loaded_gives_the_same_outputs(base, batch, tmp_path):
    fresh = copy.deepcopy(base)
    before = logits(base, batch)
    model = trained(base)
    expected = logits(model, batch)
    assert not torch.allclose(before, expected, atol=1e-3)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded, batch), expected)
        assert type(loaded.peft_config["default"]) is MAnyConfig


def test_the_projector_survives_the_conversion_of_pissa(base, batch, tmp_path):
    """As PEFT's documentation converts it; its own LORA loses `modules_to_save` on the way."""
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, MAnyConfig(r=4, lora_alpha=8, init_lora_weights="pissa"))
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    config.init_lora_weights = "pissa"
    perturb(model.eval(), 0)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "converted").eval()
    torch.testing.assert_close(logits(loaded, batch), expected, atol=1e-4, rtol=0)
    collect_statistics(loaded, [batch], progress=False)
    loaded.save_pretrained(tmp_path / "measured")
    merged = merge_adapter_sequence(copy.deepcopy(fresh), [tmp_path / "measured"], progress=False)
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_with_biases_is_loaded_again(base, batch, tmp_path, bias):
    fresh = copy.deepcopy(base)
    model = trained(base, bias=bias)
    model.save_pretrained(tmp_path)
    for name in ("default", "other"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, adapter_name=name)
        assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_loading_in_a_new_process_needs_only_the_import(base, batch, tmp_path):
    torch.save(batch, tmp_path / "batch.pt")
    base.save_pretrained(tmp_path / "base")
    model = trained(base)
    collect_statistics(model, [batch], progress=False)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model, batch), tmp_path / "expected.pt")
    script = f"""
        import torch, peft_many
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration
        batch, expected = torch.load(r"{tmp_path}/batch.pt"), torch.load(r"{tmp_path}/expected.pt")
        base = LlavaForConditionalGeneration.from_pretrained(r"{tmp_path}/base")
        model = PeftModel.from_pretrained(base, r"{tmp_path}/adapter").eval()
        torch.testing.assert_close(model(**batch).logits, expected)
        name = "model.language_model.layers.0.self_attn.q_proj"
        q_proj = base.get_submodule(name)
        (task,) = model.peft_config["default"].statistics.tasks
        assert q_proj.covariance["default"] is task.covariance_of(name)
        assert task.tokens_of(name) == batch["attention_mask"].sum()
        plain = LlavaForConditionalGeneration.from_pretrained(r"{tmp_path}/base")
        plain.load_adapter(r"{tmp_path}/adapter")
        torch.testing.assert_close(plain(**batch).logits, expected)
    """
    done = new_process.run(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


def test_several_adapters_switch_disable_and_delete(base, batch):
    plain = logits(base, batch)
    model = trained(base, "first", seed=1)
    first = logits(model, batch)
    model.add_adapter("second", MAnyConfig(r=2))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("second")
    assert torch.allclose(logits(model, batch), plain, atol=1e-5)  # fresh: B is zero, the projector a copy
    perturb(model, seed=2)
    second = logits(model, batch)
    model.set_adapter("first")
    assert torch.equal(logits(model, batch), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), first)
    with pytest.warns(UserWarning, match="deleted"):
        model.delete_adapter("first")
    assert torch.equal(logits(model, batch), second)
    assert "first" not in model.peft_config
    assert not any(".first." in name for name, _ in model.named_parameters())


def test_load_adapter_beside_another(base, batch, tmp_path):
    model = trained(copy.deepcopy(base), seed=1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    other = trained(base, seed=2)
    kept = logits(other, batch)
    other.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(other, batch), kept)
    other.set_adapter("loaded")
    assert torch.equal(logits(other, batch), expected)


def test_merge_and_unload_gives_a_plain_model_with_the_same_outputs(base, batch, tmp_path):
    fresh = copy.deepcopy(base)
    model = trained(base)
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    assert type(merged) is type(fresh)
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in fresh.named_modules()]
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    reloaded = type(fresh).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded, batch), expected, atol=1e-4, rtol=1e-4)


def test_unload_gives_the_base_back(base, batch):
    expected, names = logits(base, batch), [n for n, _ in base.named_modules()]
    unloaded = trained(base).unload()
    assert [n for n, _ in unloaded.named_modules()] == names
    assert torch.equal(logits(unloaded, batch), expected)


def test_transformers_own_adapter_methods(base, batch, tmp_path):
    plain = logits(base, batch)
    model = trained(copy.deepcopy(base))
    collect_statistics(model, [batch], progress=False)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    base.load_adapter(tmp_path / "adapter", "task")
    torch.testing.assert_close(logits(base, batch), expected)
    base.disable_adapters()
    torch.testing.assert_close(logits(base, batch), plain)
    base.enable_adapters()
    base.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny.build("llava"), tmp_path / "again")
    torch.testing.assert_close(logits(again, batch), expected)
    statistics = "adapter_statistics.safetensors"
    before, after = load_file(tmp_path / "adapter" / statistics), load_file(tmp_path / "again" / statistics)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    base.delete_adapter("task")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_lora_and_projector_and_nothing_else(base, batch, use_reentrant):
    model = get_peft_model(base, MAnyConfig(r=4))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    perturb(model, seed=0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == trainable
    assert any("multi_modal_projector" in name for name in trainable)
    assert any("q_proj.lora_A" in name for name in trainable)
    assert all(".lora_" in name or "multi_modal_projector" in name for name in trainable)


def test_bf16_base(tmp_path):
    base = tiny.build("llava", dtype=torch.bfloat16)
    batch = tiny.batch(base, "llava", [[tiny.random_image("llava", 0)]])
    fresh = copy.deepcopy(base)
    model = trained(base)
    expected = logits(model, batch)
    assert expected.dtype == torch.bfloat16
    collect_statistics(model, [batch], progress=False)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        # With low_cpu_mem_usage PEFT rounds LoRA weights through the dtype of the base.
        torch.testing.assert_close(
            logits(loaded, batch),
            expected,
            **({"atol": 0.1, "rtol": 0.1} if low_cpu_mem_usage else {"atol": 0, "rtol": 0}),
        )
        layer = loaded.base_model.model.model.language_model.layers[0].mlp.down_proj
        assert layer.covariance["default"].factor.dtype == torch.float16


def test_statistics_survive_load_save_load_and_replace(base, batch, tmp_path):
    model = trained(copy.deepcopy(base))
    collect_statistics(model, [batch], progress=False)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "one")
    again.peft_config["default"] = dataclasses.replace(again.peft_config["default"], task_name="renamed")
    again.save_pretrained(tmp_path / "two")
    name = "adapter_statistics.safetensors"
    first, second = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    again.save_pretrained(tmp_path / "one")  # over the file that is mapped into memory
    assert all(torch.equal(value, first[key]) for key, value in load_file(tmp_path / "one" / name).items())


def test_the_adapters_json_holds_no_statistics_and_loads_as_MAnyConfig(base, batch, tmp_path):
    model = trained(base, task_name="digits")
    collect_statistics(model, [batch], progress=False)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, MAnyConfig)
    assert config.task_name == "digits"
    assert '"statistics"' not in (tmp_path / "adapter_config.json").read_text()
    assert config == MAnyConfig(**{**config.to_dict(), "target_modules": config.target_modules})


def test_a_folder_loads_as_plain_lora_and_a_lora_folder_as_many(batch, tmp_path):
    model = trained(tiny.build("llava"))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "many")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=model.peft_config["default"].target_modules)
    config.modules_to_save = [PROJECTOR]
    as_lora = PeftModel.from_pretrained(tiny.build("llava"), tmp_path / "many", config=config)
    torch.testing.assert_close(logits(as_lora, batch), expected)
    as_lora.save_pretrained(tmp_path / "lora")
    as_many = PeftModel.from_pretrained(tiny.build("llava"), tmp_path / "lora", config=MAnyConfig(r=4, lora_alpha=8))
    torch.testing.assert_close(logits(as_many, batch), expected)


def test_a_key_that_matches_no_module_is_an_error(base, tmp_path):
    from safetensors.torch import save_file

    trained(copy.deepcopy(base)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers\.7.*matches no module"):
        PeftModel.from_pretrained(base, tmp_path)


def measured(**options):
    model = trained(tiny.build("llava"), **options)
    collect_statistics(model, [images(model)], progress=False)
    return model


def images(model):
    return tiny.batch(model, "llava", [[tiny.random_image("llava", 0)], [tiny.random_image("llava", 1)]])


def merged(tmp_path, **options):
    model = merge_adapter_sequence(tiny.build("llava"), [tmp_path / "a", tmp_path / "b"], progress=False, **options)
    logits(model, images(model))
    model.generate(**images(model), max_new_tokens=2, num_beams=2)
    return model


def by_transformers(tmp_path):
    model = tiny.build("llava")
    model.load_adapter(str(tmp_path / "merge"))
    return model


LIVES = {
    "measured": lambda tmp_path: measured(),
    "merged": merged,
    "gated": lambda tmp_path: merged(tmp_path, gate_lora=True),
    "loaded": lambda tmp_path: PeftModel.from_pretrained(tiny.build("llava"), tmp_path / "merge"),
    "loaded by transformers": by_transformers,
    "unloaded": lambda tmp_path: merged(tmp_path).merge_and_unload(),
}


@pytest.mark.parametrize("life", LIVES)
def test_the_memory_of_a_deleted_model_is_free_at_once(tmp_path, life):
    """As with PEFT's own adapters: no circle of references waits for the garbage collector."""
    if life != "measured":
        for seed, name in enumerate("ab"):
            measured(seed=seed, task_name=name).save_pretrained(tmp_path / name)
        merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "merge", progress=False)
    gc.collect()
    gc.disable()
    try:
        model = LIVES[life](tmp_path)
        kept = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
        del model
        assert not [name for name, parameter in kept.items() if parameter() is not None]
    finally:
        gc.enable()


def test_a_failing_injection_leaves_the_projector_unwrapped(base):
    names = [n for n, _ in base.named_modules()]
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_peft_model(base, MAnyConfig(target_modules=["no_such_layer"]))
    assert [n for n, _ in base.named_modules()] == names
    model = trained(base)
    with pytest.raises(ValueError, match="No modules were targeted"):
        model.add_adapter("other", MAnyConfig(target_modules=["no_such_layer"]))
    assert not any(".other" in n for n, _ in model.named_modules())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.5}, {"merge": {}}, {"format_version": 1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).replace("_", " ").split()[0]):
        MAnyConfig(**options)
