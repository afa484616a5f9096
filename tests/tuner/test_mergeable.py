"""What cannot be merged is said when an adapter is made, when it is measured and when it is merged, in equal words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.utils import PeftWarning

from peft_many import MAnyConfig, collect_statistics, inspect_adapter, merge_adapter_files, plan_merge
from peft_many.files.errors import UnmergeableAdapterError
from tests.adapters import base, batches

LAYER = "model.layers.0.self_attn.q_proj"
UNMERGEABLE: list[tuple[dict[str, Any], str]] = [
    ({"bias": "lora_only"}, "trains biases (`bias='lora_only'`)"),
    ({"bias": "all"}, "trains biases (`bias='all'`)"),
    ({"lora_bias": True}, f"`lora_bias`, so its effect on '{LAYER}'"),
    ({"init_lora_weights": "pissa"}, f"changes the base weights of '{LAYER}'"),
    ({"init_lora_weights": "olora"}, f"changes the base weights of '{LAYER}'"),
    ({"init_lora_weights": "MiCA"}, f"changes the base weights of '{LAYER}'"),
    ({"modules_to_save": ["lm_head"]}, "tensor 'lm_head.weight' belongs to a module that is trained whole"),
    ({"modules_to_save": ["embed_tokens"]}, "tensor 'model.embed_tokens.weight' belongs to a module that is trained"),
    ({"trainable_token_indices": {"embed_tokens": [5, 6]}}, "`trainable_token_indices`"),
    (
        {"target_parameters": [f"{LAYER}.weight"], "target_modules": []},
        f"`target_parameters`, so its effect on '{LAYER}",
    ),
    ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts 'model.embed_tokens', which is no linear layer"),
]


def adapted(**options: Any) -> PeftModel:
    return get_peft_model(base("llama"), MAnyConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))


def unread() -> Iterator[Any]:
    raise AssertionError("a batch was asked for")
    yield


@pytest.mark.parametrize(("options", "reason"), UNMERGEABLE, ids=lambda of: str(of) if isinstance(of, dict) else "")
def test_it_is_said_when_the_adapter_is_made_and_ever_after(tmp_path: Path, options: Any, reason: str) -> None:
    with pytest.warns(PeftWarning, match="can be trained and used all the same") as warned:
        model = adapted(**options)
    (told,) = [str(one.message) for one in warned if "all the same" in str(one.message)]
    with pytest.raises(UnmergeableAdapterError) as refused:
        collect_statistics(model, unread(), progress=False)
    assert told.startswith(str(refused.value))
    assert reason in told
    assert told.startswith("Adapter 'default'")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnmergeableAdapterError) as unmerged:
        merge_adapter_files([tmp_path / "adapter"], tmp_path / "merged", method="average", progress=False)
    assert reason in str(unmerged.value)
    assert plan_merge([tmp_path / "adapter"], method="average", progress=False).problems == [str(unmerged.value)]
    found = inspect_adapter(tmp_path / "adapter")
    assert found.problem == str(unmerged.value)
    assert (found.peft_type, found.tasks, found.dtype) == ("MANY", [], "float32")
    assert found.parameters > 0
    assert found.layers >= 1


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_nothing_is_said_of_what_can_be_merged(family: str) -> None:
    for options in ({}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftWarning)
            model = get_peft_model(base(family), MAnyConfig(r=2, **options))
        collect_statistics(model, batches(model, family, 0), progress=False)


def test_nothing_is_said_of_adapters_that_are_loaded_for_use(tmp_path: Path) -> None:
    with pytest.warns(PeftWarning, match="trains biases"):
        model = adapted(bias="lora_only")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        PeftModel.from_pretrained(base("llama"), tmp_path)
    with pytest.warns(PeftWarning, match="trains biases"):  # going on training it is another matter
        PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)
