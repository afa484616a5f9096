"""Which rows belong to which image: told by token ids, by a projector's first layer, and by masks of padding."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from peft_many.families import ImageRows, ProjectorCall
from peft_many.families.image_layouts import image_rows_of


class Late(nn.Module):
    """A projector whose linear layer is not registered first."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(4), first


def test_a_convolutions_map_is_pooled_over_its_places() -> None:
    features = torch.randn(3, 8, 4, 4)
    for projector in (nn.Conv2d(8, 2, 1), nn.Linear(8, 2), Late(nn.Linear(8, 2)), nn.Sequential(nn.Conv2d(8, 2, 1))):
        layout = image_rows_of(ProjectorCall(features, projector))
        torch.testing.assert_close(layout.pool(features), features.mean((2, 3)))
    channels_last = image_rows_of(ProjectorCall(features, nn.Linear(4, 2)))
    torch.testing.assert_close(channels_last.pool(features), features.mean((1, 2)))


def test_padding_is_not_pooled_and_is_no_image() -> None:
    features = torch.randn(2, 3, 5, 4)
    real = torch.tensor([[True, True, False], [False, False, False]])
    layout = ImageRows(torch.tensor([3, 3]), flat=False, leading=2, real=real.reshape(-1))
    pooled = layout.pool(features)
    torch.testing.assert_close(pooled[0], features[0, :2].mean((0, 1)))
    assert not pooled[1].any()
    assert layout.real_images.tolist() == [True, False]


def test_outputs_may_have_other_proportions_than_inputs() -> None:
    layout = ImageRows(torch.tensor([1, 2]), flat=False, outputs=ImageRows(torch.tensor([4, 3]), flat=True))
    weights, outputs = torch.tensor([0.25, 0.75]), torch.randn(7, 2)
    mixed = layout.add_weighted(None, outputs, weights, torch.tensor([True, True]))
    torch.testing.assert_close(mixed, torch.cat([0.25 * outputs[:4], 0.75 * outputs[4:]]))
    assert not layout.can_cut((torch.randn(3, 5, 6),), {})


def test_further_features_of_all_images_are_not_cut_as_if_there_were_one_for_each() -> None:
    features = torch.randn(2, 5, 6)
    layout = ImageRows(torch.tensor([1, 1]), flat=False)
    assert layout.can_cut((features, [torch.zeros(3), torch.ones(2)]), {})
    assert not layout.can_cut((features, [torch.randn(2, 5, 6), torch.randn(2, 5, 6)]), {})


@pytest.mark.parametrize("name", ["attention_mask", "attn_mask"])
def test_padding_inside_of_tiles_is_not_pooled(name: str) -> None:
    features, real = torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    mask = real if name == "attention_mask" else ~real
    layout = image_rows_of(ProjectorCall(features, nn.Linear(5, 2), {name: mask}))
    torch.testing.assert_close(layout.pool(features), torch.stack([f[m].mean(0) for f, m in zip(features, real)]))
    of_two = replace(layout, lengths=torch.tensor([2, 1]))
    torch.testing.assert_close(of_two.pool(features)[0], torch.cat([features[0, :2], features[1]]).mean(0))
    without = image_rows_of(
        ProjectorCall(features, nn.Linear(5, 2), {name: torch.zeros(3, 4)})
    )  # numbers to add to scores
    torch.testing.assert_close(without.pool(features), features.mean(1))


def test_a_list_may_hold_several_entries_of_each_image() -> None:
    layout = ImageRows(torch.tensor([5, 2]), flat=True, parts=torch.tensor([2, 1]))
    weights, outputs = torch.tensor([0.25, 0.75]), [torch.randn(4, 2), torch.randn(1, 2), torch.randn(2, 2)]
    mixed = layout.add_weighted(None, outputs, weights, torch.tensor([True, True]))
    for one, weight, output in zip(mixed, (0.25, 0.25, 0.75), outputs, strict=True):
        torch.testing.assert_close(one, weight * output)


def test_pictures_that_no_token_attends_to_are_no_images() -> None:
    """IDEFICS fills rows up with empty pictures."""
    mask = torch.zeros(2, 5, 2, dtype=torch.long)
    mask[0, 1:], mask[1, 3:, 0] = 1, 1
    arguments = {"pixel_values": torch.zeros(2, 2, 3, 8, 8), "image_attention_mask": mask}
    features = torch.randn(4, 6, 3)
    layout = image_rows_of(ProjectorCall(features, model=nn.Identity(), model_arguments=arguments))
    assert layout.real_images.tolist() == [True, True, True, False]
    torch.testing.assert_close(layout.pool(features)[:3], features[:3].mean(1))
