"""The entry point in the group `vllm.general_plugins`, which vLLM calls in each of its processes."""

from __future__ import annotations

from ..records import ROUTED_PREFIX
from .families import FAMILIES


def register() -> None:
    """Make vLLM load models that can route projectors, in place of its own that cannot.

    They do what vLLM's do, unless `--additional-config '{"peft_many": "<merge>"}'` names a merge, or the model is one
    that [`export_routed_model`] wrote. No model is imported here.

    Example:

        ```bash
        vllm serve llava-hf/llava-1.5-7b-hf --enable-lora --lora-modules merged=merged-lora \
            --additional-config '{"peft_many": "merged"}'
        ```
    """
    import vllm
    from vllm.model_executor.models import ModelRegistry

    for architecture in FAMILIES:
        for name in (architecture, f"{ROUTED_PREFIX}{architecture}"):
            # vLLM caches what it finds out about a class by its name, and a new version may find out something else.
            ModelRegistry.register_model(name, f"peft_many.serving.models:{architecture}@{vllm.__version__}")
