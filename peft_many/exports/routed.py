"""A folded model that keeps routing: a transformers model with an adapter inside that holds the projectors alone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import AutoConfig, PreTrainedModel
from typing_extensions import Unpack

from ..algebra.precision import without_autocast
from ..files.adapter import Adapter, read_adapter
from ..files.older_names import with_current_names
from ..files.source import write_adapter
from ..files.tensor_keys import KEY_PREFIX
from ..hub.base_model import BaseModel, model_class
from ..hub.sources import HubArguments, find_adapter
from ..merging.arguments import output_folder
from ..merging.prepare import AdapterPath
from ..records import GATES, ROUTED_PREFIX, MergeRecord
from ..records.options import IMAGES
from ..tuner.config import MAnyConfig
from .base_model import fold
from .export import Export, export_folder, notes_on_gate, write_card

_USAGE = """```python
import peft_many  # pip install peft-many

model = peft_many.load_routed_model(".")  # this folder, or its id on the Hub
```"""


@without_autocast()
def export_routed_model(
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    **hub: Unpack[HubArguments],
) -> Export:
    """Fold a merge into its base model and write one folder with everything, which goes on routing images.

    The LoRAs are in the weights and cost nothing any more; the tasks' projectors and prototypes lie beside them as an
    adapter without LoRA. [`load_routed_model`] gives the model back. The folder is of no use for merging further.
    The whole base model is loaded into memory, as in [`export_model`].

    Args:
        adapter (`str`): The folder or Hub id of a merge with routed projectors.
        output_dir (`str`): As in [`export_model`], like the others.
        base_model (`str`, *optional*): Folder or Hub id.
        dry_run (`bool`, defaults to `False`):
            Check all that can be checked without the base model's weights, and write nothing.
        **hub: `token`, `cache_dir` and `local_files_only`.

    Returns:
        [`Export`]: The folder, and what is lost.

    Raises:
        ValueError: There is nothing to route. Other errors are those of [`export_model`].

    Example:

        ```py
        >>> from peft_many import export_routed_model, load_routed_model

        >>> exported = export_routed_model("merged", "routed", base_model="base")
        >>> model = load_routed_model("routed")
        ```
    """
    output = output_folder(output_dir, [adapter, base_model])
    source = find_adapter(adapter, **hub)
    read = read_adapter(source)
    if read.merge is None or not read.merge.routing:
        raise ValueError(f"{source.name} routes no projector: `export_model` (`--format model`) keeps what it has.")
    base = BaseModel.of(base_model, read.config, hub)
    with export_folder(output, dry_run) as folder:
        model = base.empty() if dry_run else base.load()
        (renamed,) = with_current_names([read], model)
        folded = fold(model, renamed)
        if not dry_run:
            folded.save_pretrained(folder)
            _rename_architecture(folder)
            _save_projectors(read, read.merge, folder)
        notes = [
            "Loads only with peft_many, in transformers and in vLLM. Other programs do not know the architecture; "
            "read as a plain model, it would use the base model's projector for images.",
            *notes_on_gate(read),
            *base.copy_tokenizer(folder),
        ]
        title = "A model with {tasks} folded in and routed projectors"
        write_card(folder, title, read, base.name, _USAGE, notes, library_name="peft")
    return Export(output, notes)


def load_routed_model(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load what [`export_routed_model`] wrote.

    Args:
        folder (`str`): The folder, or a Hub id that it was uploaded to.
        revision (`str`, *optional*): On the Hub.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.
        **kwargs (`Any`): `dtype`, `device_map` and others of [`~transformers.PreTrainedModel.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]: The model in evaluation mode, its projectors routed.

    Raises:
        ValueError: It is no such export.

    Example:

        ```py
        >>> from peft_many import export_routed_model, load_routed_model

        >>> exported = export_routed_model("merged", "routed", base_model="base")
        >>> type(load_routed_model("routed", dtype="bfloat16")).__name__
        'LlavaForConditionalGeneration'
        ```
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        place = Path(
            snapshot_download(
                str(folder), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
        )
    if not (place / CONFIG_NAME).is_file() or not (place / "config.json").is_file():
        raise ValueError(f"'{folder}' is no model that `export_routed_model` wrote.")
    config = AutoConfig.from_pretrained(place)
    config.architectures = [name.removeprefix(ROUTED_PREFIX) for name in config.architectures or []]
    kind = model_class(config, str(folder))
    # Transformers finds the adapter beside the weights by itself, and puts it in.
    model: PreTrainedModel = kind.from_pretrained(place, **kwargs)
    return model.eval()


def without_gate(merge: MergeRecord) -> MergeRecord:
    """The record of the same merge without `gate_lora`; the routing stays."""
    above = merge.options.abstain_above if merge.options.router == "gaussian" else None  # or else of instructions
    options = replace(merge.options, gate_lora=False, gate_by=None, route_by=None, abstain_above=above)
    # What went by instructions goes by images now, of which the record says nothing.
    expected = {name: it for name, it in merge.expected_routing.items() if name != GATES and it.by == IMAGES}
    return replace(
        merge, options=options, instructions=None, expected_routing=expected, task_ranks=None, task_rank_pattern={}
    )


def _rename_architecture(folder: Path) -> None:
    """Say in the config that it is no plain model: servers read the weights and know nothing of the adapter inside."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [f"{ROUTED_PREFIX}{name}" for name in config["architectures"]]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_projectors(adapter: Adapter, merge: MergeRecord, folder: Path) -> None:
    """The merge's projectors, prototypes and routing as an adapter that has no LoRA layers."""
    weights = adapter.files[0]
    names = sorted(merge.routing)
    within = tuple(f"{KEY_PREFIX}{name}." for name in names)
    config = MAnyConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=names,
        projector_modules=list(names),
        inference_mode=True,
        # Not the base model's name: an adapter's base is what it is loaded onto where its folder cannot be seen.
        base_model_name_or_path=None,
        merge=without_gate(merge),
    )
    write_adapter(folder, config, {key: weights[key] for key in sorted(weights) if key.startswith(within)})
