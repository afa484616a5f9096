"""What a config may say: everything that PEFT itself would write, and nothing of another type."""

from __future__ import annotations

import json
import math

import pytest
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import EvaConfig, LoraRuntimeConfig

from peft_many import MAnyConfig
from peft_many.files.untrusted import MalformedAdapterError, check_config
from tests.adapters import base

TASK = {"name": "a", "weight": 1.0, "sha256": "0", "source": "a", "revision": None}
MERGE = {
    "tasks": [TASK],
    "routing": {"p": {"width": 4, "tasks": [{"name": "a", "trained": True}]}},
    "method": None,
}

GOOD = [
    LoraConfig(),
    LoraConfig(r=3, lora_alpha=1.5, rank_pattern={"a": 2}, alpha_pattern={"a": 0.5}),  # type: ignore[arg-type]
    LoraConfig(target_modules={"q_proj"}, exclude_modules="x", modules_to_save=["lm_head"]),
    LoraConfig(layers_to_transform=[1], layers_pattern="layers", target_modules=["q"]),
    LoraConfig(init_lora_weights="pissa_niter_4", layer_replication=[(0, 2), (1, 2)]),
    LoraConfig(init_lora_weights="eva", eva_config=EvaConfig()),
    LoraConfig(trainable_token_indices={"embed": [1, 2]}, target_parameters=["a.weight"]),
    LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True), task_type="CAUSAL_LM"),
    LoHaConfig(r=2, target_modules=["q_proj"]),
    MAnyConfig(task_name="größe 🙂", projector_modules=[]),
    MAnyConfig(**MERGE),
    MAnyConfig(**{**MERGE, "router": "gaussian", "abstain_above": 2, "temperature": 1, "ridge": 0}),
]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: type(config).__name__)
def test_what_peft_writes_is_accepted(config, tmp_path):
    check_config(config, "x")
    config.save_pretrained(tmp_path)
    check_config(type(config)(**json.loads((tmp_path / "adapter_config.json").read_text())), "x")


def test_every_option_of_a_real_adapter_is_accepted(tmp_path):
    get_peft_model(base("llava"), MAnyConfig(r=2)).save_pretrained(tmp_path)
    check_config(PeftConfig.from_pretrained(tmp_path), "x")


BAD = [
    ({"r": "four"}, "`r`"),
    ({"r": True}, "`r`"),
    ({"r": 4.0}, "`r`"),
    ({"r": 0}, "positive"),
    ({"rank_pattern": {"a": -1}}, "positive"),
    ({"rank_pattern": [1]}, "`rank_pattern`"),
    ({"lora_alpha": math.nan}, "`lora_alpha`"),
    ({"lora_alpha": 10**400}, "`lora_alpha`"),
    ({"alpha_pattern": {"a": "b"}}, "`alpha_pattern`"),
    ({"target_modules": [1]}, "`target_modules`"),
    ({"base_model_name_or_path": ["a"]}, "`base_model_name_or_path`"),
    ({"task_name": "\ud800"}, "`task_name`"),
    ({"task_name": 3}, "`task_name`"),
    ({"use_rslora": "yes"}, "`use_rslora`"),
    ({"temperature": math.inf}, "`temperature`"),
    ({"auto_mapping": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]}}, "nested"),
    ({"tasks": [{}]}, "`tasks`"),
    ({"tasks": [{**TASK, "revision": 3}]}, "`tasks`"),
    ({"tasks": [{**TASK, "pooled": [{}]}]}, "`tasks`"),
    ({"pooled": [{"name": "a", "weight": 1.0}]}, "`pooled`"),
    ({"pooled": [{**TASK, "sha256": []}]}, "`pooled`"),
    ({"tasks": [TASK, TASK]}, "same name"),
    ({"tasks": None}, "names no `tasks`"),
    ({"routing": {"p": {"width": 4, "tasks": []}}}, "`routing`"),
    ({"routing": {"p": {"width": 4, "tasks": [{"name": "b", "trained": True}]}}}, "`routing`"),
    ({"routing": {"p": {"width": 4, "tasks": [{"name": "a", "trained": 1}]}}}, "`routing`"),
    ({"routing": {"p": {"width": -4, "tasks": [{"name": "a", "trained": True}]}}}, "width"),
    ({"ridge": -1e-4}, "`ridge`"),
    ({"abstain_above": 1.0}, "`abstain_above`"),
    ({"abstain_above": -1.0, "router": "gaussian"}, "`abstain_above`"),
    ({"task_ranks": [2, 2]}, "`task_ranks`"),
    ({"averaged_projectors": {"p": "a"}}, "`averaged_projectors`"),
    ({"method": {"name": "ties"}}, "`method`"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=str)
def test_what_is_nonsense_is_refused_by_the_name_of_its_field(changes, words):
    config = MAnyConfig(**MERGE)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(MalformedAdapterError) as caught:
        check_config(config, "me/adapter")
    assert words in str(caught.value)
    assert str(caught.value).startswith("me/adapter: adapter_config.json cannot be used: ")
    assert "\n" not in str(caught.value)
