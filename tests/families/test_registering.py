"""A model of somebody's own, whose parts and whose images are known only because they were registered."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel

from peft_many import MAnyConfig, collect_statistics, inspect_adapter, merge_adapter_files, merge_adapter_sequence
from peft_many.families import (
    Family,
    ImageRows,
    ProjectorCall,
    family,
    image_layouts,
    register_family,
    register_image_layout,
)
from peft_many.families.image_layouts import image_rows_of
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.tuner.projector import ProjectorMixture
from tests.files.making import perturb

BRIDGE = "from_eye_to_mouth"
PICTURE, PATCH = 9, 12  # the token that stands for a patch; values of a patch


class EyeAndMouthConfig(PretrainedConfig):
    model_type = "eye_and_mouth"
    sub_configs = {"vision_config": PretrainedConfig}  # noqa: RUF012
    vision_config: Any = None


class EyeAndMouth(PreTrainedModel):
    """Its tower and language model have names that transformers does not look for, and it has two bridges."""

    config_class = EyeAndMouthConfig

    def __init__(self, config: EyeAndMouthConfig) -> None:
        super().__init__(config)
        text = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        self.eye = nn.Linear(PATCH, 8)
        self.from_eye_to_mouth = nn.Linear(8, 16)
        self.from_ear_to_mouth = nn.Linear(4, 16)
        self.mouth = LlamaModel(text)
        self.head = nn.Linear(16, 32)

    def get_input_embeddings(self) -> nn.Module:
        return self.mouth.embed_tokens

    def get_image_features(self, patches: Tensor, patches_per_picture: list[int]) -> Tensor:
        return self.from_eye_to_mouth(self.eye(patches))

    def forward(
        self, input_ids: Tensor, patches: Tensor | None = None, patches_per_picture: list[int] | None = None
    ) -> Tensor:
        embeddings = self.mouth.embed_tokens(input_ids)
        if patches is not None:
            features = self.get_image_features(patches, patches_per_picture)
            embeddings = embeddings.masked_scatter((input_ids == PICTURE)[..., None], features)
        return self.head(self.mouth(inputs_embeds=embeddings).last_hidden_state)


def build() -> EyeAndMouth:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EyeAndMouth(EyeAndMouthConfig(vision_config=PretrainedConfig())).eval()


def batch_of(pictures: list[Tensor]) -> dict[str, Any]:
    """A row for each picture: its patches, then text."""
    length = max(map(len, pictures)) + 3
    ids = [[PICTURE] * len(picture) + [3 + n for n in range(length - len(picture))] for picture in pictures]
    return {
        "input_ids": torch.tensor(ids),
        "patches": torch.cat(pictures),
        "patches_per_picture": [len(picture) for picture in pictures],
    }


def pictures_of(task: int, lengths: tuple[int, ...] = (4, 2, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(task)
    style = torch.randn(PATCH, generator=generator)
    return [style + 0.2 * torch.randn(length, PATCH, generator=generator) for length in lengths]


def adapter(task: int, folder: Path) -> Path:
    model = get_peft_model(build(), MAnyConfig(r=2, task_name=f"task-{task}"))
    perturb(model, "default", seed=task)
    collect_statistics(model, [batch_of(pictures_of(task))], progress=False)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    monkeypatch.setattr(image_layouts, "LAYOUTS", list(image_layouts.LAYOUTS))


def by_patches_per_picture(call: ProjectorCall) -> ImageRows | None:
    counts = call.image_arguments.get("patches_per_picture")
    return None if counts is None else ImageRows(torch.tensor(counts), flat=True)


@pytest.mark.usefixtures("registries")
def test_a_model_of_ones_own_is_trained_merged_and_routed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No projector was found in EyeAndMouth"):
        get_peft_model(build(), MAnyConfig())
    register_family("eye_and_mouth", Family(projectors=(BRIDGE,), language_model="mouth"))
    model = get_peft_model(build(), MAnyConfig())
    assert model.peft_config["default"].projector_modules == [BRIDGE]
    assert not any("lora" in name for name, _ in model.named_parameters() if ".mouth." not in name)
    with pytest.raises(RuntimeError, match=r"flat vision features.*register_image_layout"):
        collect_statistics(model, [batch_of(pictures_of(0))], progress=False)
    register_image_layout(by_patches_per_picture)

    folders = [adapter(task, tmp_path / str(task)) for task in range(2)]
    merged = merge_adapter_sequence(build(), folders, progress=False)
    pictures = [pictures_of(1)[0], pictures_of(0)[1], pictures_of(1)[2]]
    decided = decisions(merged, batch_of(pictures))
    assert decided.argmax(-1).tolist() == [1, 0, 1]
    with torch.no_grad():
        joint = merged(**batch_of(pictures))
        for row, picture in zip(joint, pictures, strict=True):
            alone = merged(**batch_of([picture]))[0]
            torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-5)
        merged.merge_and_unload()


@pytest.mark.usefixtures("registries")
def test_a_projector_of_an_unmeasured_adapter_is_told_by_what_is_registered(tmp_path: Path) -> None:
    folders = [tmp_path / str(task) for task in range(2)]
    for task, folder in enumerate(folders):
        config = LoraConfig(r=2, target_modules=["mouth.layers.0.self_attn.q_proj"], modules_to_save=[BRIDGE])
        model = get_peft_model(build(), config)
        perturb(model, "default", seed=task)
        model.save_pretrained(str(folder))
    merge = partial(
        merge_adapter_files, folders, tmp_path / "merged", method="average", projectors="mean", progress=False
    )
    with pytest.raises(UnmergeableAdapterError, match=rf"'{BRIDGE}\.\w+' belongs to a module .* is no projector"):
        merge()
    register_family("eye_and_mouth", Family(projectors=(BRIDGE,), language_model="mouth"))
    assert inspect_adapter(str(merge())).averaged_projectors == {BRIDGE: ["0", "1"]}


def decisions(merged: PeftModel, inputs: dict[str, Any]) -> Tensor:
    """The task weights of each image, shape `(images, tasks)`."""
    (mixture,) = (module for module in merged.modules() if isinstance(module, ProjectorMixture))
    seen: list[Tensor] = []
    mixture.task_weights = lambda pooled: seen.append(ProjectorMixture.task_weights(mixture, pooled)) or seen[-1]
    with torch.no_grad():
        merged(**inputs)
    del mixture.task_weights
    return seen[0]


@pytest.mark.usefixtures("registries")
def test_what_is_registered_last_is_asked_first() -> None:
    call = ProjectorCall(torch.randn(6, 4), image_arguments={"image_grid_thw": torch.tensor([[1, 2, 3]])})
    assert image_rows_of(call).lengths.tolist() == [6]

    def halves(call: ProjectorCall) -> ImageRows | None:
        return ImageRows(torch.tensor([3, 3]), flat=True)

    def nothing(call: ProjectorCall) -> ImageRows | None:
        return None

    for layout in (halves, nothing):
        assert register_image_layout(layout) is layout
        assert image_rows_of(call).lengths.tolist() == [3, 3]


@pytest.mark.usefixtures("registries")
def test_the_row_of_a_known_family_can_be_replaced() -> None:
    class Config:
        model_type = "internvl"

    class Model:
        config = Config()

    assert family.family_of(Model()).tiles is not None
    register_family("internvl", Family())
    assert family.family_of(Model()).tiles is None
