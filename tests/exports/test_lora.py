"""The exported LoRA: in stock PEFT, in a process that has never heard of this package, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_many import collect_statistics, export_lora, merge_adapter_files
from peft_many.files.errors import UnmergeableAdapterError
from tests import new_process
from tests.adapters import STATISTICS, WEIGHTS, base, batches, distance, files, logits, make, make_loha, merged_deltas
from tests.exports.shelf import Shelf, text_logits


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


STOCK = """
import sys
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
tokens = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits, sys.argv[4])
assert not any(name.partition(".")[0] == "peft_many" for name in sys.modules), "peft_many was imported"
assert {layer.r["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {10}
"""


def test_an_adapter_of_another_peft_method_becomes_a_lora(tmp_path):
    made = make_loha(tmp_path / "loha")
    exported = export_lora(made.folder, tmp_path / "lora")
    found = merged_deltas(exported.folder)
    assert found.keys() == made.deltas.keys()
    assert all(distance(found[layer], delta) < 1e-6 for layer, delta in made.deltas.items())
    as_lora, as_loha = (PeftModel.from_pretrained(base("llama"), at).eval() for at in (exported.folder, made.folder))
    torch.testing.assert_close(logits(as_lora, "llama"), logits(as_loha, "llama"), atol=1e-4, rtol=1e-4)


def test_it_loads_by_auto_peft_model(shelf, tmp_path):
    exported = export_lora(shelf.merge("ab", tmp_path / "merged"), tmp_path / "lora").folder
    content = json.loads((exported / "adapter_config.json").read_text())
    (exported / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": str(shelf.base)}))
    model = AutoPeftModel.from_pretrained(exported)
    assert type(model.get_base_model()) is type(base("llava"))


def test_names_of_tasks_are_no_markup_in_the_card(tmp_path):
    made = make(tmp_path / "a", "llama", task_name="a | <b>")
    card = (export_lora(made.folder, tmp_path / "lora").folder / "README.md").read_text()
    assert r"| a \| \<b\> |" in card


@pytest.mark.slow
def test_stock_peft_in_a_process_of_its_own(shelf, tmp_path):
    merged = shelf.merge("abc", tmp_path / "merged", router="gaussian")
    exported = export_lora(merged, tmp_path / "lora")
    tokens = torch.tensor([[1, 5, 9, 30, 31, 44]])
    torch.save(tokens, tmp_path / "tokens")
    asked = (shelf.base, exported.folder, tmp_path / "tokens", tmp_path / "logits")
    done = new_process.run(STOCK, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(base("llava"), merged)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert distance(torch.load(tmp_path / "logits"), expected) < 1e-5
    with model.disable_adapter(), torch.no_grad():
        assert distance(model(input_ids=tokens).logits, expected) > 1e-2


@pytest.mark.parametrize(
    ("names", "options"),
    [
        ("abc", {}),
        ("ab", {"gate_lora": True}),
        ("ab", {"rank": 3}),
        ("ab", {"dtype": torch.bfloat16}),
        ("ab", {"method": "ties", "projectors": "mean"}),
    ],
)
def test_outputs_on_text_are_those_of_the_merge(shelf, tmp_path, names, options):
    merged = shelf.merge(names, tmp_path / "merged", **options)
    exported = export_lora(merged, tmp_path / "lora")
    assert sorted(files(exported.folder)) == ["README.md", "adapter_config.json", WEIGHTS]
    found = text_logits(PeftModel.from_pretrained(base("llava"), exported.folder))
    expected = text_logits(PeftModel.from_pretrained(base("llava"), merged))
    assert distance(found, expected) < 1e-5
    assert ("gate_lora" in " ".join(exported.notes)) == bool(options.get("gate_lora"))
    config = json.loads((exported.folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["modules_to_save"], config["r"]) == ("LORA", None, config["lora_alpha"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == json.loads((merged / "adapter_config.json").read_text())["r"]  # no server needs more
    dtypes = {tensor.dtype for tensor in load_file(exported.folder / WEIGHTS).values()}
    assert dtypes == {options.get("dtype", torch.float32)}
    card = (exported.folder / "README.md").read_text()
    assert all(note in card for note in exported.notes)
    export_lora(merged, tmp_path / "again")
    assert files(tmp_path / "again") == files(exported.folder)


@pytest.mark.parametrize("family", ["llava", "gpt2"])
def test_single_adapters_with_scalings_and_patterns(tmp_path, family):
    targets = ["c_attn", "c_fc"] if family == "gpt2" else r".*language_model.*(q|v|down)_proj"
    options = {"fan_in_fan_out": True} if family == "gpt2" else {"rank_pattern": {"q_proj": 3}, "use_rslora": True}
    made = make(tmp_path / "a", family, kind=LoraConfig, target_modules=targets, **options, r=5, lora_alpha=7)
    (made.folder / STATISTICS).unlink()  # needs none
    exported = export_lora(made.folder, tmp_path / "lora")
    found = logits(PeftModel.from_pretrained(base(family), exported.folder), family)
    assert distance(found, logits(PeftModel.from_pretrained(base(family), made.folder), family)) < 1e-5
    assert {tensor.shape[0] for key, tensor in load_file(exported.folder / WEIGHTS).items() if "lora_A" in key} == {5}


def test_images_are_seen_through_the_base_projector(shelf, tmp_path):
    merged = shelf.merge("ab", tmp_path / "merged")
    exported = export_lora(merged, tmp_path / "lora")
    assert any("images go through the base model's projector" in note for note in exported.notes)
    found = logits(PeftModel.from_pretrained(base("llava"), exported.folder), "llava")
    assert distance(found, logits(PeftModel.from_pretrained(base("llava"), merged), "llava")) > 1e-3


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_the_tasks_own_lie_within(shelf, tmp_path, options):
    merged = shelf.merge("abc", tmp_path / "merged", gate_lora=True, **options)
    exported = export_lora(merged, tmp_path / "lora", with_tasks=True)
    assert exported.notes[-1] == (
        "The tasks' own LoRAs are in folders of their own: a (`task_0`), b (`task_1`), c (`task_2`)."
    )
    assert not any("gate_lora" in note for note in exported.notes)
    whose = json.loads((exported.folder / "tasks.json").read_text())
    record = json.loads((merged / "adapter_config.json").read_text())["merge"]
    assert whose == [{"name": task["name"], "sha256": task["origin"]["sha256"]} for task in record["tasks"]]
    for t, name in enumerate("abc"):
        found = text_logits(PeftModel.from_pretrained(base("llava"), exported.folder / f"task_{t}"))
        expected = text_logits(PeftModel.from_pretrained(base("llava"), shelf.adapters[name]))
        assert distance(found, expected) < (0.05 if options else 1e-5)  # rounded as the merge is
    with pytest.raises(ValueError, match=r"is no merge, so there are no tasks' LoRAs beside it"):
        export_lora(shelf.adapters["a"], tmp_path / "none", with_tasks=True)
    assert not (tmp_path / "none").exists()


def test_layers_that_a_server_would_leave_out(shelf, tmp_path):
    merged = shelf.merge("ab", tmp_path / "merged")
    options = {"check_for": "vllm", "base_model": shelf.base}
    exported = export_lora(merged, tmp_path / "lora", **options)
    expected = text_logits(PeftModel.from_pretrained(base("llava"), merged))
    assert distance(text_logits(PeftModel.from_pretrained(base("llava"), exported.folder)), expected) < 1e-5
    other = make(tmp_path / "b", "gpt2", kind=LoraConfig, target_modules=["c_fc"], fan_in_fan_out=True, r=2).folder
    with pytest.raises(UnmergeableAdapterError, match=r"'.*c_fc' matches no module of LlavaForConditionalGeneration"):
        export_lora(other, tmp_path / "none", **options)
    make(tmp_path / "c", kind=LoraConfig, target_modules=r".*vision_tower.*q_proj", r=2)
    loha = LoHaConfig(r=2, target_modules=r".*vision_tower.*q_proj", init_weights=False)
    model = get_peft_model(base("llava"), loha)
    collect_statistics(model, batches(model, "llava", 0), progress=False)
    model.save_pretrained(tmp_path / "d")
    for tower in (tmp_path / "c", tmp_path / "d"):
        with pytest.raises(UnmergeableAdapterError, match=r"vision_tower.*outside the language model 'model\."):
            export_lora(tower, tmp_path / "none", **options)
    with pytest.raises(FileNotFoundError, match="The base model 'no/model' cannot be loaded"):
        export_lora(merged, tmp_path / "none", check_for="vllm", base_model="no/model", local_files_only=True)
    with pytest.raises(ValueError, match="`check_for` must be one of 'vllm', but it is 'other'"):
        export_lora(merged, tmp_path / "none", check_for="other")
    assert not (tmp_path / "none").exists()


def test_a_server_that_reads_rank_patterns_needs_no_padding(shelf, tmp_path):
    options = {"target_modules": r".*language_model.*(q|v)_proj", "rank_pattern": {"q_proj": 3}, "r": 5}
    made = make(tmp_path / "a", kind=LoraConfig, lora_alpha=7, **options)
    exported = export_lora(made.folder, tmp_path / "lora", check_for="vllm", base_model=shelf.base)
    assert exported.notes[0].startswith("Layers have ranks up to 5 (vLLM: `--max-lora-rank 8`)")
    found = text_logits(PeftModel.from_pretrained(base("llava"), exported.folder))
    assert distance(found, text_logits(PeftModel.from_pretrained(base("llava"), made.folder))) < 1e-5
    tensors = load_file(exported.folder / WEIGHTS)
    assert {(key.split(".")[-3], len(A)) for key, A in tensors.items() if "lora_A" in key} == {
        ("q_proj", 3),
        ("v_proj", 5),
    }


def test_the_tasks_own_may_have_a_larger_rank(tmp_path):
    options = {"lora_alpha": 1, "target_modules": ["q_proj"]}
    adapters = [
        make(tmp_path / name, "llama", task_name=name, r=r, **options).folder for name, r in (("a", 4), ("b", 12))
    ]
    merged = merge_adapter_files(adapters, tmp_path / "merged", rank=4, progress=False)
    assert "--max-lora-rank 8" in export_lora(merged, tmp_path / "lora").notes[0]
    assert "--max-lora-rank 16" in export_lora(merged, tmp_path / "all", with_tasks=True).notes[0]
    large = make(tmp_path / "c", "llama", task_name="c", r=600, **options).folder
    merged = merge_adapter_files([*adapters, large], tmp_path / "larger", rank=4, progress=False)
    with pytest.raises(UnmergeableAdapterError, match=r"The task 'c' of .* rank 600.*without the tasks' own LoRAs"):
        export_lora(merged, tmp_path / "none", with_tasks=True)
    assert not (tmp_path / "none").exists()


def test_ranks_that_no_server_takes(tmp_path):
    options = {"lora_alpha": 1, "target_modules": ["q_proj"]}
    large = make(tmp_path / "a", "llama", r=300, **options).folder
    assert "rank 300 (vLLM: `--max-lora-rank 320`)" in export_lora(large, tmp_path / "one").notes[0]
    larger = make(tmp_path / "b", "llama", r=600, **options).folder
    with pytest.raises(UnmergeableAdapterError, match=r"rank 600, and vLLM serves at most 512: merge it again"):
        export_lora(larger, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    merged = merge_adapter_files([larger], tmp_path / "merged", rank=512, progress=False)  # as the message says
    found = logits(PeftModel.from_pretrained(base("llama"), export_lora(merged, tmp_path / "2").folder), "llama")
    assert distance(found, logits(PeftModel.from_pretrained(base("llama"), larger), "llama")) < 1e-4


def test_damage_and_places(shelf, tmp_path):
    merged = shelf.merge("ab", tmp_path / "merged")
    before = files(tmp_path)
    with pytest.raises(FileExistsError):
        export_lora(merged, merged)
    with pytest.raises(FileNotFoundError):
        export_lora(tmp_path / "nowhere", tmp_path / "lora")
    assert files(tmp_path) == before
    content = bytearray((merged / WEIGHTS).read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # NaN
    (merged / WEIGHTS).write_bytes(content)
    with pytest.raises(UnmergeableAdapterError, match="NaN"):
        export_lora(merged, tmp_path / "lora")
    assert not Path(tmp_path / "lora").exists()
