"""The entry point in the group `vllm.general_plugins`, which vLLM calls in each of its processes.

Where a plugin cannot be imported, vLLM writes so in its log and goes on without it. So little is imported here: what
else may be broken is found out when a merge is asked for, and stops the server.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

logger = logging.getLogger(f"vllm.{__name__}")


def register() -> None:
    """Make vLLM load models that can route projectors, in place of its own that cannot.

    They do what vLLM's do, unless `--additional-config '{"peft_many": "<merge>"}'` names a merge, or the model is one
    that [`export_routed_model`] wrote. No model is imported here. A merge that cannot be routed by stops the server
    before it loads anything. In a vLLM that is not known, its own models stay.

    Example:

        ```bash
        vllm serve llava-hf/llava-1.5-7b-hf --enable-lora --lora-modules merged=merged-lora \
            --additional-config '{"peft_many": "merged"}'
        ```
    """
    import vllm
    from vllm.model_executor.models import ModelRegistry

    _check_what_is_asked()
    try:
        from ..records import ROUTED_PREFIX
        from .families import FAMILIES, KNOWN_VERSIONS, is_known
    except Exception:  # whatever it is, it is no reason to stop servers that are asked for no merge
        logger.exception("peft_many cannot be loaded, so that nothing can be routed.")
        return
    if not is_known(vllm.__version__):
        logger.warning(
            "peft_many routes images in vLLM %s, and this is %s: models are served as without it, and merges refused.",
            ", ".join(KNOWN_VERSIONS),
            vllm.__version__,
        )
        return
    for architecture in FAMILIES:
        for name in (architecture, f"{ROUTED_PREFIX}{architecture}"):
            # vLLM caches what it finds out about a class by its name, and a new version may find out something else.
            ModelRegistry.register_model(name, f"peft_many.serving.models:{architecture}@{vllm.__version__}")


def _check_what_is_asked() -> None:
    """Have vLLM check a merge that it is told when it makes its config: of models that it serves with classes of its
    own, nobody else would notice.

    There is no hook for that. Processes that get a config from another never load the module of its arguments.
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None or hasattr(arguments.EngineArgs.create_engine_config, "_checks_merge"):
        return
    create: Any = arguments.EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        if isinstance(config.additional_config, dict) and "peft_many" in config.additional_config:
            from .asked import merge_to_route_by

            merge_to_route_by(config)
        return config

    vars(create_and_check)["_checks_merge"] = True
    arguments.EngineArgs.create_engine_config = create_and_check
