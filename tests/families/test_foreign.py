"""Models of code that is not in transformers: their parts are found by structure, or the error says what to give."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from peft_many.families.image_layouts import image_rows_of
from peft_many.families.parts import language_model_linears, parts_of
from peft_many.routing.calls import projector_call
from peft_many.tuner.projector import ProjectorMixture, ProjectorWrapper
from tests import tiny
from tests.families import foreign
from tests.files.making import perturb

STYLES = (1, 6)  # of the two tasks: complementary colours
# Of task 0 an image of two tiles, no image, of task 1 an image and of task 0 another one, of two tiles too.
ROWS = [[(0, 2)], [], [(1, 1), (0, 2)]]
Rows = list[list[tuple[int, int]]]


def build(kind: str) -> PreTrainedModel:
    cls = {"internvl": foreign.InternVLChatModel, "llava": foreign.LlavaLlamaForCausalLM}[kind]
    config = foreign.LlavaConfig(**foreign.TEXT) if kind == "llava" else foreign.InternVLChatConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def image_of(task: int, tiles: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    colour = torch.tensor([1.0 if STYLES[task] >> channel & 1 else -1.0 for channel in range(3)])
    return colour[:, None, None] + 0.3 * torch.randn((tiles, 3, 8, 8), generator=generator)


def batch(kind: str, rows: Rows, length: int | None = None) -> dict[str, Any]:
    """Rows of images, each by its task and its number of tiles, and text after them; seeds go by the row's content."""
    images, flags, ids = [], [], []
    for row in rows:
        ids.append([1])
        for task, tiles in row:
            images.append(image_of(task, tiles, seed=task + 10 * tiles))
            flags += [1] * tiles
            run = [foreign.CONTEXT] * (foreign.PATCHES * tiles) if kind == "internvl" else [foreign.PICTURE]
            ids[-1] += [121, *run, 122]
        if not row:
            images.append(torch.zeros(1, 3, 8, 8))
            flags.append(0)
        ids[-1] += [7, 8, 9]
    length = length or max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    text = {"input_ids": tokens, "attention_mask": mask}
    if kind == "llava":
        return {**text, "images": images}
    return {**text, "pixel_values": torch.cat(images), "image_flags": torch.tensor(flags)[:, None]}


def task_folder(kind: str, task: int, folder: Path) -> Path:
    model = get_peft_model(build(kind), MAnyConfig(r=2, task_name=f"task-{task}"))
    model.train()
    inputs = batch(kind, [[(task, 2)], [], [(task, 1)]])
    model(**inputs, labels=inputs["input_ids"].clamp(min=0)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.eval()
    perturb(model, "default", seed=task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one that padding was counted
        warnings.filterwarnings("ignore", ".*have no `labels`")
        statistics = collect_statistics(model, [inputs], progress=False)
    words = int(inputs["attention_mask"].sum()) if kind == "internvl" else 2 * 6 + 4 + foreign.PATCHES * 3
    assert {statistics.tasks[0].tokens_of(name) for name in statistics.tasks[0].input_of} == {words}
    (seen,) = statistics.tasks[0].projectors.values()
    assert seen.count == 2  # two tiles are one image, and what a row without an image brings is none
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=["internvl", "llava"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, [task_folder(request.param, task, folder / str(task)) for task in range(2)]


def decisions(merged: PeftModel, run: Callable[[], Any]) -> tuple[list[int], Any]:
    """The task of each image that is one, and what the call returned."""
    found: list[int] = []
    (mixture,) = (module for module in merged.modules() if isinstance(module, ProjectorMixture))
    wrapper = next(module for module in merged.modules() if isinstance(module, ProjectorWrapper))

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = image_rows_of(projector_call(mixture, args, kwargs))
        weights = mixture.task_weights(rows.pool(args[0]))
        found.extend(weights[rows.real_images].argmax(-1).tolist())

    handle = wrapper.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        output = run()
    handle.remove()
    return found, output


def test_the_language_model_gets_lora_and_the_projector_a_copy(made: tuple[str, list[Path]]) -> None:
    kind, _ = made
    model = get_peft_model(build(kind), MAnyConfig(r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    projector = {"internvl": "mlp1", "llava": "model.mm_projector"}[kind]
    layers = {"internvl": "language_model.model.layers.", "llava": "model.layers."}[kind]
    prefix = "base_model.model."
    lora = [name for name in trained if "lora_" in name]
    assert len(lora) == 2 * 14
    assert all(name.startswith(prefix + layers) for name in lora)
    assert all(name.startswith(f"{prefix}{projector}.modules_to_save.") for name in set(trained) - set(lora))
    assert len(trained) > len(lora)
    before = parts_of(build(kind))
    assert parts_of(model.get_base_model()) == before
    model.add_adapter("second", MAnyConfig(r=2))
    assert model.peft_config["second"].projector_modules == [projector]
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


@pytest.mark.parametrize("gate_lora", [False, True])
def test_images_are_routed_jointly_as_alone(made: tuple[str, list[Path]], gate_lora: bool, tmp_path: Path) -> None:
    kind, folders = made
    options: dict[str, Any] = {"temperature": 0.05 if gate_lora else 0.5, "gate_lora": gate_lora}
    merged = merge_adapter_sequence(build(kind), folders, progress=False, **options)
    merge_adapter_files(folders, tmp_path / "merged", progress=False, **options)
    loaded = PeftModel.from_pretrained(build(kind), str(tmp_path / "merged"))
    inputs = batch(kind, ROWS)
    tasks, output = decisions(merged, lambda: merged(**inputs).logits)
    assert tasks == [task for row in ROWS for task, _ in row]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, output, atol=1e-4, rtol=1e-4)
        for row, joint in zip(ROWS, output, strict=True):
            alone = merged(**batch(kind, [row])).logits[0]
            torch.testing.assert_close(joint[: len(alone)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate_lora", [False, True])
def test_generate_is_routed(made: tuple[str, list[Path]], gate_lora: bool) -> None:
    kind, folders = made
    merged = merge_adapter_sequence(build(kind), folders, progress=False, gate_lora=gate_lora, temperature=0.05)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    first = "inputs" if kind == "llava" else "input_ids"

    def generate(rows: Rows) -> Tensor:
        inputs = batch(kind, rows)
        inputs[first] = inputs.pop("input_ids")
        inputs.pop("image_flags", None)
        return merged.generate(**inputs, **how)

    rows: Rows = [[(0, 2)], [(1, 2)]]
    tasks, joint = decisions(merged, lambda: generate(rows))
    assert tasks == [0, 1]
    assert torch.equal(joint, torch.cat([generate([row]) for row in rows]))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (foreign.QwenVL, ("transformer.h", "transformer.visual", "transformer.visual.attn_pool")),
        (foreign.Phi3V, ("model.layers", "model.vision_embed_tokens", "model.vision_embed_tokens.img_projection")),
        (foreign.MiniCPMV, ("llm.model", "vpm", "resampler")),
    ],
)
def test_parts_are_found_by_structure(kind: type[PreTrainedModel], parts: tuple[str, str, str]) -> None:
    base = kind(LlamaConfig(**foreign.TEXT))
    model = get_peft_model(base, MAnyConfig(r=2))
    language_model, tower, projector = parts
    assert model.peft_config["default"].projector_modules == [projector]
    found = parts_of(base)
    assert found is not None
    assert (found.language_model, found.towers, found.projectors) == (language_model, (tower,), (projector,))
    lora = {name.partition(".lora_")[0] for name, _ in base.named_parameters() if ".lora_" in name}
    assert len(lora) == 14
    assert all(name.startswith(f"{language_model}.") for name in lora)


def test_a_model_inside_of_a_module_of_ones_own_keeps_its_parts_and_images() -> None:
    wrapper = foreign.Wrapper(tiny.build("llava"))
    config = get_peft_model(wrapper, MAnyConfig(r=2)).peft_config["default"]
    assert config.projector_modules == ["vlm.model.multi_modal_projector"]
    assert all(name.startswith("vlm.model.language_model.") for name in language_model_linears(wrapper))
    for kind in ("internvl", "llava"):
        model = get_peft_model(foreign.Wrapper(build(kind)), MAnyConfig(r=2))
        (seen,) = collect_statistics(model, [(batch(kind, ROWS),)], progress=False).tasks[0].projectors.values()
        assert seen.count == 3


def refused(model: nn.Module, message: str, **config: Any) -> None:
    before = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MAnyConfig(r=2, **config))
    assert [(path, type(module)) for path, module in model.named_modules()] == before


def test_a_tower_that_is_yet_to_be_loaded_is_asked_for() -> None:
    base = build("llava")
    base.model.vision_tower = foreign.CLIPVisionTower(delay_load=True)
    refused(base, "takes `image_sizes`, `images`, but no vision tower.*load it first.*`projector_modules`")
    refused(base, "no vision tower.*`projector_modules`", target_modules=["q_proj"])
    refused(base, "no vision tower.*`target_modules`", projector_modules=["mm_projector"])
    given = MAnyConfig(r=2, target_modules=["q_proj"], projector_modules=["mm_projector"])
    model = get_peft_model(base, given)
    assert model.peft_config["default"].projector_modules == ["model.mm_projector"]
    base.model.vision_tower = foreign.CLIPVisionTower()
    assert collect_statistics(model, [batch("llava", [[(0, 1)]])], progress=False).tasks[0].projectors


def test_what_may_be_no_projector_or_another_one_is_not_taken() -> None:
    base = build("internvl")
    base.mlp1 = foreign.mlp(20)  # of what the tower gives nothing is so wide
    refused(base, "width are 'mlp1'.*`projector_modules`")
    base = build("internvl")
    base.mlp_of_ears = foreign.mlp(20)
    refused(base, "'mlp_of_ears', 'mlp1'|'mlp1', 'mlp_of_ears'.*`projector_modules`")
    model = get_peft_model(base, MAnyConfig(r=2, projector_modules=["mlp1"]))
    assert not any("lora_" in name for name, _ in model.named_parameters() if "language_model" not in name)
    collect_statistics(model, [batch("internvl", [[(0, 1)]])], progress=False)


def test_a_language_model_that_cannot_be_told_is_asked_for() -> None:
    base = build("llava")
    base.model.further_layers = nn.ModuleList([nn.Linear(32, 16)])
    refused(base, "layers are not to be told from the rest.*`projector_modules`")
    refused(base, "layers are not to be told from the rest.*`target_modules`", projector_modules=["mm_projector"])
    given = MAnyConfig(r=2, projector_modules=["mm_projector"], target_modules=r"model\.layers\..*q_proj")
    model = get_peft_model(base, given)
    found = language_model_linears(base)
    assert "model.further_layers.0" in found
    assert not any("vision" in name or "mm_projector" in name for name in found)
    collect_statistics(model, [batch("llava", [[(0, 1)]])], progress=False)


def test_a_tower_without_a_projector_is_no_text_model() -> None:
    base = build("internvl")
    base.mlp1 = nn.Identity()
    refused(base, "No projector was found in InternVLChatModel.*'vision_model'.*`projector_modules=\\[\\]`")
    model = get_peft_model(base, MAnyConfig(r=2, projector_modules=[]))
    assert not any("lora_" in name for name, _ in model.named_parameters() if "vision_model" in name)


class OwnLlama(LlamaForCausalLM):
    """A text model of somebody's own."""


class Heard(nn.Module):
    """A tower for sounds and a language model; spectrograms have one channel."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        config = Wav2Vec2Config(**sizes, num_conv_pos_embedding_groups=2)
        self.ear, self.spectrogram = Wav2Vec2Model(config), nn.Conv2d(1, 24, 4, stride=4)
        self.projector, self.language_model = nn.Linear(24, 32), LlamaForCausalLM(LlamaConfig(**foreign.TEXT))


class Seen(nn.Module):
    """Not a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 2), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.linear(self.conv(images).mean((2, 3)))
        return out


class AskedForImages(nn.Module):
    """A text model with an argument that merely speaks of images."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, keep_image_ids: Tensor | None = None) -> Tensor:
        out: Tensor = self.linear(self.embedding(input_ids))
        return out


def test_models_that_read_no_images_or_no_text_stay_what_they_are() -> None:
    own = OwnLlama(LlamaConfig(**foreign.TEXT))
    for model in (own, Heard(), Seen(), nn.Sequential(nn.Embedding(4, 4), nn.Conv2d(3, 4, 1), nn.Linear(4, 4))):
        assert parts_of(model) is None
    assert get_peft_model(own, MAnyConfig(r=2)).peft_config["default"].projector_modules == []
    targets = get_peft_model(OwnLlama(LlamaConfig(**foreign.TEXT)), LoraConfig(r=2)).peft_config["default"]
    assert own.peft_config["default"].target_modules == targets.target_modules
    get_peft_model(Seen(), MAnyConfig(r=2, target_modules=["linear", "conv"]))
    get_peft_model(AskedForImages(), MAnyConfig(r=2, target_modules=["linear"]))
