"""Which rows belong to which image: told by token ids, by a projector's first layer, and by masks of padding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_many.families import layouts
from peft_many.families.image_layout import ImageLayout
from peft_many.families.layouts import current_layout, image_runs
from peft_many.families.rows import EXCEPTIONS, Tiles
from tests.families.prompts import END, PROMPTS

IMAGE = 99
PER_TILE = 3

# The tiles of each image of a row, and how many tokens of text follow it.
rows = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=5)


@pytest.mark.parametrize(
    ("prompt", "family"),
    [
        ("run", "internvl"),
        ("marked", "aya_vision"),
        ("parted", "ovis2"),
        ("rows", "idefics3"),
        ("ended", "llama4"),
        ("sliced", "minicpmv4_6"),
    ],
)
@given(images=rows)
def test_the_tiles_of_an_image_are_counted_together(prompt: str, family: str, images: list[tuple[int, int]]) -> None:
    ids = [1]
    for tiles, text in images:
        ids += PROMPTS[prompt]([[IMAGE] * PER_TILE] * tiles, END) + [7] * text
    how = EXCEPTIONS[family].tiles
    assert how is not None
    assert image_runs(ids, IMAGE, how, END if prompt == "ended" else None) == [PER_TILE * tiles for tiles, _ in images]


@pytest.mark.parametrize("line_breaks", [1, 2])
def test_a_tokenizer_may_join_line_breaks(line_breaks: int) -> None:
    fence, row, whole, line_break = 50, 51, 52, 53
    ids = [fence, row, IMAGE, fence, row + 9, IMAGE, *[line_break] * line_breaks, fence, whole, IMAGE, fence]
    assert image_runs(ids * 2, IMAGE, Tiles(4)) == [3, 3]


@given(images=st.lists(st.integers(0, 3), min_size=1, max_size=4), tiles=st.sampled_from([1, 5]))
def test_images_without_text_in_between_are_told_apart_by_the_number_of_their_tiles(
    images: list[int], tiles: int
) -> None:
    """Idefics2 puts one fence between tiles and between images alike; its images are cut into five, or none is."""
    ids = [1]
    for text in images:
        ids += PROMPTS["fenced"]([[IMAGE] * PER_TILE] * tiles, END) + [7] * text
    assert image_runs(ids, IMAGE, Tiles(1, number=5)) == [PER_TILE * tiles] * len(images)


class Late(nn.Module):
    """A projector whose linear layer is not registered first."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(4), first


def test_a_convolutions_map_is_pooled_over_its_places() -> None:
    features = torch.randn(3, 8, 4, 4)
    for projector in (nn.Conv2d(8, 2, 1), nn.Linear(8, 2), Late(nn.Linear(8, 2)), nn.Sequential(nn.Conv2d(8, 2, 1))):
        layout = current_layout(features, projector)
        torch.testing.assert_close(layout.pool(features), features.mean((2, 3)))
    channels_last = current_layout(features, nn.Linear(4, 2))
    torch.testing.assert_close(channels_last.pool(features), features.mean((1, 2)))


def test_padding_is_not_pooled_and_is_no_image() -> None:
    features = torch.randn(2, 3, 5, 4)
    real = torch.tensor([[True, True, False], [False, False, False]])
    layout = ImageLayout(torch.tensor([3, 3]), flat=False, leading=2, real=real.reshape(-1))
    pooled = layout.pool(features)
    torch.testing.assert_close(pooled[0], features[0, :2].mean((0, 1)))
    assert not pooled[1].any()
    assert layout.real_images.tolist() == [True, False]


def test_outputs_may_have_other_proportions_than_inputs() -> None:
    layout = ImageLayout(torch.tensor([1, 2]), flat=False, outputs=ImageLayout(torch.tensor([4, 3]), flat=True))
    weights, outputs = torch.tensor([0.25, 0.75]), torch.randn(7, 2)
    mixed = layout.add_weighted(None, outputs, weights, torch.tensor([True, True]))
    torch.testing.assert_close(mixed, torch.cat([0.25 * outputs[:4], 0.75 * outputs[4:]]))
    assert not layout.can_cut((torch.randn(3, 5, 6),), {})


def test_further_features_of_all_images_are_not_cut_as_if_there_were_one_for_each() -> None:
    features = torch.randn(2, 5, 6)
    layout = ImageLayout(torch.tensor([1, 1]), flat=False)
    assert layout.can_cut((features, [torch.zeros(3), torch.ones(2)]), {})
    assert not layout.can_cut((features, [torch.randn(2, 5, 6), torch.randn(2, 5, 6)]), {})


@pytest.mark.parametrize("name", ["attention_mask", "attn_mask"])
def test_padding_inside_of_tiles_is_not_pooled(name: str) -> None:
    features, real = torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    mask = real if name == "attention_mask" else ~real
    layout = current_layout(features, nn.Linear(5, 2), {name: mask})
    torch.testing.assert_close(layout.pool(features), torch.stack([f[m].mean(0) for f, m in zip(features, real)]))
    of_two = replace(layout, lengths=torch.tensor([2, 1]))
    torch.testing.assert_close(of_two.pool(features)[0], torch.cat([features[0, :2], features[1]]).mean(0))
    without = current_layout(features, nn.Linear(5, 2), {name: torch.zeros(3, 4)})  # numbers to add to scores
    torch.testing.assert_close(without.pool(features), features.mean(1))


def test_a_list_may_hold_several_entries_of_each_image() -> None:
    layout = ImageLayout(torch.tensor([5, 2]), flat=True, parts=torch.tensor([2, 1]))
    weights, outputs = torch.tensor([0.25, 0.75]), [torch.randn(4, 2), torch.randn(1, 2), torch.randn(2, 2)]
    mixed = layout.add_weighted(None, outputs, weights, torch.tensor([True, True]))
    for one, weight, output in zip(mixed, (0.25, 0.25, 0.75), outputs, strict=True):
        torch.testing.assert_close(one, weight * output)


def test_pictures_that_no_token_attends_to_are_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """IDEFICS fills rows up with empty pictures."""
    mask = torch.zeros(2, 5, 2, dtype=torch.long)
    mask[0, 1:], mask[1, 3:, 0] = 1, 1
    arguments = {"pixel_values": torch.zeros(2, 2, 3, 8, 8), "image_attention_mask": mask}
    monkeypatch.setattr(layouts, "current_model_call", lambda: (nn.Identity(), arguments))
    features = torch.randn(4, 6, 3)
    layout = current_layout(features)
    assert layout.real_images.tolist() == [True, True, True, False]
    torch.testing.assert_close(layout.pool(features)[:3], features[:3].mean(1))
