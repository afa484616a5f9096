"""Base models on the Hub, where downloads fail: an error that says so, no export, and none that lacks a file."""

from __future__ import annotations

import huggingface_hub
import pytest

from peft_many import export_model, export_routed_model
from tests.adapters import files
from tests.exports.shelf import Shelf
from tests.hub_server import StandInHub, connect, talk_to


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf.with_merge(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def hub(shelf, tmp_path, monkeypatch):
    with StandInHub() as server:
        talk_to(server, monkeypatch, tmp_path)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        server.add("me/base", shelf.base)
        yield server


@pytest.mark.parametrize(
    ("faulty", "fault", "export"),
    [
        ("config.json", "error", export_model),
        ("model.safetensors", "short", export_routed_model),
        ("model.safetensors", "stall", export_model),
        ("tokenizer.json", "drop", export_model),
        ("tokenizer.json", "short", export_routed_model),
        ("tokenizer.json", "stall", export_routed_model),
        ("tokenizer.json", "error", export_model),
    ],
)
def test_a_download_that_breaks_off(hub, shelf, tmp_path, export, faulty, fault):
    hub.faulty, hub.fault, hub.faults_left = faulty, fault, 10**6
    with pytest.raises(OSError, match="me/base") as error:
        export(shelf.root / "merged", tmp_path / "out" / "exported", base_model="me/base")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    hub.faults_left = 0
    export(shelf.root / "merged", tmp_path / "out" / "exported", base_model="me/base")
    export(shelf.root / "merged", tmp_path / "local", base_model=shelf.base)
    found, expected = files(tmp_path / "out" / "exported"), files(tmp_path / "local")
    assert set(found) == set(expected)
    assert found["tokenizer.json"] == b"{}"
    assert found["model.safetensors"] == expected["model.safetensors"]


def test_no_network(hub, shelf, tmp_path, monkeypatch):
    export_model(shelf.root / "merged", tmp_path / "1", base_model="me/base")
    with StandInHub() as other:
        unreachable = other.url
    connect(monkeypatch, unreachable)
    export_model(shelf.root / "merged", tmp_path / "2", base_model="me/base")  # from the cache
    assert files(tmp_path / "2") == files(tmp_path / "1")
    with pytest.raises(FileNotFoundError, match="The base model 'me/other' cannot be loaded"):
        export_model(shelf.root / "merged", tmp_path / "3", base_model="me/other")
