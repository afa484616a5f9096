"""`refit_merge_files`: a merge in a folder or on the Hub is refitted and written, without a loader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from typing_extensions import Unpack

from ..data.batches import ChatCollator, batches, for_model
from ..data.reading import read_examples
from ..files.atomic import new_folder
from ..hub.base_model import BaseModel
from ..hub.loading import put_on
from ..hub.sources import HubArguments, find_adapter, replaceable_files
from .calibration import check_can_be_refitted, check_numbers
from .refit import DEFAULT_REFIT_RIDGE, refit_merge


def refit_merge_files(
    merge: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    data: Mapping[str, Any] | None = None,
    *,
    ridge: float = DEFAULT_REFIT_RIDGE,
    rank: int | None = None,
    max_samples: int = 128,
    weigh_tokens: bool = True,
    base_model: str | os.PathLike[str] | None = None,
    processor: Any = None,
    split: str = "train",
    images: str | os.PathLike[str] | None = None,
    system: str | None = None,
    batch_size: int = 4,
    seed: int = 0,
    device: str | torch.device | None = None,
    model_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> Path:
    """Refit a merge by [`refit_merge`], on data of its tasks or on what their adapters kept, and write it.

    Loads the base model that the merge names. Nothing is written unless all goes well. Arguments that are not listed
    are as in [`measure_adapter`], and `ridge`, `rank` and `weigh_tokens` as in [`refit_merge`].

    Args:
        merge (`str` or `os.PathLike`): A merge: a folder or a Hub id.
        output_dir (`str` or `os.PathLike`): The folder to write.
        data (`Mapping[str, Any]`, *optional*):
            By task, samples of it, in any form that [`measure_adapter`] takes. Without it samples are imagined, from
            prompts that the tasks' adapters kept (`keep_prompts`).
        max_samples (`int`, defaults to 128): Of each task, of rows chosen at random.
        overwrite (`bool`, defaults to `False`): Replace an adapter that is in `output_dir`, be it the merge itself.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: The adapter is no merge with statistics, or has gates; or the data do not fit its tasks.
        FileNotFoundError: The merge, its base model, the data or an image are not there.
        FileExistsError: The folder holds something that may not be replaced.

    Example:

        ```py
        >>> from peft_many import refit_merge_files

        >>> rows = [{"image": "red.png", "question": "What colour is it ?", "answer": "red"}]
        >>> data = {"clevr": rows, "iconqa": rows}
        >>> refit_merge_files("merged", "refitted", data, base_model="base", progress=False)
        PosixPath('refitted')
        ```
    """
    check_numbers(ridge, rank, max_samples)
    folder = Path(output_dir).expanduser()
    with new_folder(folder, replaceable_files(folder, overwrite)) as partial:
        source = find_adapter(merge, **hub)
        config = PeftConfig.from_pretrained(str(source.folder))
        # Files are read before the model is: what is missing shows at once.
        check_can_be_refitted(config, source.name, data, "data")
        examples = {
            task: read_examples(rows, split=split, images=images, limit=max_samples, seed=seed)
            for task, rows in (data or {}).items()
        }
        base = BaseModel.of(base_model, config, hub)
        collator = None
        if examples:
            collator = ChatCollator(base.load_processor() if processor is None else processor, system)
            collator.check([example for some in examples.values() for example in some])
        model = put_on(base.load_on(device, **(model_options or {})), source)
        calibration = None
        if collator is not None:
            calibration = {
                task: [for_model(batch, model) for batch in batches(some, collator.training, batch_size)]
                for task, some in examples.items()
            }
        refit_merge(
            model,
            calibration,
            ridge=ridge,
            rank=rank,
            max_samples=max_samples,
            weigh_tokens=weigh_tokens,
            progress=progress,
        )
        model.save_pretrained(str(partial))
    return folder
