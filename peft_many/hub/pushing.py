"""Keeps our part of a model card on its way to the Hub, where transformers would put a blank card in its place."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..files.card import CARD_NAME, copy_card, update_card
from ..files.upstream import wrap_method
from ..tuner.config import MAnyConfig


def keep_cards() -> None:
    """Let the two methods of [`~peft.PeftModel`] that write over a card keep it. Again, it changes nothing."""
    wrap_method(PeftModel, "push_to_hub", _push_to_hub)
    wrap_method(PeftModel, "create_or_update_model_card", _create_or_update_model_card)


def _create_or_update_model_card(create: Callable[..., None], model: PeftModel, output_dir: str) -> None:
    """`PeftModel.create_or_update_model_card`, with our part of the card."""
    folders, card = _folders(model, output_dir), Path(output_dir, CARD_NAME)
    tags = ModelCard.load(card).data.tags if folders and card.is_file() else None
    create(model, output_dir)
    if tags:  # in whose place PEFT puts its own, one of which names the base model
        _add_tags(card, (tag for tag in tags if not tag.startswith("base_model:")))
    for name, folder in folders.items():
        if (folder / CONFIG_NAME).is_file():  # else saving is about to write both
            update_card(folder, model.peft_config[name])


def _add_tags(path: Path, tags: Iterable[str]) -> None:
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), *tags})
    card.save(path)


def _push_to_hub(push: Callable[..., Any], model: PeftModel, repo_id: str, **kwargs: Any) -> Any:
    """`PeftModel.push_to_hub`, which leaves adapters of other types to PEFT."""
    return (push_adapters if _folders(model, "") else push)(model, repo_id, **kwargs)


def _folders(model: PeftModel, folder: str) -> dict[str, Path]:
    """Where PEFT saves a model's adapters of our type, and others that were measured."""
    ours = [
        name
        for name, config in model.peft_config.items()
        if isinstance(config, MAnyConfig) or getattr(config, "statistics", None) is not None
    ]
    return {name: Path(folder, "" if name == "default" else name) for name in ours}


def push_adapters(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    first_card: Path | None = None,
    **kwargs: Any,
) -> Any:
    """What `push_to_hub` says it does, with the card that saving writes, into that of the repository.

    In a repository without a card, the folder `first_card` has the one to write into.
    """
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):  # of a new repository or branch
            card = hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
            shutil.copyfile(card, Path(folder, CARD_NAME))
        if first_card is not None and not Path(folder, CARD_NAME).is_file():
            copy_card(first_card, Path(folder))
        model.save_pretrained(folder, **kwargs)
        for name, adapter in _folders(model, folder).items():
            update_card(adapter, model.peft_config[name], repo_id, None if name == "default" else name)
        if tags:
            _add_tags(Path(folder, CARD_NAME), tags)
        if revision is not None and not revision.startswith("refs/pr"):
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
