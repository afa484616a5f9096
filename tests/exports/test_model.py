"""Folded models: reloaded by transformers alone, and compared with the adapter that they were made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from benchmarks.mini_ucit.parts import with_parts
from peft_many import export_lora, export_model, export_routed_model, merge_adapter_files
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.files.statistics import AdapterStatistics
from tests import new_process
from tests.adapters import PROJECTOR, STATISTICS, WEIGHTS, base, distance, files, logits, make
from tests.exports.shelf import Shelf, text_logits


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def reload(folder, kind=LlavaForConditionalGeneration):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is kind
    return model.eval()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_mean_of_the_projectors(tmp_path, family):
    shelf, options = Shelf(tmp_path, family), {"weights": [1.0, 3.0, 1.0]}
    merged = shelf.merge("abc", tmp_path / "merged", **options)
    exported = export_model(merged, tmp_path / "model", base_model=shelf.base)
    assert not any(name.startswith("adapter_") for name in files(exported.folder))
    model = reload(exported.folder, type(base(family)))
    mean = PeftModel.from_pretrained(base(family), shelf.merge("abc", tmp_path / "mean", projectors="mean", **options))
    routed = PeftModel.from_pretrained(base(family), merged)
    assert distance(logits(model, family), logits(mean, family)) < 1e-5
    assert distance(text_logits(model), text_logits(routed)) < 1e-5
    assert distance(logits(model, family), logits(routed, family)) > 1e-3


def test_what_is_lost_is_said(shelf, tmp_path):
    merged = shelf.merge("abc", tmp_path / "merged")
    exported = export_model(merged, tmp_path / "model", base_model=shelf.base)
    (note,) = exported.notes[:-1]  # the last is about the tokenizer
    assert f"'{PROJECTOR}' is the mean of the tasks' by their weights and is no longer routed" in note
    card = (exported.folder / "README.md").read_text()
    assert all(note in card for note in exported.notes)
    assert "LlavaForConditionalGeneration.from_pretrained" in card
    assert str(tmp_path.parent) not in card  # local paths are nobody's business
    assert str(shelf.base) not in card
    exported = export_model(merged, tmp_path / "own", base_model=shelf.base, projector="b")
    assert f"'{PROJECTOR}' is that of 'b'" in exported.notes[0]
    assert "Answers on text and about images of 'b' are the merge's" in exported.notes[0]


@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_a_named_tasks_projector(shelf, tmp_path, task):
    merged = shelf.merge("abc", tmp_path / "merged")
    exported = export_model(merged, tmp_path / "model", base_model=shelf.base, projector=task)
    projectors = shelf.adapters[task] if task != "c" else None  # which trained none: the base model's serves
    expected = with_parts(lambda: base("llava"), lora=merged, projectors=projectors)
    assert distance(logits(reload(exported.folder), "llava"), logits(expected, "llava")) < 1e-5


def test_single_adapters_lose_nothing(shelf, tmp_path):
    exported = export_model(shelf.adapters["b"], tmp_path / "model", base_model=shelf.base)
    expected = logits(PeftModel.from_pretrained(base("llava"), shelf.adapters["b"]), "llava")
    assert distance(logits(reload(exported.folder), "llava"), expected) < 1e-5
    assert "Outputs are the adapter's" in exported.notes[0]


def test_gated_and_averaged_merges(shelf, tmp_path):
    gated = shelf.merge("ab", tmp_path / "gated", gate_lora=True)
    exported = export_model(gated, tmp_path / "1", base_model=shelf.base)
    assert "gate_lora" in exported.notes[0]
    plain = PeftModel.from_pretrained(base("llava"), shelf.merge("ab", tmp_path / "plain"))
    assert distance(text_logits(reload(exported.folder)), text_logits(plain)) < 1e-5
    mean = shelf.merge("ab", tmp_path / "mean", projectors="mean")
    exported = export_model(mean, tmp_path / "2", base_model=shelf.base)
    expected = logits(PeftModel.from_pretrained(base("llava"), mean), "llava")
    assert distance(logits(reload(exported.folder), "llava"), expected) < 1e-5
    with pytest.raises(ValueError, match="is already the mean of several tasks'"):
        export_model(mean, tmp_path / "3", base_model=shelf.base, projector="a")


def test_text_models_and_half_precision(tmp_path):
    base("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    made = [make(tmp_path / name, "llama", seed=seed, task_name=name).folder for seed, name in enumerate("ab")]
    merged = merge_adapter_files(made, tmp_path / "merged", progress=False)
    config = json.loads((merged / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")  # as training on a saved model writes it
    (merged / "adapter_config.json").write_text(json.dumps(config))
    exported = export_model(merged, tmp_path / "model")
    assert exported.notes[0] == "Outputs are the adapter's, up to rounding."
    kind = type(base("llama"))
    model = kind.from_pretrained(exported.folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    expected = text_logits(PeftModel.from_pretrained(base("llama"), merged))
    assert distance(text_logits(model), expected) < 0.05
    assert distance(text_logits(base("llama")), expected) > 0.2


def test_adapters_with_names_from_before_transformers_5(shelf, tmp_path):
    old = shutil.copytree(shelf.adapters["a"], tmp_path / "old")
    renamed = {}
    for key, tensor in load_file(old / WEIGHTS).items():
        key = key.replace("model.model.language_model.", "model.language_model.model.")
        renamed[key.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")] = tensor
    save_file(renamed, old / WEIGHTS)
    (old / STATISTICS).unlink()
    config = json.loads((old / "adapter_config.json").read_text())
    config["projector_modules"] = config["modules_to_save"] = ["multi_modal_projector"]
    (old / "adapter_config.json").write_text(json.dumps(config))
    expected = PeftModel.from_pretrained(base("llava"), shelf.adapters["a"])
    exported = export_model(old, tmp_path / "model", base_model=shelf.base)
    assert distance(logits(reload(exported.folder), "llava"), logits(expected, "llava")) < 1e-5
    plain = PeftModel.from_pretrained(base("llava"), export_lora(old, tmp_path / "lora").folder)
    assert distance(text_logits(plain), text_logits(expected)) < 1e-5


def test_tokenizers_and_processors_come_along(shelf, tmp_path):
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "evil.py", "weights.bin"):
        (shelf.base / name).write_text(name)
    exported = export_model(shelf.adapters["a"], tmp_path / "1", base_model=shelf.base)
    found = files(exported.folder)
    assert found["tokenizer.json"] == b"tokenizer.json"
    assert {"preprocessor_config.json", "chat_template.jinja"} < set(found)
    assert not {"evil.py", "weights.bin"} & set(found)
    assert not any("has no tokenizer" in note for note in exported.notes)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", "evil.py", "weights.bin"):
        (shelf.base / name).unlink()
    assert "has no tokenizer" in export_model(shelf.adapters["a"], tmp_path / "2", base_model=shelf.base).notes[-1]


@pytest.mark.parametrize("dry_run", [False, True])
def test_mistakes(shelf, tmp_path, dry_run):
    merged = shelf.merge("ab", tmp_path / "merged")
    export = partial(export_model, merged, dry_run=dry_run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = files(tmp_path)
    with pytest.raises(ValueError, match="does not name its base model"):
        export(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no task 'x' whose projector could be kept; the tasks are 'a', 'b'"):
        export(tmp_path / "model", base_model=shelf.base, projector="x")
    with pytest.raises(FileNotFoundError, match="The base model 'me/nowhere' cannot be loaded"):
        export(tmp_path / "model", base_model="me/nowhere", local_files_only=True)
    for place in (merged, tmp_path / "full"):
        with pytest.raises(FileExistsError):
            export(place, base_model=shelf.base)
    base("qwen2_vl").save_pretrained(shelf.root / "other")
    with pytest.raises(UnmergeableAdapterError, match="trained on another base model"):
        export(tmp_path / "model", base_model=shelf.root / "other")
    assert files(tmp_path) == before


def test_a_dry_run_does_all_but_write_and_read_the_base_models_weights(shelf, tmp_path, recwarn):
    merged = shelf.merge("ab", tmp_path / "merged")
    bare = Path(shutil.copytree(shelf.base, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    before = files(tmp_path)
    for export, more in (
        (export_model, {"projector": "b"}),
        (export_routed_model, {}),
        (export_lora, {"with_tasks": True, "check_for": "vllm"}),
    ):
        tried = export(merged, tmp_path / "new", base_model=bare, dry_run=True, **more)
        assert tried.folder == tmp_path / "new"
        assert files(tmp_path) == before
        assert tried.notes == export(merged, tmp_path / export.__name__, base_model=shelf.base, **more).notes
        shutil.rmtree(tmp_path / export.__name__)
    assert [str(one.message) for one in recwarn if "meta parameter" in str(one.message)] == []


@pytest.mark.slow
def test_it_needs_nothing_of_this_package(shelf, tmp_path):
    exported = export_model(shelf.merge("ab", tmp_path / "merged"), tmp_path / "model", base_model=shelf.base)
    program = (
        "import sys; from transformers import AutoModelForImageTextToText as A; A.from_pretrained(sys.argv[1]); "
        "assert 'peft_many' not in sys.modules"
    )
    done = new_process.run(program, exported.folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_projector_of_another_size(shelf, tmp_path, dry_run):
    folder = shutil.copytree(shelf.adapters["a"], tmp_path / "a")
    stored = load_file(folder / WEIGHTS)
    key = next(key for key in stored if key.endswith("linear_1.weight"))
    save_file({**stored, key: stored[key][:, 1:].contiguous()}, folder / WEIGHTS)
    measured = AdapterStatistics.load(folder / STATISTICS).tasks[0]
    AdapterStatistics((replace(measured, projector_shapes={}),)).save(folder)  # or it would be seen to be damaged
    with pytest.raises(UnmergeableAdapterError, match=r"does not fit this LlavaFor.*another base model.*linear_1"):
        export_model(folder, tmp_path / "model", base_model=shelf.base, dry_run=dry_run)
    assert not (tmp_path / "model").exists()


def test_no_projector_of_a_task_whose_weight_was_zero(shelf, tmp_path):
    merged = merge_adapter_files(
        [shelf.adapters["a"], shelf.adapters["b"]], tmp_path / "merged", weights=[0, 1], progress=False
    )
    with pytest.raises(ValueError, match="'a' had the weight 0 in this merge, so its projector was not kept"):
        export_model(merged, tmp_path / "model", base_model=shelf.base, projector="a")
