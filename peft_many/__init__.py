"""peft_many: a PEFT plugin for multimodal LLMs that learn task after task without forgetting (MAny, arXiv 2604.14016).

Importing it imports PEFT, and registers the type `MANY` there. In two programs this waits until one of the names below
is asked for: in vLLM, whose processes import `peft_many.serving` and have no need of PEFT, and in the command
`peft-many` (`peft_many_command`), which answers `--help` without it.
"""

import sys

if sys.modules.keys() & {"vllm", "peft_many_command"} and "peft" not in sys.modules:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        import importlib

        import peft  # noqa: F401

        del globals()["__getattr__"]
        return getattr(importlib.reload(sys.modules[__name__]), name)
else:
    from . import metrics
    from .editing.pooling import pool_adapters
    from .editing.refit import refit_merge
    from .editing.refit_files import refit_merge_files
    from .editing.tasks import add_task, remove_task, reweight_tasks
    from .exports import export_lora, export_model, export_routed_model, load_routed_model
    from .hub.llava_checkpoint import import_llava_checkpoint
    from .hub.loading import find_statistics
    from .hub.pushing import keep_cards
    from .merging.merge import merge_adapter_files, merge_adapter_sequence
    from .merging.recipe import read_recipe
    from .records import MergeOptions
    from .reports.asking import ask_merge
    from .reports.evaluating import evaluate_merge
    from .reports.evaluation import save_evaluation
    from .reports.inspection import inspect_adapter
    from .reports.plan import plan_merge
    from .reports.report import MergeReport, merge_report, save_report
    from .statistics.callback import MAnyCallback
    from .statistics.collect import collect_statistics
    from .statistics.from_data import measure_adapter
    from .tuner.config import MAnyConfig
    from .tuner.model import MAnyModel
    from .tuner.registration import register
    from .version import __version__

    register()
    find_statistics()
    keep_cards()

__all__ = [
    "MAnyCallback",
    "MAnyConfig",
    "MAnyModel",
    "MergeOptions",
    "MergeReport",
    "__version__",
    "add_task",
    "ask_merge",
    "collect_statistics",
    "evaluate_merge",
    "export_lora",
    "export_model",
    "export_routed_model",
    "import_llava_checkpoint",
    "inspect_adapter",
    "load_routed_model",
    "measure_adapter",
    "merge_adapter_files",
    "merge_adapter_sequence",
    "merge_report",
    "metrics",
    "plan_merge",
    "pool_adapters",
    "read_recipe",
    "refit_merge",
    "refit_merge_files",
    "remove_task",
    "reweight_tasks",
    "save_evaluation",
    "save_report",
]
