"""Adapters on the Hub, against a stand-in for its HTTP API: there is no network where tests run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
from peft import PeftConfig, PeftModel
from peft.utils import PeftWarning

from peft_many import inspect_adapter, merge_adapter_files, merge_adapter_sequence, merge_report
from peft_many.files.errors import MalformedAdapterError, UnmergeableAdapterError
from peft_many.hub.sources import AdapterNotFoundError, RemoteStatistics
from tests.adapters import STATISTICS, WEIGHTS, base, but_operations, distance, files, logits, make
from tests.hub_server import StandInHub, connect, talk_to

ADAPTER_FILES = ["adapter_config.json", WEIGHTS, STATISTICS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    names = {"one": 0, "two": 1, "newer": 2, "secret": 3}
    folders = {name: make(root / name, seed=seed, energy=0.999).folder for name, seed in names.items()}
    (folders["one"] / "adapter_model.bin").write_bytes(pickle.dumps("a pickle"))
    (folders["one"] / "optimizer.pt").write_bytes(b"large")
    return folders


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """The stand-in with four repositories, and huggingface_hub of this process talking to it."""
    with StandInHub() as server:
        talk_to(server, monkeypatch, tmp_path)
        server.add("me/one", made["one"])
        server.add("me/two", made["two"])
        server.add("me/two", made["newer"], branch="v2")
        server.add("me/secret", made["secret"], private=True)
        server.add("me/gated", made["secret"], gated=True)
        server.add("me/no-statistics", made["one"])
        del server.files("me/no-statistics")[STATISTICS]
        server.add("me/pickle-only", made["one"])
        del server.files("me/pickle-only")[WEIGHTS]
        yield server


def assert_not_found(tmp_path: Path, entry: str, *words: str, **options) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        merge_adapter_files([entry], tmp_path / "merged", progress=False, **options)
    assert "\n" not in str(caught.value)
    for word in (entry.partition("@")[0], *words):
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------------ merging


def test_merging_from_the_hub_equals_merging_from_folders(hub, made, tmp_path):
    names = ["one", "two"]
    local = merge_adapter_files([made["one"], made["two"]], tmp_path / "local", task_names=names, progress=False)
    remote = merge_adapter_files(["me/one", made["two"]], tmp_path / "remote", progress=False)
    for file in (WEIGHTS, STATISTICS):
        assert files(remote)[file] == files(local)[file]
    tasks = json.loads((remote / "adapter_config.json").read_text())["merge"]["tasks"]
    assert [(task["name"], task["origin"]["source"], task["origin"].get("revision")) for task in tasks] == [
        ("one", "me/one", hub.repositories["me/one"].branches["main"]),
        ("two", made["two"].name, None),  # never the path, which would be published
    ]
    model = merge_adapter_sequence(base("llava"), ["me/two", "me/one"], progress=False)
    assert distance(logits(model, "llava"), logits(PeftModel.from_pretrained(base("llava"), local), "llava")) == 0


def test_only_what_merging_reads_is_downloaded(hub, tmp_path):
    merge_adapter_files(["me/one"], tmp_path / "merged", progress=False)
    assert sorted(hub.downloads()) == sorted([*ADAPTER_FILES, "README.md"])  # the card for its data sets
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached == {*ADAPTER_FILES, "README.md"}


def test_a_cached_adapter_is_not_downloaded_again(hub, tmp_path):
    merge_adapter_files(["me/one"], tmp_path / "1", progress=False)
    hub.requests.clear()
    merge_adapter_files(["me/one"], tmp_path / "2", progress=False)
    assert hub.downloads() == []
    hub.requests.clear()
    merge_adapter_files(["me/one"], tmp_path / "3", local_files_only=True, progress=False)
    assert hub.requests == []
    assert files(tmp_path / "3") == files(tmp_path / "2") == files(tmp_path / "1")


def test_revisions(hub, made, tmp_path):
    commit = hub.repositories["me/two"].branches["v2"]
    hub.add("me/two", made["one"], branch="v2")  # the branch moves on; the commit stays
    for revision, name in (("", "two"), ("@main", "two"), ("@v2", "one"), (f"@{commit}", "newer")):
        output = tmp_path / f"merged{revision}"
        merge_adapter_files([f"me/two{revision}"], output, progress=False)
        expected = merge_adapter_files([made[name]], tmp_path / f"expected{revision}", progress=False)
        assert files(output)[WEIGHTS] == files(expected)[WEIGHTS], revision
    tasks = json.loads((output / "adapter_config.json").read_text())["merge"]["tasks"]
    assert (tasks[0]["origin"]["source"], tasks[0]["origin"]["revision"]) == ("me/two", commit)


def test_two_revisions_of_one_repository(hub, tmp_path):
    with pytest.raises(UnmergeableAdapterError, match=r"Two tasks are called 'two'.*task_names"):
        merge_adapter_files(["me/two@main", "me/two@v2"], tmp_path / "merged", progress=False)
    names = ["first", "second"]
    merge_adapter_files(["me/two@main", "me/two@v2"], tmp_path / "merged", task_names=names, progress=False)
    with pytest.raises(UnmergeableAdapterError, match="same adapter is given twice"):
        merge_adapter_files(["me/two", "me/two@main"], tmp_path / "twice", progress=False)


def test_private_repositories_need_the_token(hub, made, tmp_path):
    assert_not_found(tmp_path, "me/secret", "private", "set HF_TOKEN")
    assert_not_found(tmp_path, "me/secret", "private", token="hf_wrong")
    output = merge_adapter_files(["me/secret"], tmp_path / "merged", token=hub.token, progress=False)
    expected = merge_adapter_files([made["secret"]], tmp_path / "expected", progress=False)
    assert files(output)[WEIGHTS] == files(expected)[WEIGHTS]
    model = merge_adapter_sequence(base("llava"), ["me/secret"], token=hub.token, progress=False)
    assert model.active_adapters == ["default"]


def test_gated_repositories(hub, tmp_path):
    assert_not_found(tmp_path, "me/gated", "gated", "access")
    merge_adapter_files(["me/gated"], tmp_path / "merged", token=hub.token, progress=False)


def test_another_cache(hub, tmp_path):
    merge_adapter_files(["me/one"], tmp_path / "merged", cache_dir=tmp_path / "elsewhere", progress=False)
    assert (tmp_path / "elsewhere" / "models--me--one").is_dir()
    assert not (tmp_path / "cache").exists()


def test_what_is_not_there(hub, tmp_path):
    assert_not_found(tmp_path, "me/unknown", "no Hub repository 'me/unknown'")
    assert_not_found(tmp_path, "me/two@v3", "no revision 'v3'")
    assert_not_found(tmp_path, f"me/two@{'0' * 40}", f"no revision '{'0' * 40}'")
    assert_not_found(tmp_path, "me/one/two/three", "no folder")
    assert_not_found(tmp_path, "./one", "no folder")
    assert_not_found(tmp_path, "me/one", "not in the cache", local_files_only=True)


def test_no_network(hub, tmp_path, monkeypatch):
    merge_adapter_files(["me/one"], tmp_path / "1", progress=False)
    with StandInHub() as other:
        unreachable = other.url
    connect(monkeypatch, unreachable)
    assert_not_found(tmp_path, "me/two", "cannot be reached")
    merge_adapter_files(["me/one"], tmp_path / "2", progress=False)  # from the cache
    assert files(tmp_path / "2") == files(tmp_path / "1")


def test_a_hub_that_fails(hub, tmp_path):
    hub.broken = True
    assert_not_found(tmp_path, "me/one", "cannot be reached")


def test_a_hub_that_fails_in_the_middle(hub, tmp_path, monkeypatch):
    """The listing arrives, the files do not: nothing is left that a later merge would take for an adapter."""
    real = hub.repositories["me/one"].resolve
    monkeypatch.setattr(hub.repositories["me/one"], "resolve", lambda revision: _breaks(hub, real(revision)))
    with pytest.raises(AdapterNotFoundError) as caught:
        merge_adapter_files(["me/one"], tmp_path / "merged", progress=False)
    assert "me/one" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(hub.repositories["me/one"], "resolve", real)
    hub.broken = False
    merge_adapter_files(["me/one"], tmp_path / "merged", progress=False)


@pytest.mark.parametrize("fault", ["drop", "short", "stall", "error"])
def test_a_download_that_breaks_off(hub, made, tmp_path, monkeypatch, fault):
    """Once, it is tried again; for good, it is an error, and no half of a file is ever taken for the whole."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.fault, hub.faults_left = fault, 10**6
    assert_not_found(tmp_path, "me/one")
    hub.faults_left = 1 if fault != "error" else 0  # which huggingface_hub gives up at, for files
    merge_adapter_files(["me/one"], tmp_path / "merged", progress=False)
    merge_adapter_files([made["one"]], tmp_path / "expected", progress=False)
    assert files(tmp_path / "merged")[WEIGHTS] == files(tmp_path / "expected")[WEIGHTS]


def _breaks(hub, commit):
    hub.broken = any("/tree/" in path for _, path in hub.requests)
    return commit


def test_adapters_on_the_hub_that_cannot_be_merged(hub, tmp_path):
    with pytest.raises(UnmergeableAdapterError, match="me/no-statistics has no statistics"):
        merge_adapter_files(["me/no-statistics"], tmp_path / "merged", progress=False)
    with pytest.raises(UnmergeableAdapterError, match=f"me/pickle-only has no {WEIGHTS}"):
        merge_adapter_files(["me/pickle-only"], tmp_path / "merged", progress=False)
    assert not any(path.endswith(".bin") for path in hub.downloads())
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------- inference, saving, and pushing


def test_inference_downloads_no_statistics(hub, made):
    model = PeftModel.from_pretrained(base("llava"), "me/one")
    assert (
        distance(logits(model, "llava"), logits(PeftModel.from_pretrained(base("llava"), made["one"]), "llava")) == 0
    )
    other = base("llava")
    other.load_adapter("me/two")
    assert STATISTICS not in hub.downloads()
    assert set(hub.downloads()) == {"adapter_config.json", WEIGHTS}
    assert isinstance(model.peft_config["default"].statistics, RemoteStatistics)


def test_reading_a_config_downloads_nothing_else(hub, made, tmp_path):
    hub.add("me/merge", merge_adapter_files([made["one"], made["two"]], tmp_path / "merged", progress=False))
    for name in ("me/one", "me/merge"):
        config = PeftConfig.from_pretrained(name, token=hub.token)
        assert hub.token.encode() not in pickle.dumps(config)
    assert hub.downloads() == ["adapter_config.json"] * 2
    PeftModel.from_pretrained(base("llava"), "me/merge", config=config)
    assert hub.downloads().count(WEIGHTS) == 1


def test_saving_again_fetches_the_statistics(hub, made, tmp_path):
    model = PeftModel.from_pretrained(base("llava"), "me/two", revision="v2")
    commit = hub.repositories["me/two"].branches["v2"]
    hub.add("me/two", made["one"], branch="v2")  # the statistics must still be those of the weights
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved")[STATISTICS] == files(made["newer"])[STATISTICS]
    assert hub.downloads().count(STATISTICS) == 1
    assert ("GET", f"me/two/resolve/{commit}/{STATISTICS}") in hub.requests
    merge_adapter_files([tmp_path / "saved"], tmp_path / "merged", progress=False)


def test_saving_again_uses_the_token_and_the_cache_folder(hub, made, tmp_path):
    cache = tmp_path / "elsewhere"
    model = PeftModel.from_pretrained(base("llava"), "me/secret", token=hub.token, cache_dir=cache)
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved")[STATISTICS] == files(made["secret"])[STATISTICS]
    assert not (tmp_path / "cache").exists()


def test_saving_again_without_network_says_what_is_lost(hub, tmp_path, monkeypatch):
    model = PeftModel.from_pretrained(base("llava"), "me/one")
    with StandInHub() as other:
        unreachable = other.url
    connect(monkeypatch, unreachable)
    with pytest.warns(PeftWarning, match="statistics of 'me/one' cannot be fetched"):
        model.save_pretrained(tmp_path / "saved")
    assert WEIGHTS in files(tmp_path / "saved")
    assert STATISTICS not in files(tmp_path / "saved")


@pytest.mark.parametrize("fault", ["drop", "short", "error"])
def test_saving_again_when_the_download_breaks_off_says_what_is_lost(hub, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    model = PeftModel.from_pretrained(base("llava"), "me/one")
    hub.fault, hub.faults_left, hub.faulty = fault, 10**6, STATISTICS
    with pytest.warns(PeftWarning, match="statistics of 'me/one' cannot be fetched"):
        model.save_pretrained(tmp_path / "saved")
    assert STATISTICS not in files(tmp_path / "saved")


def test_saving_an_adapter_that_has_no_statistics(hub, tmp_path):
    model = PeftModel.from_pretrained(base("llava"), "me/no-statistics")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        model.save_pretrained(tmp_path / "saved")
    assert STATISTICS not in files(tmp_path / "saved")


def test_statistics_in_a_subfolder(hub, made, tmp_path):
    nested = {f"deep/er/{name}": data for name, data in hub.files("me/two").items()}
    hub.repositories["me/two"].commit(nested, "nested")
    config = PeftConfig.from_pretrained("me/two", subfolder="deep/er", revision="nested")
    config.save_pretrained(tmp_path)
    assert files(tmp_path)[STATISTICS] == files(made["two"])[STATISTICS]


def test_push_to_hub_uploads_the_statistics(hub, made, tmp_path):
    model = PeftModel.from_pretrained(base("llava"), made["two"])
    model.push_to_hub("me/pushed", token=hub.token)
    assert {*ADAPTER_FILES, "README.md"} <= set(hub.files("me/pushed"))
    for file in (WEIGHTS, STATISTICS):
        assert hub.files("me/pushed")[file] == files(made["two"])[file]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    pushed = merge_adapter_files(["me/pushed"], tmp_path / "1", progress=False)
    assert files(pushed)[WEIGHTS] == files(merge_adapter_files([made["two"]], tmp_path / "2", progress=False))[WEIGHTS]


def test_a_merge_goes_round_through_the_hub(hub, made, tmp_path):
    """Merge, push, load, push again, merge further: as if it had all been done at once."""
    merged = merge_adapter_sequence(base("llava"), ["me/one", "me/two"], progress=False)
    merged.push_to_hub("me/merged", token=hub.token)
    loaded = PeftModel.from_pretrained(base("llava"), "me/merged")
    assert distance(logits(loaded, "llava"), logits(merged, "llava")) == 0
    hub.requests.clear()
    loaded.push_to_hub("me/merged-again", token=hub.token, private=True)
    assert hub.downloads().count(STATISTICS) == 1
    for file in (WEIGHTS, STATISTICS):
        assert hub.files("me/merged-again")[file] == hub.files("me/merged")[file]
    further = merge_adapter_files(
        [made["newer"], "me/merged-again"], tmp_path / "further", token=hub.token, progress=False
    )
    at_once = merge_adapter_files([made["newer"], "me/two", "me/one"], tmp_path / "at once", progress=False)
    assert but_operations(further) == but_operations(at_once)


SCRIPT = """
import sys
import peft_many
from peft import PeftModel
from tests.adapters import base

merged = peft_many.merge_adapter_sequence(base("llava"), ["me/one", "me/two@v2", "me/secret"])
merged.push_to_hub("me/all", private=True)
PeftModel.from_pretrained(base("llava"), "me/all").save_pretrained(sys.argv[1])
"""


def test_in_a_process_with_the_usual_environment(hub, made, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN are all that tells huggingface_hub; nothing is patched."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    environment |= {"PYTHONPATH": str(Path.cwd()), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.repositories["me/all"].private
    local = merge_adapter_files(
        [made["one"], made["newer"], made["secret"]],
        tmp_path / "local",
        task_names=["one", "two", "secret"],
        progress=False,
    )
    for file in (WEIGHTS, STATISTICS):
        assert files(tmp_path / "saved")[file] == files(local)[file]
        assert hub.files("me/all")[file] == files(local)[file]
    assert not any(path.endswith((".bin", ".pt")) for path in hub.downloads())


# ------------------------------------------------------------------------------------------------------ what to trust


def test_what_a_config_on_the_hub_declares_is_checked_before_it_is_allocated(hub, made):
    tree = hub.files("me/one")
    tree["adapter_config.json"] = json.dumps({**json.loads(tree["adapter_config.json"]), "r": 10**9}).encode()
    with pytest.raises(MalformedAdapterError, match=r"me/one: .*rank 1000000000.*rank 4"):
        PeftModel.from_pretrained(base("llava"), "me/one")
    del tree[WEIGHTS]  # the pickle beside it is not opened for this
    with pytest.raises(MalformedAdapterError, match="rank 0"):
        PeftModel.from_pretrained(base("llava"), "me/one", cache_dir=made["one"].parent / "another cache")
    assert not any(path.endswith(".bin") for path in hub.downloads())


def test_a_merge_on_the_hub_is_loaded_with_one_download(hub, made, tmp_path):
    hub.add("me/merge", merge_adapter_files([made["one"], made["two"]], tmp_path / "merged", progress=False))
    PeftModel.from_pretrained(base("llava"), "me/merge")
    assert hub.downloads().count(WEIGHTS) == 1


def test_a_mistyped_keyword_is_no_keyword_of_the_hub(made):
    for call in (inspect_adapter, merge_report):
        with pytest.raises(TypeError, match="unexpected keyword argument 'tokn'"):
            call(made["one"], tokn="x")
