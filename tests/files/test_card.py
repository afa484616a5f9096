"""The model card: says how to load the adapter, keeps what a user wrote, and is renewed in place."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from peft_many import MAnyConfig, add_task, merge_adapter_files, merge_report, remove_task
from peft_many.files.card import data_sets_of, update_card
from peft_many.records import MergeOptions, MergeRecord, Origin, TaskRecord
from tests import new_process, tiny
from tests.adapters import make

ORIGIN = Origin("0123456789abcdef", "me/clevr", "abc")
MERGE = MergeRecord(MergeOptions().filled_in([]), [TaskRecord("clevr", 1.0, ORIGIN, samples=3)])


def test_a_saved_adapter_s_card_says_what_to_import(tmp_path):
    model = get_peft_model(tiny.build_text("llama"), MAnyConfig(r=2, task_name="clevr"))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert {"lora", "peft-many"} <= set(card.data.tags)
    assert "import peft_many" in card.text
    assert "“clevr”" in card.text


def test_the_users_words_stay_and_ours_come_once(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: peft\nlicense: mit\ntags: [mine]\n---\n# My adapter\n\nHandle with care.\n"
    )
    MAnyConfig().save_pretrained(tmp_path)
    MAnyConfig(merge=MERGE, base_model_name_or_path="me/base").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "me/base"
    assert {"mine", "merge"} <= set(card.data.tags)
    assert card.text.count("import peft_many") == 1
    assert "Handle with care." in card.text
    assert "| clevr | me/clevr | abc | 1 | 3 | 0 | 0123456789ab |" in card.text


def snippet(folder: Path) -> str:
    return re.search(r"```python\n(.*?\n)```", (folder / "README.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    tiny.build("llava").save_pretrained(root / "base model")
    adapters = []
    for seed, name in enumerate(("clevr", "iconqa")):
        adapters.append(make(root / name, seed=seed).folder)
        card = ModelCard.load(adapters[-1] / "README.md")
        card.data.datasets = [f"me/{name}", "me/both"]
        card.save(adapters[-1] / "README.md")
    return merge_adapter_files(adapters, root / "merged", progress=False)


def test_the_card_of_a_merge_tells_what_it_is_made_of(merged):
    card = ModelCard.load(merged / "README.md")
    assert card.data.datasets == ["me/both", "me/clevr", "me/iconqa"]
    assert card.data.pipeline_tag == "image-text-to-text"
    lost = merge_report(merged, conflicts=False, progress=False).interference
    for task in ("clevr", "iconqa"):
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {task} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        header = next(line for line in card.text.splitlines() if line.startswith("| task |"))
        found = dict(zip([name.strip() for name in header.strip("|").split("|")], cells))
        assert found["samples"] == "4"
        assert int(found["images"]) > 0
        assert "peft_type MANY, r " in found["adapter"]
        assert float(found["interference"]) == pytest.approx(lost[task], abs=1e-3)
        assert float(found["interference"]) > 0.01
    assert (
        "1. merge: clevr, iconqa (dtype float32, method lpm, projectors routed, ridge 0.0001, router cosine"
        in card.text
    )
    assert "Expected routing of images at 'model.multi_modal_projector': 100 % go to their own task" in card.text
    assert "| images of | clevr | iconqa |\n| --- | --- | --- |\n| clevr | 1.00 | 0.00 |" in card.text
    assert "Saved by peft_many" in card.text


def test_the_example_in_a_card_runs(merged, tmp_path):
    """In a new process, in the adapter's folder, with the base model that the config names."""
    config = MAnyConfig.from_pretrained(merged)
    config.base_model_name_or_path = str(merged.parent / "base model")
    update_card(merged, config)
    assert "from transformers import LlavaForConditionalGeneration" in snippet(merged)
    code = snippet(merged) + "assert model.peft_config['default'].is_merge\n"
    done = new_process.run(code, cwd=merged, environment={"PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_was_done_is_told_in_its_order(merged, tmp_path):
    more = make(tmp_path / "vizwiz", seed=2).folder
    added = add_task(merged, more, tmp_path / "added", progress=False)
    left = remove_task(added, "clevr", tmp_path / "left", progress=False)
    lines = re.findall(r"^1\. (.*?) \(", (left / "README.md").read_text(), re.MULTILINE)
    assert lines == ["merge: iconqa, 1 since forgotten", "add: vizwiz", "remove: 1 since forgotten"]
    assert "clevr" not in (left / "README.md").read_text()
    assert ModelCard.load(left / "README.md").data.datasets == ["me/both", "me/iconqa"]


def test_a_measured_adapter_of_another_type_says_that_it_is_measured(tmp_path):
    made = make(
        tmp_path / "lora", kind=LoraConfig, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]
    )
    card = ModelCard.load(made.folder / "README.md")
    assert "Measured with `peft_many`" in card.text
    assert "statistics were measured on 4 samples with 4 images" in card.text
    assert "import peft_many" not in snippet(made.folder)  # it loads without
    assert "PeftModel.from_pretrained(base, " in snippet(made.folder)
    assert card.data.library_name == "peft"


def test_a_long_name_does_not_flood_the_table(tmp_path):
    MAnyConfig(merge=replace(MERGE, tasks=[replace(MERGE.tasks[0], name="clevr" * 60)])).save_pretrained(tmp_path)
    assert "| clevrclevrclevrclevrclevrcl…vrclevrclevr | me/clevr |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        "no metadata",
        "---\n- a list\n---\n",
        "---\ndatasets: [1, {a: b}, '../../x', '<b>', 'a b']\n---\n",
        "---\ndatasets: !!python/object/apply:os.system ['false']\n---\n",
        "---\na: &a [1,1]\nb: &b [*a,*a]\ndatasets: [*b, *b]\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\ndatasets: me/one\n---\n" + "x" * (1 << 20),
        b"\xff\xfe\x00",
    ],
)
def test_cards_that_say_nothing_useful_of_data_sets(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert data_sets_of(tmp_path) == []


def test_words_of_a_config_do_not_become_code(tmp_path):
    hostile = {"base_model_class": "os; import os", "parent_library": "transformers.models.llava"}
    elsewhere = {"base_model_class": "Popen", "parent_library": "subprocess"}
    for mapping in (hostile, elsewhere):
        name = 'x"); import os; ("\n```\n# Big'
        MAnyConfig(auto_mapping=mapping, base_model_name_or_path=name).save_pretrained(tmp_path)
        code = snippet(tmp_path)
        compile(code, "card", "exec")
        assert "import AutoModelForCausalLM" in code
        assert sum("import os" in line for line in code.splitlines()) == 1  # inside the string
        assert "# Big" not in (tmp_path / "README.md").read_text().splitlines()
