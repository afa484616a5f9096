"""What `MAnyConfig` finds by itself in each family: the language model's linear layers and the projectors."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_many import MAnyConfig, MAnyModel
from peft_many.families.family import FAMILIES
from peft_many.families.parts import find_projectors, language_model_linears
from peft_many.tuner.projector import ProjectorWrapper
from tests import tiny
from tests.families.models import build
from tests.files.making import PROJECTORS

LANGUAGE_MODEL = dict.fromkeys(tiny.FAMILIES, "model.language_model.") | {
    "idefics3": "model.text_model.",
    "smolvlm": "model.text_model.",
}
TOWER = dict.fromkeys(tiny.FAMILIES, "model.vision_tower.") | {
    "qwen2_vl": "model.visual.",
    "qwen2_5_vl": "model.visual.",
    "qwen3_vl": "model.visual.",
    "idefics3": "model.vision_model.",
    "smolvlm": "model.vision_model.",
}
TEXT_KINDS = ("llama", "gpt2", "t5")

family = pytest.mark.parametrize("family", tiny.FAMILIES)


def linears(model: nn.Module, prefix: str = "") -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(prefix)
    }


def adapted(model: PeftModel, adapter: str = "default") -> set[str]:
    return {
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def wrapped(model: PeftModel) -> list[str]:
    return sorted(
        name for name, module in model.get_base_model().named_modules() if isinstance(module, ProjectorWrapper)
    )


@family
def test_the_language_model_gets_lora_the_projector_a_copy_and_all_else_is_frozen(family: str) -> None:
    base = tiny.build(family)
    text, vision = linears(base, LANGUAGE_MODEL[family]), linears(base, TOWER[family])
    assert len(text) == 14  # two layers of q, k, v, o, gate, up, down
    assert vision
    model = get_peft_model(base, MAnyConfig(r=4))

    assert adapted(model) == text
    assert wrapped(model) == sorted(PROJECTORS[family])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {name for name in trainable if ".lora_" in name}
    copies = {name for name in trainable if ".modules_to_save.default." in name}
    assert trainable == lora | copies
    assert len(lora) == 2 * len(text)
    for projector in PROJECTORS[family]:
        wrapper = model.get_base_model().get_submodule(projector)
        original, copy = wrapper.original_module, wrapper.modules_to_save["default"]
        assert all(parameter.requires_grad for parameter in copy.parameters())
        assert not any(parameter.requires_grad for parameter in original.parameters())
        for mine, theirs in zip(copy.parameters(), original.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() != theirs.data_ptr()


@family
def test_a_fresh_adapter_changes_nothing_and_training_reaches_projector_and_language_model(family: str) -> None:
    base = tiny.build(family)
    batch = tiny.batch(base, family, [[tiny.random_image(family, 0)], []])
    with torch.no_grad():
        expected = base(**batch).logits
    model = get_peft_model(base, MAnyConfig(r=4))
    output = model(**batch)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
    output.logits.square().mean().backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@family
def test_no_projector_on_request(family: str) -> None:
    base = tiny.build(family)
    text = linears(base, LANGUAGE_MODEL[family])
    model = get_peft_model(base, MAnyConfig(r=4, projector_modules=[]))
    assert wrapped(model) == []
    assert adapted(model) == text
    assert all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_projector_modules_name_the_projector_by_its_end() -> None:
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, projector_modules=["multi_modal_projector.linear_2"]))
    assert wrapped(model) == ["model.multi_modal_projector.linear_2"]
    assert model.peft_config["default"].projector_modules == ["model.multi_modal_projector.linear_2"]
    model = get_peft_model(tiny.build("qwen3_vl"), MAnyConfig(r=4, projector_modules="visual.merger"))
    assert wrapped(model) == ["model.visual.merger"]


@pytest.mark.parametrize("name", ["no_such_projector", "modal_projector"])
def test_a_projector_that_does_not_exist_is_an_error_and_leaves_the_model_alone(name: str) -> None:
    base = tiny.build("llava")
    before = [(path, type(module)) for path, module in base.named_modules()]
    with pytest.raises(ValueError, match=f"'{name}', but no module of LlavaForConditionalGeneration ends with"):
        get_peft_model(base, MAnyConfig(r=4, projector_modules=[name]))
    assert [(path, type(module)) for path, module in base.named_modules()] == before


def test_a_part_of_a_projector_is_no_projector_beside_it() -> None:
    nested = MAnyConfig(r=4, projector_modules=["linear_2", "multi_modal_projector"])
    message = "names '.*linear_2', which is a part of the projector 'model.multi_modal_projector'"
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.build("llava"), nested)
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4))
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", MAnyConfig(r=4, projector_modules=["linear_2"]))
    assert wrapped(model) == ["model.multi_modal_projector"]


def test_the_place_of_a_projector_counts_and_not_its_name() -> None:
    base = tiny.build("llava")
    base.model.from_eye_to_mouth = base.model.multi_modal_projector
    base.model.from_eye_to_mouth.requires_grad_(False)
    del base.model.multi_modal_projector
    base.model.projector_norm = nn.LayerNorm(32)  # no weight matrix
    base.model.connector = copy.deepcopy(base.model.vision_tower)  # another tower
    base.score_projector = nn.Linear(32, 2)  # beyond the language model
    assert find_projectors(base) == ["model.from_eye_to_mouth"]


def test_parts_of_a_tower_are_projectors_only_where_none_lies_between() -> None:
    base = tiny.build("qwen3_vl")
    assert find_projectors(base) == ["model.visual.merger", "model.visual.deepstack_merger_list.0"]
    base.model.late = nn.Linear(32, 32)
    assert find_projectors(base) == ["model.late"]


@pytest.mark.parametrize(("width", "projectors"), [(24, ["enc_to_dec_proj"]), (32, [])])
def test_what_joins_an_encoder_and_a_decoder_of_different_widths_is_a_projector(
    width: int, projectors: list[str]
) -> None:
    small = {"num_hidden_layers": 1, "intermediate_size": 40, "num_attention_heads": 4}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(hidden_size=width, image_size=16, patch_size=4, **small),
        transformers.BertConfig(hidden_size=32, vocab_size=64, **small),
    )
    assert find_projectors(transformers.VisionEncoderDecoderModel(config)) == projectors


def test_a_member_at_the_end_of_a_list_may_be_a_projector() -> None:
    base = build("inkling_mm_model")
    assert find_projectors(base) == ["model.vision_tower.encoder_layers.1"]
    base.model.vision_tower.encoder_layers.append(nn.Linear(32, 32))
    assert find_projectors(base) == ["model.vision_tower.encoder_layers.2"]


def test_where_no_projector_is_found_the_error_says_what_was_sought_and_names_the_argument() -> None:
    base = tiny.build("llava")
    base.model.multi_modal_projector = nn.Identity()
    before = [(path, type(module)) for path, module in base.named_modules()]
    with pytest.raises(ValueError, match=r"'model\.vision_tower'.*'model\.language_model'.*`projector_modules"):
        get_peft_model(base, MAnyConfig(r=4))
    assert [(path, type(module)) for path, module in base.named_modules()] == before
    assert wrapped(get_peft_model(base, MAnyConfig(r=4, projector_modules=[]))) == []


def test_where_the_language_model_holds_the_tower_the_error_names_the_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(FAMILIES, "idefics")  # as if it were a family that nothing is known of
    config = transformers.IdeficsConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vision_config={"embed_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    )  # fmt: skip
    base = transformers.IdeficsForVisionText2Text(config)
    with pytest.raises(ValueError, match=r"`get_decoder\(\)` gives 'model'.*`target_modules`"):
        get_peft_model(base, MAnyConfig(r=4, projector_modules=[]))
    given = MAnyConfig(r=4, projector_modules=[], target_modules=r".*model\.layers.*q_proj")
    assert adapted(get_peft_model(base, given)) == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_text_models_get_what_lora_would_adapt_and_no_projector(kind: str) -> None:
    as_lora = adapted(get_peft_model(tiny.build_text(kind), LoraConfig(r=4)))
    model = get_peft_model(tiny.build_text(kind), MAnyConfig(r=4))
    assert adapted(model) == as_lora != set()
    assert wrapped(model) == []
    assert model.peft_config["default"].projector_modules == []


@pytest.mark.parametrize("kind", ["Gemma3", "Llama4"])
def test_text_models_of_families_that_take_images_have_no_projector(kind: str) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    if kind == "Llama4":
        sizes |= {"num_local_experts": 2, "intermediate_size_mlp": 32}
    config = getattr(transformers, f"{kind}TextConfig")(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **sizes)
    model = get_peft_model(getattr(transformers, f"{kind}ForCausalLM")(config), MAnyConfig(r=4))
    assert model.peft_config["default"].projector_modules == []
    assert len(adapted(model)) >= 4
    assert wrapped(model) == []


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_text_models_that_lora_has_no_default_for_get_all_linear_layers_but_the_head(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MAnyModel, "target_module_mapping", {})
    base = tiny.build_text(kind)
    expected = linears(base) - {"lm_head"}
    assert adapted(get_peft_model(base, MAnyConfig(r=4))) == expected
    if kind != "t5":
        one_layer = get_peft_model(tiny.build_text(kind), MAnyConfig(r=4, layers_to_transform=[1]))
        assert adapted(one_layer) == {name for name in expected if ".1." in name}


@pytest.mark.parametrize("build", [*tiny.FAMILIES.values(), *(lambda k=k: tiny.build_text(k) for k in TEXT_KINDS)])
def test_the_language_models_layers_are_found_whether_adapted_or_not(build) -> None:  # type: ignore[no-untyped-def]
    base: PreTrainedModel = build()
    before = language_model_linears(base)
    assert before
    model = get_peft_model(base, MAnyConfig(r=4))
    assert language_model_linears(model.get_base_model()) == before


@family
def test_layers_to_transform_does_not_reach_the_vision_tower(family: str) -> None:
    base = tiny.build(family)
    second = linears(base, f"{LANGUAGE_MODEL[family]}layers.1.")
    assert len(second) == 7
    model = get_peft_model(base, MAnyConfig(r=4, layers_to_transform=[1]))
    assert adapted(model) == second


@family
def test_a_second_adapter_finds_the_same_targets(family: str) -> None:
    model = get_peft_model(tiny.build(family), MAnyConfig(r=4))
    model.add_adapter("second", MAnyConfig(r=2))
    assert adapted(model, "second") == adapted(model)
    for projector in PROJECTORS[family]:
        wrapper = model.get_base_model().get_submodule(projector)
        assert set(wrapper.modules_to_save) == {"default", "second"}
    assert wrapped(model) == sorted(PROJECTORS[family])
    # Only the first one is active, so only it trains
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".second" in name for name in trainable)
    model.set_adapter("second")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".second" in name for name in trainable)


def test_targets_that_are_given_are_kept() -> None:
    model = get_peft_model(tiny.build("llava"), MAnyConfig(r=4, target_modules=r".*language_model.*q_proj"))
    assert adapted(model) == {f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_transformers_add_adapter_finds_the_same(family: str) -> None:
    model = tiny.build(family)
    text = linears(model, LANGUAGE_MODEL[family])
    model.add_adapter(MAnyConfig(r=4))
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wrappers = [name for name, module in model.named_modules() if isinstance(module, ProjectorWrapper)]
    assert found == text
    assert wrappers == PROJECTORS[family]


class StateSpaceLinearAttention(nn.Module):
    """Has `Linear` in its name, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden)
        return out


def test_a_module_that_only_sounds_like_a_linear_layer_is_no_target() -> None:
    base = tiny.build("llava")
    base.model.language_model.layers[0].mlp = StateSpaceLinearAttention()
    model = get_peft_model(base, MAnyConfig(r=4))
    assert "model.language_model.layers.0.mlp.inner" in adapted(model)
    assert "model.language_model.layers.0.mlp" not in adapted(model)


def test_modules_that_are_trained_whole_hold_no_layers_of_the_language_model() -> None:
    model = get_peft_model(
        tiny.build_text("llama"),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "layers.1.mlp"]),
    )
    found = language_model_linears(model.get_base_model())
    assert not any("mlp" in name for name in found if name.startswith("model.layers.1."))
    assert not any("lm_head" in name or "modules_to_save" in name for name in found)
    assert "model.layers.0.mlp.up_proj" in found


def test_a_projector_that_peft_takes_other_modules_for_is_refused() -> None:
    """It would train them whole, or fail at those that have a LoRA: "q_proj" ends as "proj" does."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.q_proj, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(3, 3)})])

    config = MAnyConfig(r=2, target_modules=["q_proj"], projector_modules=["proj"])
    with pytest.raises(ValueError, match=r"'proj' cannot be told from 'q_proj' by PEFT.*`projector_modules=\[\]`"):
        get_peft_model(Plain(), config)
    both = get_peft_model(Plain(), MAnyConfig(r=2, target_modules=["q_proj"], projector_modules=["mlp"]))
    assert both.peft_config["default"].projector_modules == ["mlp", "layers.0.mlp"]


def test_a_plain_module_must_say_its_targets() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(Plain(), MAnyConfig(r=2))
    model = get_peft_model(Plain(), MAnyConfig(r=2, target_modules=["first"]))
    assert adapted(model) == {"first"}
