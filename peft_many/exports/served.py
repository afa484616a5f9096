"""Whether a server would use all of a LoRA: it may leave out layers that it does not know, without a word."""

from __future__ import annotations

from ..families.parts import parts_of
from ..files.adapter import Adapter
from ..files.errors import UnmergeableAdapterError
from ..files.older_names import with_current_names
from ..hub.base_model import BaseModel

SERVERS = ("vllm",)


def as_served(adapter: Adapter, base: BaseModel) -> Adapter:
    """The adapter with the names that its layers have in the base model, of which only the config is read.

    An `UnmergeableAdapterError` names a layer that the model does not have, or that is outside its language model.
    """
    model = base.empty()
    (adapter,) = with_current_names([adapter], model)
    parts = parts_of(model)
    inside = "" if parts is None or parts.language_model is None else f"{parts.language_model}."
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    adapted = [*adapter.pairs, *(name for task in adapter.tasks for name in task.deltas)]
    stray = next((name for name in adapted if not name.startswith(inside) and name not in head), None)
    if stray is not None:
        raise UnmergeableAdapterError(
            f"The layer '{stray}' is outside the language model '{inside[:-1]}', where vLLM ignores a LoRA silently "
            "(unless it has `--enable-tower-connector-lora`, with which it routes no projectors): serve a folded "
            "model (`export_model`)."
        )
    return adapter
