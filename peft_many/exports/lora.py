"""A plain LoRA of the language model: what vLLM, SGLang, LMDeploy and stock PEFT load without this package."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ..algebra.reduction import padded
from ..files.adapter import Adapter, read_adapter
from ..files.atomic import new_folder
from ..files.stored_delta import KEY_PREFIX, UnmergeableAdapterError
from ..hub.sources import find_adapter
from ..merging.prepare import AdapterPath
from .result import Export, read_pairs, with_names_of, write_card

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for `max_lora_rank`

_USAGE = """from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/adapter")
"""


def export_lora(
    adapter: AdapterPath,
    output_dir: str | os.PathLike[str],
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Export:
    """Write a merge or an adapter as a plain PEFT LoRA, which loads without this package.

    Every layer has the same rank, the smallest that vLLM knows and that all fit in (8, 16, 32, 64, 128, 256, 320,
    512), filled up with zeros, and a scaling of one. No base model is loaded. On text the outputs are those of the
    adapter. The projectors stay behind: images are seen through the base model's.

    Args:
        adapter (`str`): The folder or Hub id of a merge, or of one task's adapter.
        output_dir (`str`): The folder to create; it must not exist, or be empty.
        token (`str` or `bool`, *optional*): As in [`~huggingface_hub.snapshot_download`], like the next two.
        cache_dir (`str`, *optional*): Where Hub downloads are kept.
        local_files_only (`bool`, defaults to `False`): Use only what is in the cache.

    Returns:
        [`Export`]: The folder, and what is lost.

    Raises:
        UnmergeableAdapterError: It is no additive LoRA, or a rank is above 512.
        AdapterNotFoundError, StatisticsError, FileExistsError: As in [`merge_adapter_files`].
    """
    source = find_adapter(adapter, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    read = with_names_of(read_adapter(source), None)
    pairs = read_pairs(read)
    largest = max(A.shape[0] for A, _ in pairs.values())
    rank = next((served for served in SERVED_RANKS if served >= largest), None)
    if rank is None:
        raise UnmergeableAdapterError(
            f"{source.name} has layers of rank {largest}, and vLLM serves at most {SERVED_RANKS[-1]}: merge it again "
            f"with `rank={SERVED_RANKS[-1]}` or less."
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the scaling is folded into the weights
        target_modules=sorted(pairs),
        fan_in_fan_out=bool(getattr(read.config, "fan_in_fan_out", False)),
        task_type=read.config.task_type,
        base_model_name_or_path=read.config.base_model_name_or_path,
        revision=read.config.revision,
        inference_mode=True,
    )
    config.target_modules = sorted(pairs)  # a set would be saved in another order by every process
    tensors = {}
    for module, (A, B) in pairs.items():
        wide_A, wide_B = padded(A, B, rank)
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = wide_A.contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = wide_B.contiguous()
    notes = _notes(read, rank, pairs[next(iter(pairs))][0].dtype)
    output = Path(output_dir).expanduser()
    with new_folder(output) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)
        title = f"A LoRA of {len(read.tasks)} task{'s' if len(read.tasks) > 1 else ''}"
        base = read.config.base_model_name_or_path
        write_card(folder, title, read, base, _USAGE, notes, library_name="peft")
    return Export(output, notes)


def _notes(adapter: Adapter, rank: int, dtype: torch.dtype) -> list[str]:
    notes = [f"All layers have rank {rank} (vLLM: `max_lora_rank={rank}`), in {str(dtype).removeprefix('torch.')}."]
    if any(task.projectors for task in adapter.tasks):
        notes.append(
            "The tasks' projectors are not in it: outputs are the adapter's on text, and images are seen through the "
            "base model's projector."
        )
    if adapter.is_gated:
        notes.append("It is the merged LoRA for all inputs; images choose no task's own any more (`gate_lora`).")
    return notes
