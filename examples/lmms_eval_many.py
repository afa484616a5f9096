"""lmms-eval, with an adapter on the model that it loads: `peft=` among its `--model_args`.

    python lmms_eval_many.py --model llava_hf --tasks mme \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,peft=merged,device_map=auto

All else is lmms-eval's own command line. Needs `pip install lmms-eval decord "filelock<4"`.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2
from peft import PeftModel

import peft_many  # noqa: F401  (with it, PEFT can load a merge)


def with_adapter(model_class: type) -> type:
    """A model of lmms-eval that takes an adapter too: a merge, one task's adapter, or any other of PEFT."""

    class WithAdapter(model_class):
        def __init__(self, *args: Any, peft: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if peft is None:
                return
            if not hasattr(self, "_model"):
                raise TypeError(f"{model_class.__name__} does not load the model itself, so it can have no adapter.")
            self._model = PeftModel.from_pretrained(self._model, peft)

    return WithAdapter


# What `--model` names is found by this.
find = MODEL_REGISTRY_V2.get_model_class
MODEL_REGISTRY_V2.get_model_class = lambda name, force_simple=False: with_adapter(find(name, force_simple))

if __name__ == "__main__":
    main()
