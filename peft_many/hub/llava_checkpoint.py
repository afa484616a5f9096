"""Importing task checkpoints of the LLaVA repository: their names for the modules become transformers' names.

Such a checkpoint is what `llava/train/train.py` of github.com/haotian-liu/LLaVA writes with LoRA, and the benchmarks
built on it do (MCITlib, CoIN, MLLM-CL): the LoRA weights, and apart from them the projector that was trained whole.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..algebra.precision import without_autocast
from ..files.adapter import read_adapter
from ..files.atomic import new_folder
from ..files.mergeable import check_mergeable
from ..files.patterns import ByPattern, check_patterns, exceptions_by_pattern
from ..files.peft_methods import described, is_plain_lora
from ..files.source import AdapterSource, read_config, write_adapter
from ..files.tensor_keys import KEY_PREFIX
from ..records.words import quoted
from ..tuner.config import MAnyConfig
from .sources import first_line

PROJECTOR_WEIGHTS_NAME = "non_lora_trainables.bin"
LANGUAGE_MODEL, PROJECTOR = "model.language_model", "model.multi_modal_projector"

_LORA = re.compile(r"base_model\.model\.(model\.(layers\.\d+\.[\w.]+))\.lora_([AB])\.weight")
# With the prefixes that the repository itself takes off when it loads the file.
_PROJECTOR = re.compile(r"(?:base_model\.)?(?:model\.){0,2}mm_projector\.([02])\.(weight|bias)")
_PROJECTOR_LAYERS = {"0": "linear_1", "2": "linear_2"}  # an `mlp2x_gelu` is Linear, GELU, Linear


@without_autocast()
def import_llava_checkpoint(
    folder: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    task_name: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Turn a LoRA checkpoint of the LLaVA repository into an adapter for transformers' LLaVA.

    Reads `adapter_config.json`, `adapter_model.bin` (or `.safetensors`) and `non_lora_trainables.bin`, and writes an
    adapter folder with the same weights, bit by bit, that loads with `PeftModel.from_pretrained` on
    [`~transformers.LlavaForConditionalGeneration`] (`"llava-hf/llava-1.5-7b-hf"` for `liuhaotian/llava-v1.5-7b`). It
    is written whole or not at all. Pickles are opened with `torch.load(..., weights_only=True)`: nothing is executed.

    Such checkpoints come without statistics: measure the adapter on its task's data ([`measure_adapter`], which takes
    the checkpoint itself too).

    Args:
        folder (`str`):
            The checkpoint. For one on the Hub, what [`~huggingface_hub.snapshot_download`] returns.
        output_dir (`str`):
            The folder to create; it must not exist, or be empty.
        task_name (`str`, *optional*):
            What to call the task in merges. Defaults to the name of `folder`.
        base_model (`str`, *optional*):
            The transformers checkpoint that the adapter belongs on, noted in its config. The LLaVA repository's own
            name is not taken over, as transformers cannot load that model.

    Returns:
        `Path`: The folder.

    Raises:
        FileNotFoundError: The checkpoint lacks a file.
        FileExistsError: The output folder exists and is not empty.
        ValueError: A file is damaged or holds more than tensors, a tensor belongs to no module of transformers' LLaVA
            or does not fit the others, or the checkpoint is no plain LoRA.

    Example:

        ```py
        >>> from peft_many import import_llava_checkpoint

        >>> import_llava_checkpoint("Task4_llava_lora", "charts", task_name="charts").name
        'charts'
        ```
    """
    source, output = Path(folder).expanduser(), Path(output_dir).expanduser()
    settings = _read_settings(source)
    tensors = _renamed(source, _read_weights(source))
    config = _config_of(source, settings, tensors, task_name or source.resolve().name, base_model)
    with new_folder(output) as partial:
        # With memory of their own, which safetensors asks for.
        copies = {f"{KEY_PREFIX}{name}": tensor.detach().clone() for name, tensor in tensors.items()}
        write_adapter(partial, config, copies)
        for pair in read_adapter(AdapterSource(partial, str(source))).pairs.values():
            pair.read()  # both refuse what does not fit together, or is no number
    return output


def _config_of(
    source: Path, settings: LoraConfig, tensors: Mapping[str, Tensor], task_name: str, base_model: str | None
) -> MAnyConfig:
    modules = sorted({name.partition(".lora_")[0] for name in tensors if ".lora_" in name})
    there = {module: module.replace(LANGUAGE_MODEL, "model", 1) for module in modules}  # the checkpoint's own names
    check_mergeable(str(source), settings, dict.fromkeys(there.values()))
    check_patterns(settings, list(there.values()), str(source), only_ranks=True)
    rank_of = ByPattern(settings.rank_pattern, settings.r)
    alpha_of = ByPattern(settings.alpha_pattern, settings.lora_alpha)
    ranks = {module: rank_of[name] for module, name in there.items()}
    alphas = {module: alpha_of[name] for module, name in there.items()}
    projectors = [PROJECTOR] if any(key.startswith(PROJECTOR) for key in tensors) else []
    return MAnyConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        # By full names: the ends of the names would match the vision tower's layers too.
        target_modules=modules,
        rank_pattern=exceptions_by_pattern(ranks, settings.r),
        alpha_pattern=exceptions_by_pattern(alphas, settings.lora_alpha),
        projector_modules=projectors,
        modules_to_save=projectors or None,
        task_name=task_name,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def _read_settings(source: Path) -> LoraConfig:
    if not (source / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"'{source}' has no {CONFIG_NAME}: it is no LoRA checkpoint.")
    settings = read_config(AdapterSource(source, str(source)))
    if not is_plain_lora(settings):
        raise ValueError(f"'{source}' {described(settings)}; only a plain LoRA can be imported.")
    return settings


def _read_weights(source: Path) -> list[tuple[str, Tensor]]:
    adapter = source / SAFETENSORS_WEIGHTS_NAME
    adapter = adapter if adapter.is_file() else source / WEIGHTS_NAME
    found: list[tuple[str, Tensor]] = []
    for path in (adapter, source / PROJECTOR_WEIGHTS_NAME):
        if not path.is_file():
            raise FileNotFoundError(
                f"'{source}' has no {path.name}. A checkpoint of the LLaVA repository has {WEIGHTS_NAME} with the "
                f"LoRA weights and {PROJECTOR_WEIGHTS_NAME} with the projector, or with nothing if that was frozen."
            )
        found += _load(path).items()
    return found


def _load(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' is refused: it is damaged, or a pickle of more than tensors, which could execute code. Nothing "
            f"of it was executed. ({first_line(error)})"
        ) from None
    except (EOFError, OSError, RuntimeError, SafetensorError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"'{path}' cannot be read, or is damaged or truncated ({error}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"'{path}' holds no tensors by name.")
    for key, tensor in content.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.ndim > 0
        if not dense or not tensor.is_floating_point():
            raise ValueError(f"'{path}': '{key}' is no dense tensor of floating point numbers.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"'{path}': '{key}' claims more numbers than the file has.")
    return content


def _renamed(source: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by transformers' names, without PEFT's prefix."""
    found, unknown = {}, []
    for key, tensor in tensors:
        if match := _LORA.fullmatch(key):
            name = f"{LANGUAGE_MODEL}.{match[2]}.lora_{match[3]}.weight"
        elif match := _PROJECTOR.fullmatch(key):
            name = f"{PROJECTOR}.{_PROJECTOR_LAYERS[match[1]]}.{match[2]}"
        else:
            unknown.append(key)
            continue
        if name in found:
            raise ValueError(f"'{source}': '{key}' and another tensor both belong at '{name}'.")
        found[name] = tensor
    if unknown:
        named = quoted(sorted(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"'{source}' holds {len(unknown)} tensors that belong to no module of transformers' LLaVA or are no plain "
            f"LoRA weights: {named}."
        )
    _check_projector(source, found)
    return found


def _check_projector(source: Path, tensors: Mapping[str, Tensor]) -> None:
    """Two layers, of which the first gives the width of the language model; or none, if the projector was frozen."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(PROJECTOR)}
    if not found:
        return
    width = next(
        (A.shape[-1] for name, A in tensors.items() if name.endswith(".self_attn.q_proj.lora_A.weight")), None
    )
    first = (*found.get(f"{PROJECTOR}.linear_1.weight", ()), 0, 0)[:2]
    hidden = first[0] if width is None else width
    wanted = {
        f"{PROJECTOR}.linear_1.weight": (hidden, first[1]),
        f"{PROJECTOR}.linear_1.bias": (hidden,),
        f"{PROJECTOR}.linear_2.weight": (hidden, hidden),
        f"{PROJECTOR}.linear_2.bias": (hidden,),
    }
    wrong = next((name for name in wanted if found.get(name) != wanted[name]), None)
    if wrong is not None:
        raise ValueError(
            f"'{source}': the projector's '{wrong}' has shape {found.get(wrong, 'none, it is missing')}, but to fit "
            f"the other tensors it must be {wanted[wrong]}."
        )
