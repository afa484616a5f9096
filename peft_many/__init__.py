"""peft_many: a PEFT plugin for multimodal LLMs that learn task after task without forgetting (MAny, arXiv 2604.14016).

Importing it registers the PEFT type `MANY`.
"""

from . import metrics
from .callback import MAnyCallback
from .editing import add_task, remove_task
from .exports import export_lora, export_model, export_routed_model, load_routed_model
from .inspection import inspect_adapter
from .merging import merge_adapter_files, merge_adapter_sequence
from .plugin.collect import collect_statistics
from .plugin.config import MAnyConfig
from .plugin.llava_checkpoint import import_llava_checkpoint
from .plugin.model import MAnyModel
from .plugin.registration import register
from .pooling import pool_adapters
from .preview import preview_merge
from .recipe import read_recipe
from .refit import refit_merge
from .report import MergeReport, merge_report, save_report
from .version import __version__

register()

__all__ = [
    "MAnyCallback",
    "MAnyConfig",
    "MAnyModel",
    "MergeReport",
    "__version__",
    "add_task",
    "collect_statistics",
    "export_lora",
    "export_model",
    "export_routed_model",
    "import_llava_checkpoint",
    "inspect_adapter",
    "load_routed_model",
    "merge_adapter_files",
    "merge_adapter_sequence",
    "merge_report",
    "metrics",
    "pool_adapters",
    "preview_merge",
    "read_recipe",
    "refit_merge",
    "remove_task",
    "save_report",
]
