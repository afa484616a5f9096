"""`measure_adapter`: from an adapter and its task's data to the same adapter with statistics, without a loader."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]
from typing_extensions import Unpack

from ..data.batches import ChatCollator, batches, for_model
from ..data.reading import read_examples
from ..files.adapter import check_can_be_merged
from ..files.atomic import new_folder
from ..files.card import copy_card
from ..files.source import AdapterSource, read_config
from ..hub.base_model import BaseModel
from ..hub.llava_checkpoint import PROJECTOR_WEIGHTS_NAME, import_llava_checkpoint
from ..hub.loading import put_on
from ..hub.pushing import push_adapters
from ..hub.sources import HubArguments, find_adapter, replaceable_files
from ..records import merge_of
from .collect import collect_statistics


def measure_adapter(
    adapter: str | os.PathLike[str],
    data: Any,
    output_dir: str | os.PathLike[str],
    *,
    task_name: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    processor: Any = None,
    split: str = "train",
    images: str | os.PathLike[str] | None = None,
    system: str | None = None,
    max_samples: int = 256,
    batch_size: int = 4,
    seed: int = 0,
    device: str | torch.device | None = None,
    model_options: Mapping[str, Any] | None = None,
    statistics_options: Mapping[str, Any] | None = None,
    push_to: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Measure an adapter on data of its task, and write it with its statistics: what merging it well needs.

    Loads the base model that the adapter names, makes batches of the data by the processor's chat template, with
    labels on the answers, and calls [`collect_statistics`]. The adapter may be of any type that can be merged, a plain
    [`~peft.LoraConfig`] one say; its weights, and what you wrote in its model card, stay as they are. Nothing is
    written unless all goes well.

    Args:
        adapter (`str` or `os.PathLike`):
            A folder or a Hub id (`"me/clevr"`, `"me/clevr@revision"`); or the folder of a checkpoint of the LLaVA
            repository, which does not say which `base_model` of transformers it is of.
        data (`str`, `os.PathLike` or `Iterable`):
            What the adapter was trained on, or like it: a file of conversations or questions (`.json`, `.jsonl`,
            `.parquet`, `.csv`), a folder or Hub id that `datasets` reads, a `datasets.Dataset`, or rows
            (docs/how-to/measure.md).
        output_dir (`str` or `os.PathLike`): The folder to write.
        task_name (`str`, *optional*):
            What to call the task in merges. Defaults to the adapter's own, or else to the name of its folder.
        base_model (`str` or `os.PathLike`, *optional*): Another base model than the one that the adapter names.
        processor (`transformers.ProcessorMixin`, *optional*): Another one than the base model's.
        split (`str`, defaults to `"train"`): Which part of a data set that has several; files are read whole.
        images (`str` or `os.PathLike`, *optional*): The folder that names of images in a file begin at.
        system (`str`, *optional*):
            The system prompt that the adapter was trained with, if the chat template does not put it there.
        max_samples (`int`, defaults to 256): How many answers to measure on, of rows chosen at random.
        batch_size (`int`, defaults to 4): Conversations in one forward pass.
        seed (`int`, defaults to 0): Fixes which rows.
        device (`str` or `torch.device`, *optional*): Where to run. Defaults to the accelerator, or else the CPU.
        model_options (`Mapping`, *optional*):
            Goes to the base model's `from_pretrained`: `{"quantization_config": BitsAndBytesConfig(...)}` say.
        statistics_options (`Mapping`, *optional*): Goes to [`collect_statistics`]: `{"rank": 128}` say.
        push_to (`str`, *optional*):
            A Hub repository that the measured adapter goes to as well. One that does not exist is created, as
            everybody's to read.
        overwrite (`bool`, defaults to `False`): Replace an adapter that is in `output_dir`, be it the one measured.
        progress (`bool`, defaults to `True`): Show a progress bar.
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`merge_adapter_files`].

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The data are in no format that is known, the adapter is a merge, or the processor has no chat
            template; nobody is logged in to push; all that [`collect_statistics`] raises.
        FileNotFoundError: The adapter, its base model, the data or an image are not there.
        UnmergeableAdapterError: The adapter cannot be merged.
        FileExistsError: The output folder is there already.
        OSError: The adapter was measured and written, but could not be pushed.
        ImportError: The data are read by `datasets`, which is not installed.

    Example:

        ```py
        >>> from peft_many import measure_adapter

        >>> rows = [{"image": "red.png", "question": "What colour is it ?", "answer": "red"}]
        >>> measure_adapter("clevr", rows, "measured", base_model="base", progress=False)
        PosixPath('measured')
        ```
    """
    folder = Path(output_dir).expanduser()
    replaced = replaceable_files(folder, overwrite)
    if push_to is not None:
        # Now, and not when all is measured.
        validate_repo_id(push_to)
        if not isinstance(hub.get("token"), str) and get_token() is None:
            raise ValueError(
                f"Pushing to '{push_to}' needs a token of the Hub: log in by `hf auth login`, or set HF_TOKEN."
            )
    found = find_adapter(adapter, **hub)
    with new_folder(folder, replaced) as partial, _as_adapter(found, base_model) as source:
        config = read_config(source)
        if merge_of(config) is not None:
            raise ValueError(f"{source.name} is a merge and holds its tasks' statistics; only adapters are measured.")
        # Files are read before the model is: what is missing shows at once.
        check_can_be_merged(source)
        copy_card(found.folder, partial)
        examples = read_examples(data, split=split, images=images, limit=max_samples, seed=seed)
        base = BaseModel.of(base_model, config, hub)
        collator = ChatCollator(base.load_processor() if processor is None else processor, system)
        collator.check(examples)
        model = put_on(base.load_on(device, **(model_options or {})), source)
        own = model.peft_config["default"]
        own.task_name = task_name or getattr(own, "task_name", None) or source.short_name
        collect_statistics(
            model,
            (for_model(batch, model) for batch in batches(examples, collator.training, batch_size)),
            **{"max_samples": max_samples, "progress": progress, **(statistics_options or {})},
        )
        model.save_pretrained(str(partial))
    if push_to is not None:
        try:
            push_adapters(model, push_to, token=hub.get("token"), first_card=found.folder)
        except (OSError, httpx.HTTPError) as error:
            raise OSError(
                f"The measured adapter is in '{folder}', but could not be pushed to '{push_to}': {error}"
            ) from error
    return folder


@contextmanager
def _as_adapter(source: AdapterSource, base_model: Any) -> Iterator[AdapterSource]:
    """An adapter as PEFT has them: a checkpoint of the LLaVA repository is imported for the time being."""
    if not (source.folder / PROJECTOR_WEIGHTS_NAME).is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as place:
        base = None if base_model is None else str(base_model)
        adapter = Path(place, "adapter")
        import_llava_checkpoint(source.folder, adapter, task_name=source.short_name, base_model=base)
        yield AdapterSource(adapter, source.name)
