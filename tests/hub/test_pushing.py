"""The card that saving writes reaches the Hub, with what the user wrote there; transformers alone would lose it."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from peft_many import MAnyConfig
from tests import tiny
from tests.hub_server import StandInHub, talk_to


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with StandInHub() as server:
        talk_to(server, monkeypatch, tmp_path)
        yield server


def adapter(name: str = "default", config=None) -> PeftModel:
    return get_peft_model(tiny.build_text("llama"), config or MAnyConfig(r=2, task_name="clevr"), adapter_name=name)


def card_of(hub: StandInHub, repo: str, folder: str = "") -> ModelCard:
    return ModelCard(hub.files(repo)[f"{folder}README.md"].decode())


def test_a_push_brings_the_card(hub):
    adapter().push_to_hub("me/clevr", token=hub.token, tags=["mine"])
    card = card_of(hub, "me/clevr")
    assert card.data.library_name == "peft"
    assert {"peft-many", "mine"} <= set(card.data.tags)
    assert 'PeftModel.from_pretrained(base, "me/clevr")' in card.text


def test_the_words_of_the_repository_stay(hub):
    model = adapter()
    model.push_to_hub("me/clevr", token=hub.token)
    mine = card_of(hub, "me/clevr")
    mine.text += "\nMind the gap.\n"
    mine.data.license = "mit"
    mine.data.tags = ["of my own", "base_model:adapter:me/older"]
    hub.repositories["me/clevr"].commit({**hub.files("me/clevr"), "README.md": str(mine).encode()})
    model.push_to_hub("me/clevr", token=hub.token, commit_message="again")
    card = card_of(hub, "me/clevr")
    assert card.text.count("Mind the gap.") == 1
    assert card.text.count("import peft_many") == 1
    assert card.data.license == "mit"
    assert {"of my own", "peft-many"} <= set(card.data.tags)
    assert "base_model:adapter:me/older" not in card.data.tags


def test_a_push_to_a_branch_and_of_an_adapter_in_a_subfolder(hub):
    adapter("other").push_to_hub("me/named", token=hub.token, revision="v2", private=True)
    repository = hub.repositories["me/named"]
    assert repository.private
    files = repository.commits[repository.branches["v2"]]
    assert 'from_pretrained(base, "me/named", subfolder="other")' in files["other/README.md"].decode()
    assert "other/adapter_config.json" in files


def test_a_push_as_a_pull_request(hub):
    model = adapter()
    model.push_to_hub("me/clevr", token=hub.token)
    before = hub.files("me/clevr")
    asked = model.push_to_hub("me/clevr", token=hub.token, create_pr=True, commit_message="mine", tags=["new"])
    assert asked.pr_url.endswith("/discussions/1")
    assert hub.files("me/clevr") == before
    assert (
        b"- new"
        in hub.repositories["me/clevr"].commits[hub.repositories["me/clevr"].branches["refs/pr/1"]]["README.md"]
    )


def test_other_types_are_pushed_as_ever(hub):
    adapter(config=LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub("me/lora", token=hub.token)
    # The blank card that makes `keep_cards` necessary. When this fails, it may have become superfluous.
    assert card_of(hub, "me/lora").data.library_name == "transformers"


def test_the_card_that_trainer_makes_has_our_part(tmp_path):
    from transformers import Trainer

    model = adapter()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    trainer.save_model()
    trainer.create_model_card(model_name="clevr")
    assert "import peft_many" in (tmp_path / "README.md").read_text()
