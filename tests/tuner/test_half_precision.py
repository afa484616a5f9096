"""In a model of half precision the projector's copy is float32, as LoRA's weights are."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from tests import tiny
from tests.adapters import WEIGHTS
from tests.files.making import perturb

PROJECTOR = "model.multi_modal_projector"
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def batch_for(model, seed=0):
    shown = [[tiny.random_image("llava", seed + row, style=row)] for row in range(2)]
    return tiny.batch(model, "llava", shown)


@torch.no_grad()
def logits(model, **inputs):
    return model.eval()(**(inputs or batch_for(model))).logits


def adapted(dtype=torch.bfloat16, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(tiny.build("llava", dtype=dtype), MAnyConfig(r=4, task_name=f"task {seed}"), **options)
    return model


def trained(folder, seed=0, dtype=torch.bfloat16):
    """A measured adapter, saved in a folder."""
    model = adapted(dtype, seed)
    perturb(model, "default", seed)
    collect_statistics(model, [batch_for(model, 10 * seed)], progress=False)
    model.save_pretrained(folder)
    return model


def dtypes(model, part="modules_to_save"):
    return {parameter.dtype for name, parameter in model.named_parameters() if part in name}


def projectors(model, adapter="default"):
    return model.get_base_model().get_submodule(PROJECTOR).modules_to_save[adapter].state_dict()


@halves
@pytest.mark.parametrize("checkpointing", [False, True])
def test_small_steps_are_not_rounded_away(dtype, checkpointing):
    """Weights of 0.2 in bfloat16 are 1e-3 apart: steps of 2e-5 would never move them."""
    model = adapted(dtype).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable()
    before = {name: weight.clone() for name, weight in projectors(model).items() if weight.dim() > 1}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    for _ in range(2):
        model(**batch_for(model)).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = projectors(model)
    for name, weight in before.items():
        assert (after[name] != weight).float().mean() > 0.9


@halves
def test_the_model_is_the_base_model_until_it_is_trained(dtype):
    base, model = tiny.build("llava", dtype=dtype), adapted(dtype)
    found = logits(model)
    assert found.dtype == dtype
    torch.testing.assert_close(found, logits(base), atol=0.1, rtol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert model.generate(**batch_for(model), max_new_tokens=2).shape[1] == batch_for(model)["input_ids"].shape[1] + 2
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(logits(model), logits(base), atol=0.1, rtol=0.1)


def test_without_autocast_of_the_adapter_it_stays_as_the_base():
    model = adapted(autocast_adapter_dtype=False)
    assert dtypes(model) == dtypes(model, "lora_") == {torch.bfloat16}
    assert torch.equal(logits(model), logits(tiny.build("llava", dtype=torch.bfloat16)))


def test_a_double_precision_model_keeps_its_own():
    assert dtypes(adapted(torch.float64)) == {torch.float64}


@halves
def test_it_is_saved_and_loaded_as_it_was_trained(tmp_path, dtype):
    model = trained(tmp_path, dtype=dtype)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(tiny.build("llava", dtype=dtype), tmp_path)
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    for options in ({"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny.build("llava", dtype=dtype), tmp_path, **options)
        for name, tensor in projectors(model).items():
            assert projectors(loaded)[name].dtype == torch.float32
            assert torch.equal(projectors(loaded)[name], tensor)
        torch.testing.assert_close(logits(loaded), expected, atol=0.1, rtol=0.1)
    loaded = PeftModel.from_pretrained(tiny.build("llava", dtype=dtype), tmp_path, autocast_adapter_dtype=False)
    assert dtypes(loaded) == {dtype}
    torch.testing.assert_close(logits(loaded), expected, atol=0.1, rtol=0.1)
    plain = tiny.build("llava", dtype=dtype)
    plain.load_adapter(tmp_path)
    torch.testing.assert_close(logits(plain), expected, atol=0.1, rtol=0.1)


@halves
def test_merging_keeps_what_was_trained(tmp_path, dtype):
    own = trained(tmp_path / "a", dtype=dtype)
    trained(tmp_path / "b", seed=1, dtype=dtype)
    base = tiny.build("llava", dtype=dtype)
    one = merge_adapter_sequence(copy.deepcopy(base), [tmp_path / "a"], progress=False)
    assert torch.equal(logits(one), logits(own))
    merged = merge_adapter_sequence(copy.deepcopy(base), [tmp_path / "a", tmp_path / "b"], progress=False)
    assert dtypes(merged) == {torch.float32}
    merged.save_pretrained(tmp_path / "merged")
    merge_adapter_files([tmp_path / "a", tmp_path / "b"], tmp_path / "files", progress=False)
    in_memory, in_files = (load_file(tmp_path / name / WEIGHTS) for name in ("merged", "files"))
    assert in_memory.keys() == in_files.keys()
    for key, tensor in in_files.items():
        assert in_memory[key].dtype == tensor.dtype == torch.float32
        assert torch.equal(in_memory[key], tensor)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "files")
    assert torch.equal(logits(loaded), logits(merged))
    expected = logits(merged)
    plain = merged.merge_and_unload()
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    torch.testing.assert_close(logits(plain), expected, atol=0.2, rtol=0.2)


@halves
def test_unloading_gives_a_plain_model_in_its_own_dtypes(tmp_path, dtype):
    expected = logits(model := trained(tmp_path, dtype=dtype))
    plain = copy.deepcopy(model).merge_and_unload()
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    torch.testing.assert_close(logits(plain), expected, atol=0.2, rtol=0.2)
    plain.save_pretrained(tmp_path / "plain")
    base = tiny.build("llava", dtype=dtype)
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


class Parts(nn.Module):
    """A model with a projector of the given kind, which casts nothing itself."""

    def __init__(self, projector):
        super().__init__()
        self.projector = projector
        self.head = nn.Linear(4, 2)

    def forward(self, *args, **kwargs):
        return self.head(self.projector(*args, **kwargs))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, low, sizes, high):
        assert sizes.dtype == torch.float64
        return self.low(low) + self.high(high)


def parts(projector):
    model = Parts(projector).to(torch.bfloat16)
    return get_peft_model(model, MAnyConfig(target_modules=["head"], projector_modules=["projector"]))


def test_all_features_that_a_projector_takes_are_cast():
    features = torch.randn(3, 6, dtype=torch.bfloat16)
    model, sizes = parts(TwoInputs()), torch.ones(1, dtype=torch.float64)
    assert dtypes(model) == {torch.float32}
    for output in (model(features, sizes, features), model(low=features, sizes=sizes, high=features)):
        assert output.dtype == torch.bfloat16


def test_what_becomes_of_ids_has_the_base_models_dtype():
    assert parts(nn.Embedding(8, 4))(torch.tensor([1, 5])).dtype == torch.bfloat16


def test_a_projector_may_return_anything():
    class Named(nn.Linear):
        def forward(self, features):
            return {"features": super().forward(features), "sizes": torch.ones(2), "name": "projector"}

    model = parts(Named(6, 4))
    model.get_base_model().head = nn.Identity()
    found = model(torch.randn(3, 6, dtype=torch.bfloat16))
    assert found["features"].dtype == torch.bfloat16
    assert found["name"] == "projector"


def test_batches_of_several_adapters():
    model = parts(nn.Linear(6, 4)).eval()
    model.add_adapter("other", MAnyConfig(target_modules=["head"], projector_modules=["projector"]))
    perturb(model, "other", 1)
    wrapper, features = model.get_base_model().projector, torch.randn(2, 6, dtype=torch.bfloat16)
    found = wrapper(features, adapter_names=["default", "other"])
    assert found.dtype == torch.bfloat16
    alone = [wrapper.modules_to_save[name](features.float()).bfloat16() for name in ("default", "other")]
    assert torch.equal(found, torch.stack([alone[0][0], alone[1][1]]))
