"""`measure_adapter`: what `collect_statistics` would have measured, from a file of questions, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from peft_many import (
    MAnyConfig,
    collect_statistics,
    import_llava_checkpoint,
    inspect_adapter,
    measure_adapter,
    merge_adapter_files,
)
from peft_many.data.batches import ChatCollator, batches
from peft_many.data.reading import read_examples
from peft_many.files.statistics import AdapterStatistics
from peft_many.hub.base_model import BaseModel
from peft_many.statistics import from_data
from tests import tiny
from tests.adapters import STATISTICS, WEIGHTS, files, scatter
from tests.data.test_batches import TEXT
from tests.examples import toy
from tests.hub.llava_files import checkpoint
from tests.hub.test_sources import hub, made  # noqa: F401  (fixtures)

PLAIN = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["multi_modal_projector"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    toy.save_base(root / "base")
    rows = []
    for number, colour in enumerate(["red", "blue", "green", "grey"] * 3):
        toy.save_image(root / f"{number}.png", colour)
        rows.append({"image": f"{number}.png", "question": "What colour is it ?", "answer": colour})
    toy.write(root / "colours.json", rows)
    for name, config in (("colours", MAnyConfig(r=2, task_name="of colours")), ("plain", LoraConfig(r=2, **PLAIN))):
        model = get_peft_model(AutoModelForImageTextToText.from_pretrained(root / "base"), config)
        scatter(model, 1)
        model.save_pretrained(root / name)
    return root


def measured(folder: Path) -> AdapterStatistics:
    return AdapterStatistics.load(folder / STATISTICS)


def test_it_is_what_collect_statistics_measures(place, tmp_path):
    found = measure_adapter(place / "colours", place / "colours.json", tmp_path / "1", progress=False)
    assert found == tmp_path / "1"
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(place / "base"), place / "colours")
    examples = read_examples(place / "colours.json", limit=256, seed=0)
    collate = ChatCollator(toy.processor("llava")).training
    collect_statistics(model, batches(examples, collate, 4), progress=False)
    model.save_pretrained(tmp_path / "2")
    assert files(tmp_path / "1") == files(tmp_path / "2")
    (task,) = measured(tmp_path / "1").tasks
    assert (task.name, task.samples) == ("of colours", 12)
    assert task.instructions.count == 12, "labels tell instructions from answers"
    assert files(tmp_path / "1")[WEIGHTS] == files(place / "colours")[WEIGHTS]


def test_a_plain_lora_is_taken_as_it_is_and_gets_its_tasks_name(place, tmp_path):
    options = {"max_samples": 8, "batch_size": 3, "progress": False}
    measure_adapter(place / "plain", place / "colours.json", tmp_path / "1", **options)
    measure_adapter(place / "plain", place / "colours.json", tmp_path / "2", task_name="named", **options)
    assert [measured(tmp_path / name).tasks[0].name for name in "12"] == ["plain", "named"]
    assert measured(tmp_path / "1").tasks[0].samples == 8
    assert PeftConfig.from_pretrained(tmp_path / "2").peft_type == "LORA"
    merge = merge_adapter_files([tmp_path / "2"], tmp_path / "merged", progress=False)
    assert [task.name for task in inspect_adapter(merge).tasks] == ["named"]


def test_a_lora_from_before_transformers_5(place, tmp_path):
    old = tmp_path / "old"
    PeftConfig.from_pretrained(place / "plain").save_pretrained(old)
    then = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.multi_modal_projector.", "model.multi_modal_projector."
        ): tensor
        for key, tensor in load_file(place / "plain" / WEIGHTS).items()
    }
    save_file(then, old / WEIGHTS)
    for name in ("old", "new"):
        source = old if name == "old" else place / "plain"
        measure_adapter(source, place / "colours.json", tmp_path / f"{name}-1", task_name="x", progress=False)
    assert files(tmp_path / "old-1")[STATISTICS] == files(tmp_path / "new-1")[STATISTICS]


def test_a_checkpoint_of_the_llava_repository(place, tmp_path):
    source = checkpoint(tmp_path / "iconqa")
    rows = [{"question": "What colour is it ?", "answer": "red"}] * 4
    with pytest.raises(ValueError, match="does not name its base model"):
        measure_adapter(source, rows, tmp_path / "1", progress=False)
    measure_adapter(source, rows, tmp_path / "1", base_model=place / "base", progress=False)
    config = PeftConfig.from_pretrained(tmp_path / "1")
    assert (config.task_name, config.base_model_name_or_path) == ("iconqa", str(place / "base"))
    imported = import_llava_checkpoint(source, tmp_path / "2")
    assert files(tmp_path / "1")[WEIGHTS] == files(imported)[WEIGHTS]
    assert measured(tmp_path / "1").tasks[0].samples == 4


def test_options_reach_the_base_model_and_the_measuring(place, tmp_path):
    folder = measure_adapter(
        place / "colours",
        place / "colours.json",
        tmp_path / "1",
        model_options={"dtype": torch.bfloat16},
        statistics_options={"rank": 3},
        progress=False,
    )
    (task,) = measured(folder).tasks
    assert {one.covariance.factor.shape[0] for one in task.inputs.values()} == {3}


def test_quantised_bases_keep_what_tasks_train(place, tmp_path, caplog):
    """In 4 bits, bitsandbytes computes on a CPU with widths from 64 on only."""
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    options = {"model_options": {"quantization_config": quantised}, "progress": False}
    with caplog.at_level("WARNING", "bitsandbytes"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "1", **options)
    assert not [one for one in caplog.messages if "will be cast" in one]
    assert {"model.multi_modal_projector", "model.vision_tower"} <= set(quantised.llm_int8_skip_modules)


def test_the_measured_adapter_goes_to_the_hub(place, tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add("me/colours", place / "colours")
    measure_adapter(
        "me/colours", place / "colours.json", tmp_path / "1", push_to="me/measured", progress=False, max_samples=4
    )
    assert hub.files("me/measured")[STATISTICS] == files(tmp_path / "1")[STATISTICS]


CARD = "---\nlicense: mit\ntags:\n- mine\ndatasets:\n- me/colours-data\n---\n\n# Mine\n\nMind the gap.\n"


@pytest.mark.parametrize("where", ["elsewhere", "in its own folder"])
def test_what_somebody_wrote_in_the_card_stays(place, tmp_path, where):
    source = shutil.copytree(place / "plain", tmp_path / "source")
    (source / "README.md").write_text(CARD)
    output = source if where == "in its own folder" else tmp_path / "measured"
    folder = measure_adapter(
        source, place / "colours.json", output, overwrite=output == source, max_samples=4, progress=False
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.datasets) == ("mit", ["me/colours-data"])
    assert "mine" in card.data.tags
    assert card.text.count("Mind the gap.") == card.text.count("Measured with") == 1
    merge = merge_adapter_files([folder], tmp_path / "merged", progress=False)
    assert ModelCard.load(merge / "README.md").data.datasets == ["me/colours-data"]


def test_a_new_repository_gets_the_card_too(place, tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", hub.token)
    source = shutil.copytree(place / "plain", tmp_path / "source")
    (source / "README.md").write_text(CARD)
    given = {"push_to": "me/measured", "max_samples": 4, "progress": False}
    measure_adapter(source, place / "colours.json", tmp_path / "measured", **given)
    card = ModelCard(hub.files("me/measured")["README.md"].decode())
    assert (card.data.license, card.text.count("Mind the gap.")) == ("mit", 1)
    assert 'PeftModel.from_pretrained(base, "me/measured")' in card.text


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- mit\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read_shows_before_anything_is_measured(place, tmp_path, card):
    source = shutil.copytree(place / "plain", tmp_path / "source")
    (source / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    with pytest.raises(ValueError, match=r"The model card '.*source/README.md', .* cannot be read: .* or remove it\."):
        measure_adapter(source, "nowhere.json", tmp_path / "1", base_model="nowhere")
    assert not (tmp_path / "1").exists()


def test_pushing_without_a_token_is_refused_before_measuring(place, tmp_path, hub):  # noqa: F811
    options = {"push_to": "me/measured", "base_model": "nowhere"}
    with pytest.raises(ValueError, match="'me/measured' needs a token of the Hub: log in by `hf auth login`"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "1", **options)
    assert not hub.requests


def test_where_the_measured_adapter_is_when_it_cannot_be_pushed(place, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(from_data, "push_adapters", fails)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    given = {"push_to": "me/measured", "progress": False, "max_samples": 4}
    with pytest.raises(OSError, match=r"is in '.*kept', but could not be pushed to 'me/measured': no network"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "kept", **given)
    assert STATISTICS in files(tmp_path / "kept")
    with pytest.raises(FileExistsError, match="--overwrite"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "kept", **given)


@pytest.mark.parametrize("path", ["../nowhere/base", "/nowhere/base", "nowhere/base/of/mine"])
def test_a_base_model_that_is_named_by_a_path_is_not_asked_for_on_the_hub(place, tmp_path, path, hub):  # noqa: F811
    moved = shutil.copytree(place / "colours", tmp_path / "moved")
    content = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": path}))
    said = f"There is no folder '{path}', by which the adapter names its base model. .*`--base-model`"
    with pytest.raises(FileNotFoundError, match=said):
        measure_adapter(moved, place / "colours.json", tmp_path / "1", progress=False)
    with pytest.raises(FileNotFoundError, match=f"There is no folder '{path}'\\. If"):
        measure_adapter(moved, place / "colours.json", tmp_path / "1", base_model=path, progress=False)
    assert not hub.requests


def test_a_base_model_of_another_size_is_not_called_a_bug(place, tmp_path):
    config = AutoConfig.from_pretrained(place / "base")
    config.text_config.intermediate_size *= 2
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "other")
    toy.processor("llava").save_pretrained(tmp_path / "other")
    given = {"base_model": tmp_path / "other", "progress": False}
    with pytest.raises(ValueError, match=r"colours does not fit the base model.*size mismatch for"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"data": [{"question": "What?"}]},
            ValueError,
            "cannot be used: it has the columns 'question'",
        ),
        ({"adapter": "nowhere"}, FileNotFoundError, "no folder 'nowhere'"),
        ({"base_model": "nowhere"}, FileNotFoundError, "processor of the base model 'nowhere' cannot be loaded"),
        ({"output_dir": "."}, FileExistsError, "not empty"),
        ({"device": "nonsense"}, ValueError, "`device` 'nonsense' cannot be used here"),
        ({"push_to": "not/a/repository"}, ValueError, "not/a/repository"),
        ({"data": [{"question": "What?", "answer": "x"}], "statistics_options": {"rank": 0}}, ValueError, "rank"),
    ],
)
def test_what_fails_leaves_nothing(place, tmp_path, monkeypatch, change, error, match):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    given = {"adapter": place / "colours", "data": place / "colours.json", "output_dir": "new", **change}
    with pytest.raises(error, match=match):
        measure_adapter(**given, progress=False)
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_an_adapter_may_be_replaced_by_itself_measured(place, tmp_path):
    adapter = shutil.copytree(place / "colours", tmp_path / "own")
    (adapter / "training_args.bin").write_bytes(b"a trainer's")
    before = files(adapter)
    measure_adapter(adapter, place / "colours.json", adapter, overwrite=True, max_samples=4, progress=False)
    assert STATISTICS in files(adapter)
    for name in (WEIGHTS, "training_args.bin"):
        assert files(adapter)[name] == before[name], name


def test_what_cannot_be_measured_shows_before_a_model_is_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModel, "load_on", None)
    given = {"data": place / "colours.json", "output_dir": tmp_path / "new", "progress": False}
    with pytest.raises(ValueError, match=r"colours' is an adapter, not a base model; its base model is '.*base'"):
        measure_adapter(place / "colours", base_model=place / "colours", **given)
    with pytest.raises(ValueError, match=r"base has no adapter_config\.json: it is a whole model"):
        measure_adapter(place / "base", **given)
    bad = shutil.copytree(place / "plain", tmp_path / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    with pytest.raises(ValueError, match="bad trains biases"):
        measure_adapter(bad, **given)


def test_a_single_sample_is_remarked_on(place, tmp_path):
    with pytest.warns(match="The statistics are of a single sample"):
        measure_adapter(place / "colours", place / "colours.json", tmp_path / "1", max_samples=1, progress=False)


def test_four_bits_that_a_cpu_cannot_compute_with_are_refused(place):
    pytest.importorskip("bitsandbytes")
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"width is a multiple of 64; '.*' of the base model has 32"):
        BaseModel(str(place / "base"), None, {}).load_on("cpu", quantization_config=quantised)


def test_prompts_are_read_without_a_copy_of_the_vocabulary_for_each(place):
    model = BaseModel(str(place / "base"), None, {}).load_on("cpu")
    given = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, rows: given.append(rows[0]))
    model.generate(input_ids=torch.ones(3, 4, dtype=torch.long), max_new_tokens=1, do_sample=False)
    assert [(len(rows), rows.is_contiguous()) for rows in given] == [(3, True)]


def test_a_cpu_without_half_precision_is_remarked_on(place, monkeypatch, recwarn):
    base = BaseModel(str(place / "base"), None, {})
    for capability, dtype, remarked in (
        ("AVX2", torch.bfloat16, True),
        ("AVX2", torch.float32, False),
        ("AVX512", torch.bfloat16, False),
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert base.load_on("cpu", dtype=dtype).dtype == dtype
        said = [str(one.message) for one in recwarn]
        assert any("--load-in float32" in one for one in said) == remarked, said
        recwarn.clear()


def test_merges_are_not_measured(place, tmp_path):
    measure_adapter(place / "colours", place / "colours.json", tmp_path / "1", progress=False)
    merge = merge_adapter_files([tmp_path / "1"], tmp_path / "merged", progress=False)
    with pytest.raises(ValueError, match="is a merge"):
        measure_adapter(merge, place / "colours.json", tmp_path / "2", progress=False)
    again = measure_adapter(place / "plain", place / "colours.json", tmp_path / "1", overwrite=True, progress=False)
    assert measured(again).tasks[0].name == "plain"


def test_models_of_text_are_measured_by_their_tokenizer(tmp_path):
    base = tiny.build_text("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer = toy.tokenizer("llava")
    tokenizer.chat_template = TEXT
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "adapter")
    rows = [{"question": "What colour is it ?", "answer": "red"}] * 5
    folder = measure_adapter(tmp_path / "adapter", rows, tmp_path / "measured", progress=False)
    (task,) = measured(folder).tasks
    assert (task.samples, task.instructions.count) == (5, 5)
