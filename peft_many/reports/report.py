"""The report on a merge: what it costs each task before any evaluation, as data and as a page."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from typing_extensions import Unpack

from ..algebra.lpm import LowRankDelta
from ..algebra.precision import without_autocast
from ..files.adapter import read_adapter
from ..files.atomic import replace_file, results_folder
from ..files.statistics import AdapterStatistics
from ..hub.sources import HubArguments, find_adapter
from ..merging.arguments import usable_device
from ..merging.prepare import AdapterPath
from ..records import merge_of
from ..tuner.layers import lora_layers
from ..tuner.merged_linear import exact_weight
from .costs import MergeReport, report_on

__all__ = ["MergeReport", "merge_report", "save_report"]

_FILES = ("report.png", "report.json", "report.html")


@without_autocast()
def merge_report(
    merge: AdapterPath | PeftModel,
    *,
    conflicts: bool = True,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **hub: Unpack[HubArguments],
) -> MergeReport:
    """What merging costs each task, layer by layer, before any evaluation; no base model is loaded.

    Args:
        merge (`str` or [`~peft.PeftModel`]):
            The folder or Hub id of a merge, or a model whose active adapter is one.
        conflicts (`bool`, defaults to `True`):
            Whether to merge the tasks in pairs too, to find those that contradict each other; that takes about as long
            as the merge itself.
        device (`str` or `torch.device`, defaults to `"cpu"`): Where to compute, in float64.
        progress (`bool`, defaults to `True`):
            Show a progress bar.
        **hub: `token`, `cache_dir` and `local_files_only`, as in [`~huggingface_hub.snapshot_download`].

    Returns:
        [`MergeReport`]: Residuals, conflicts, effective ranks, where images go, and sizes.

    Raises:
        ValueError: The adapter is no merge, or the device cannot be used.
        UnmergeableAdapterError, AdapterNotFoundError, StatisticsError: As in [`merge_adapter_sequence`].

    Example:

        ```py
        >>> from peft_many import merge_report

        >>> report = merge_report("merged", progress=False)
        >>> {task: f"{share:.2f}" for task, share in report.interference.items()}
        {'clevr': '0...', 'iconqa': '0...'}
        ```
    """
    place = usable_device(device)
    if isinstance(merge, PeftModel):
        return _of_model(merge, conflicts, place, progress)
    source = find_adapter(merge, **hub)
    adapter = read_adapter(source)
    if adapter.merge is None:
        raise ValueError(f"{source.name} is no merge; only merges can be reported on.")

    def merged(layer: str) -> LowRankDelta:
        for file in adapter.files:
            file.release()
        return adapter.pairs[layer].read()

    def own(t: int, layer: str) -> LowRankDelta:
        return adapter.tasks[t].deltas[layer].read()

    measured = [task.statistics for task in adapter.tasks]
    return report_on(
        adapter.merge,
        measured,
        sorted(adapter.pairs, key=_by_depth),
        merged,
        own,
        conflicts=conflicts,
        device=place,
        progress=progress,
    )


def _of_model(model: PeftModel, conflicts: bool, device: torch.device, progress: bool) -> MergeReport:
    name = model.active_adapter
    config = model.peft_config[name]
    merge = merge_of(config)
    if merge is None:
        raise ValueError(f"Adapter '{name}' is no merge; only merges can be reported on.")
    if not isinstance(config.statistics, AdapterStatistics):
        raise ValueError(f"Adapter '{name}' was loaded without its statistics, which hold its tasks' own deltas.")
    layers: dict[str, Any] = dict(lora_layers(model.get_base_model(), name))
    statistics = config.statistics

    def columns(path: str) -> Tensor:
        return exact_weight(layers[path].lora_B[name])

    def merged(path: str) -> LowRankDelta:
        A = exact_weight(layers[path].lora_A[name])
        return LowRankDelta(A=layers[path].scaling[name] * A, B=columns(path))

    def own(t: int, path: str) -> LowRankDelta:
        return statistics.own_delta(t, path, columns(path))

    return report_on(
        merge, statistics.tasks, list(layers), merged, own, conflicts=conflicts, device=device, progress=progress
    )


def check_report_folder(output_dir: str | os.PathLike[str], overwrite: bool, merge: Any = None) -> Path:
    """The folder for a report on a merge, or an `OSError` or `ImportError` that [`save_report`] would end in."""
    try:
        from .page import draw  # noqa: F401
    except ImportError as error:
        raise ImportError(f'A report needs {error.name}: pip install "peft-many[report]"') from None
    return results_folder(output_dir, _FILES, overwrite, [merge])


def save_report(report: MergeReport, output_dir: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write `report.html`, one page that needs nothing else, `report.png` and `report.json` into a folder.

    Args:
        report ([`MergeReport`]): What [`merge_report`] gave.
        output_dir (`str` or `os.PathLike`): The folder; what else is in it stays.
        overwrite (`bool`, defaults to `False`): Replace an earlier report that is there.

    Returns:
        `Path`: The page.

    Raises:
        FileExistsError: There is an earlier report.
        ImportError: matplotlib or jinja2 is not installed; `pip install "peft-many[report]"` brings both.

    Example:

        ```py
        >>> from peft_many import merge_report, save_report

        >>> save_report(merge_report("merged", progress=False), "merged-report").name
        'report.html'
        ```
    """
    output = check_report_folder(output_dir, overwrite)
    from .page import draw, page

    output.mkdir(parents=True, exist_ok=True)
    figure = draw(report)
    picture, *texts = _FILES
    with replace_file(output / picture) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    for name, text in zip(texts, (json.dumps(report.to_dict(), indent=1), page(report, figure)), strict=True):
        with replace_file(output / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return output / texts[-1]


def _by_depth(layer: str) -> list[str | int]:
    """A sort key that puts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", layer)]
