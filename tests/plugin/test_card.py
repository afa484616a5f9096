"""The model card: says how to load the adapter, keeps what a user wrote, and is renewed in place."""

from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_many import MAnyConfig
from tests import tiny

TASK = {"name": "clevr", "source": "me/clevr", "revision": "abc", "weight": 1.0, "sha256": "0123456789abcdef"}


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
    MAnyConfig(tasks=[TASK], base_model_name_or_path="me/base").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "me/base"
    assert {"mine", "merge"} <= set(card.data.tags)
    assert card.text.count("import peft_many") == 1
    assert "Handle with care." in card.text
    assert "| clevr | me/clevr | abc | 1 | 0123456789ab |" in card.text
