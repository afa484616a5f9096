"""How many placeholder tokens each image of a prompt has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_many.families import Tiles
from peft_many.families.family import FAMILIES
from peft_many.families.prompts import image_runs
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
    how = FAMILIES[family].tiles
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
