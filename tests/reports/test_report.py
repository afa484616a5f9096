"""Reports from folders, as data, pictures and a page."""

import base64
import html
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_many import merge_adapter_files, merge_adapter_sequence, merge_report, save_report
from peft_many.files.errors import StatisticsError
from peft_many.reports.costs import amount
from peft_many.reports.page import draw
from tests import adapters


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    return [
        adapters.make(root / name, seed=seed, task_name=name).folder for seed, name in enumerate(("a<b", "c", "d"))
    ]


@pytest.fixture(scope="module")
def merge(folders, tmp_path_factory):
    return merge_adapter_files(folders, tmp_path_factory.mktemp("merge") / "merged", progress=False)


def test_a_folder_gives_the_report_of_the_model(folders, merge):
    in_memory = merge_report(merge_adapter_sequence(adapters.base("llava"), folders, progress=False), progress=False)
    on_disk = merge_report(merge, progress=False)
    order = [in_memory.layers.index(layer) for layer in on_disk.layers]
    assert torch.allclose(on_disk.residuals, in_memory.residuals[order], rtol=1e-6)
    assert torch.allclose(on_disk.conflicts, in_memory.conflicts, rtol=1e-6, equal_nan=True)
    assert on_disk.weight_bytes == in_memory.weight_bytes
    assert on_disk.statistics_bytes == in_memory.statistics_bytes
    assert on_disk.routing == in_memory.routing


def test_layers_are_in_the_order_of_their_depth(merge):
    layers = merge_report(merge, conflicts=False, progress=False).layers
    depths = [int(re.search(r"layers\.(\d+)", layer).group(1)) for layer in layers]
    assert depths == sorted(depths)


def test_the_page_needs_nothing_else(merge, tmp_path):
    report = merge_report(merge, progress=False)
    page = save_report(report, tmp_path / "out")
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "report.png", "report.json"}
    text = page.read_text(encoding="utf-8")
    assert "a&lt;b" in text
    assert "a<b" not in text
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    for value in report.interference.values():
        assert f"{value:.3f}" in text
    assert json.loads((page.parent / "report.json").read_text()) == report.to_dict()
    (expected,) = report.routing.values()
    assert html.escape(expected.in_words(adapters.PROJECTOR)[0], quote=True).replace("&#x27;", "&#39;") in text
    with Image.open(page.parent / "report.png") as image:
        assert min(image.size) > 300


def test_a_report_without_conflicts_and_of_one_task_can_be_drawn(folders, tmp_path):
    one = merge_adapter_files(folders[:1], tmp_path / "one", progress=False)
    for conflicts in (True, False):
        assert save_report(merge_report(one, conflicts=conflicts, progress=False), tmp_path / f"{conflicts}").is_file()


def test_colours_and_words_do_not_depend_on_what_else_is_found(merge):
    report = merge_report(merge, progress=False)
    pictures = [image for axis in draw(report).axes for image in axis.get_images()]
    assert len(pictures) == 3
    assert {image.get_clim() for image in pictures} == {(0, 1)}
    assert [amount(residual) for residual in (0.0, 0.133, 0.4, 1.2)] == ["hardly anything", "a little", "much", "most"]
    small = replace(report, conflicts=report.conflicts / 100)
    (line,) = small.conflicts_in_words()
    assert line.startswith("No two tasks contradict each other")


def test_single_adapters_are_refused(folders):
    with pytest.raises(ValueError, match="no merge"):
        merge_report(folders[0], progress=False)


def test_damaged_statistics_are_refused(merge, tmp_path):
    for file in merge.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / adapters.STATISTICS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    key = next(key for key in tensors if ".covariance." in key)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata)
    with pytest.raises(StatisticsError, match="covariance"):
        merge_report(tmp_path, progress=False)
