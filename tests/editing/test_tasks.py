"""Tasks that are added to a merge, forgotten and weighted anew: as if it had been made so in the first place."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peft_many.files.atomic
from peft_many import add_task, merge_adapter_files, merge_adapter_sequence, remove_task, reweight_tasks
from peft_many.files.errors import UnmergeableAdapterError
from peft_many.methods import Ties
from tests import new_process
from tests.adapters import STATISTICS, WEIGHTS, base, but_operations, distance, files, logits, make


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, Path]:
    """Three tasks, one that trained other layers, one that trained no projector; they must stay as they are."""
    root = tmp_path_factory.mktemp("shelf")
    few = {"target_modules": r".*language_model.*q_proj"}
    options = {"a": {}, "b": {"r": 2}, "c": {"r": 3}, "few": few, "blind": {"projector_modules": []}}
    made = {
        name: make(root / name, seed=seed, task_name=name, **more).folder
        for seed, (name, more) in enumerate(options.items())
    }
    before = {name: files(folder) for name, folder in made.items()}
    yield made
    assert {name: files(folder) for name, folder in made.items()} == before
    assert sorted(path.name for path in root.iterdir()) == sorted(made)


def merge(shelf: dict[str, Path], names: str, output: Path, **options) -> Path:
    return merge_adapter_files([shelf[name] for name in names.split()], output, progress=False, **options)


OPTIONS = {
    "defaults": {},
    "routing": {"router": "gaussian", "temperature": 0.7, "top_k": 1, "abstain_above": 3.0, "ridge": 1e-3},
    "low rank": {"rank": 3},
    "half precision": {"dtype": torch.bfloat16},
    "gated": {"gate_lora": True},
    "high rank": {"rank": 30},
    "ties": {"method": Ties(density=0.4)},
    "robust": {"method": "robust_merge", "rank": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_was_removed_was_never_there(shelf, tmp_path, options):
    """To the byte, all but the record of what was done; and adding it again gives back the bytes of before."""
    whole = merge(shelf, "a b c", tmp_path / "whole", **options)
    before = files(whole)
    left = remove_task(whole, "b", tmp_path / "left", progress=False)
    assert but_operations(left) == but_operations(merge(shelf, "a c", tmp_path / "never", **options))
    assert files(whole) == before
    again = add_task(left, shelf["b"], tmp_path / "again", progress=False)
    assert but_operations(again) == but_operations(whole)


@pytest.mark.parametrize("gone", ["a", "few", "blind"])
def test_tasks_that_trained_other_layers(shelf, tmp_path, gone):
    """The config may name its layers in other words; it must adapt the same ones."""
    names = ["a", "few", "blind"]
    left = remove_task(merge(shelf, " ".join(names), tmp_path / "whole"), gone, tmp_path / "left", progress=False)
    rest = " ".join(name for name in names if name != gone)
    never = merge(shelf, rest, tmp_path / "never")
    found, expected = but_operations(left), but_operations(never)
    for other_words in (found.pop("adapter_config.json"), expected.pop("adapter_config.json")):
        assert {task["name"] for task in other_words["merge"]["tasks"]} == {*names} - {gone}
    assert found == expected
    loaded = [PeftModel.from_pretrained(base("llava"), folder) for folder in (left, never)]
    states = [model.state_dict() for model in loaded]
    assert states[0].keys() == states[1].keys()
    torch.testing.assert_close(logits(loaded[0], "llava"), logits(loaded[1], "llava"), rtol=0, atol=0)


def test_layers_that_only_the_removed_task_trained_are_gone(shelf, tmp_path):
    whole = merge(shelf, "a few", tmp_path / "whole")
    left = remove_task(whole, "a", tmp_path / "left", progress=False)
    adapted = {key.partition(".lora_")[0] for key in load_file(left / WEIGHTS) if ".lora_" in key}
    assert adapted
    assert all(name.endswith("q_proj") for name in adapted)
    model = PeftModel.from_pretrained(base("llava"), left)
    assert {key.partition(".lora_")[0] for key in model.state_dict() if ".lora_A" in key} == adapted


def test_nothing_of_a_removed_task_is_left_in_the_files(shelf, tmp_path):
    """No row of any of its tensors, whichever file one looks into; while it was there they were all found."""
    whole = merge(shelf, "a b c", tmp_path / "whole")
    rows = {
        f"{kind} {key} {i}": row.contiguous().numpy().tobytes()
        for kind in (WEIGHTS, STATISTICS)
        for key, tensor in load_file(shelf["b"] / kind).items()
        for i, row in enumerate(tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else [tensor.reshape(1)])
        if ".lora_" not in key  # which a merge stores scaled or transposed; its statistics have them, see below
    }
    merged = load_file(whole / STATISTICS)
    rows |= {
        f"{key} {i}": row.numpy().tobytes()
        for key, tensor in merged.items()
        if key.startswith("1.")
        for i, row in enumerate(tensor.reshape(-1, tensor.shape[-1]))
    }
    assert len(rows) > 500
    everything = b"".join(files(whole).values())
    assert [name for name, content in rows.items() if content not in everything] == []
    remove_task(whole, "b", progress=False)
    left = b"".join(files(whole).values())
    assert [name for name, content in rows.items() if content in left] == []
    assert b'"b"' not in left
    assert json.loads((shelf["b"] / "adapter_config.json").read_text())["task_name"] == "b"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_the_folder_itself_is_replaced_whole(shelf, tmp_path, monkeypatch, in_one_step):
    if not in_one_step:  # as on systems that cannot exchange two names
        monkeypatch.setattr(peft_many.files.atomic, "_exchange", lambda one, two: False)
    folder = merge(shelf, "a b", tmp_path / "merge")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nA word of mine.\n")
    assert remove_task(folder, "b", progress=False) == folder
    found = files(folder)
    assert "A word of mine." in found["README.md"].decode()
    expected = but_operations(merge(shelf, "a", tmp_path / "expected"))
    assert {**but_operations(folder), "README.md": ""} == {**expected, "README.md": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "merge"]
    add_task(folder, shelf["c"], weights={"a": 2.0}, progress=False)
    assert files(folder)[WEIGHTS] == files(merge(shelf, "a c", tmp_path / "2", weights=[2.0, 1.0]))[WEIGHTS]


def test_other_files_in_the_folder_stay(shelf, tmp_path):
    folder = merge(shelf, "a b", tmp_path / "merge")
    (folder / "notes.txt").write_text("precious")
    before = files(folder)
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        remove_task(folder, "b", folder, progress=False)
    assert files(folder) == before
    remove_task(folder, "b", progress=False)
    found = files(folder)
    assert found.pop("notes.txt") == b"precious"
    assert found.keys() == files(merge(shelf, "a", tmp_path / "expected")).keys()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_replacement_leaves_the_old_folder(shelf, tmp_path, monkeypatch, error):
    folder = merge(shelf, "a b", tmp_path / "merge")
    before = files(folder)

    def fail(*args):
        raise error

    monkeypatch.setattr("peft_many.files.atomic.replace_folder", fail)
    with pytest.raises(type(error)):
        remove_task(folder, "b", progress=False)
    assert files(folder) == before
    monkeypatch.undo()
    remove_task(folder, "b", progress=False)
    assert files(folder)[WEIGHTS] == files(merge(shelf, "a", tmp_path / "expected"))[WEIGHTS]


def test_weights_by_name_are_those_of_the_tasks(shelf, tmp_path):
    """Also of tasks inside a merge, whose adapters are not needed; ridge and rank may change with them."""
    first = merge(shelf, "a b", tmp_path / "first", weights=[3.0, 0.5], ridge=1e-2)
    again = merge_adapter_files([first], tmp_path / "again", weights={"a": 0.25}, ridge=1e-5, rank=4, progress=False)
    expected = merge(shelf, "a b", tmp_path / "expected", weights=[0.25, 0.5], ridge=1e-5, rank=4)
    assert but_operations(again) == but_operations(expected)
    named = merge(shelf, "a b c", tmp_path / "named", weights={"c": 2.0})
    assert but_operations(named) == but_operations(merge(shelf, "a b c", tmp_path / "listed", weights=[1.0, 1.0, 2.0]))


def test_tasks_can_be_left_out_on_a_model_too(shelf, tmp_path):
    whole = merge(shelf, "a b c", tmp_path / "whole")
    left = merge_adapter_sequence(base("llava"), [whole], without=["b"], progress=False)
    expected = merge_adapter_sequence(base("llava"), [shelf["a"], shelf["c"]], progress=False)
    assert distance(logits(left, "llava"), logits(expected, "llava")) == 0
    everything_but = merge(shelf, "a b c", tmp_path / "2", without=["b"])
    assert but_operations(everything_but) == but_operations(merge(shelf, "a c", tmp_path / "3"))


def test_a_mean_of_projectors_can_neither_be_undone_nor_weighted_anew(shelf, tmp_path):
    mean = merge(shelf, "a b blind", tmp_path / "mean", projectors="mean")
    with pytest.raises(UnmergeableAdapterError, match=r"task 'b' cannot be taken out: the projector .* is the mean"):
        remove_task(mean, "b", tmp_path / "left", progress=False)
    with pytest.raises(UnmergeableAdapterError, match="by their old weights"):
        merge_adapter_files([mean], tmp_path / "left", weights={"b": 2.0}, projectors="mean", progress=False)
    assert not (tmp_path / "left").exists()
    remove_task(mean, "blind", tmp_path / "left", progress=False)
    assert but_operations(tmp_path / "left") == but_operations(
        merge(shelf, "a b", tmp_path / "never", projectors="mean")
    )
    one = merge(shelf, "a blind", tmp_path / "one", projectors="mean")
    remove_task(one, "a", progress=False)
    assert not any("projector" in key for key in load_file(one / WEIGHTS))
    both = merge_adapter_files(
        [mean], tmp_path / "both", weights={"a": 2.0, "b": 2.0, "blind": 1.0}, projectors="mean", progress=False
    )
    expected = merge(shelf, "a b blind", tmp_path / "2", weights=[2.0, 2.0, 1.0], projectors="mean")
    assert but_operations(both) == but_operations(expected)


def test_tasks_are_reweighted_as_if_merged_so(shelf, tmp_path):
    whole = merge(shelf, "a b", tmp_path / "whole")
    heavier = reweight_tasks(whole, {"b": 3.0}, tmp_path / "heavier", progress=False)
    at_once = merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "x", weights=[1.0, 3.0], progress=False)
    assert but_operations(heavier) == but_operations(at_once)
    assert reweight_tasks(whole, {"b": 3.0}, progress=False) == whole
    assert files(whole) == files(heavier)
    with pytest.raises(ValueError, match="no task 'x' to weigh"):
        reweight_tasks(whole, {"x": 3.0}, progress=False)


def test_mistakes_are_explained(shelf, tmp_path):
    whole = merge(shelf, "a b", tmp_path / "whole")
    before = files(whole)
    with pytest.raises(ValueError, match=r"no task 'x' to remove; the tasks are 'a', 'b'"):
        remove_task(whole, "x", progress=False)
    with pytest.raises(ValueError, match=r"no task 'x' to weigh; the tasks are 'a', 'b'"):
        merge_adapter_files([whole], tmp_path / "new", weights={"x": 1.0}, progress=False)
    with pytest.raises(UnmergeableAdapterError, match="is the adapter of one task and no merge"):
        remove_task(shelf["a"], "a", progress=False)
    with pytest.raises(UnmergeableAdapterError, match="The same adapter is given twice"):
        add_task(whole, shelf["a"], progress=False)
    with pytest.raises(ValueError, match="so it cannot be replaced; give a folder for the new merge"):
        remove_task("me/on-the-hub", "a", progress=False, local_files_only=True)
    config = json.loads((whole / "adapter_config.json").read_text())
    copy = shutil.copytree(whole, tmp_path / "copy")
    config["merge"]["options"] |= {"method": {"name": "mine", "source": ""}}
    del config["merge"]["options"]["ridge"]
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnmergeableAdapterError, match="not one of peft_many's"):
        remove_task(copy, "a", progress=False)
    remove_task(whole, "a", tmp_path / "one", progress=False)
    with pytest.raises(ValueError, match="none is left"):
        remove_task(tmp_path / "one", "b", progress=False)
    assert files(whole) == before


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from peft_many import remove_task
from tests.adapters import files
folder, times = Path(sys.argv[1]), int(sys.argv[2])
old, new = files(folder), files(Path(sys.argv[3]))
random.seed(0)
for name in ("first", "timed"):  # the first call imports, which those that are killed need no longer
    started = time.perf_counter()
    remove_task(folder, "b", folder.parent / name, progress=False)
    takes = time.perf_counter() - started
seen = set()
for _ in range(times):
    child = os.fork()
    if child == 0:
        remove_task(folder, "b", progress=False)
        os._exit(0)
    started, ended, alive = time.perf_counter(), 0, random.uniform(0, 1.5 * takes)
    while not ended and time.perf_counter() - started < alive:
        time.sleep(0.002)
        ended, _ = os.waitpid(child, os.WNOHANG)
    if ended:  # the machine may be busier than it was, or less
        takes = time.perf_counter() - started
    else:
        takes *= 1.1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = files(folder)
    assert found in (old, new), sorted(found)
    seen.add(found == new)
    if found == new:
        for name, content in old.items():
            (folder / name).write_bytes(content)
print(seen)
remove_task(folder, "b", progress=False)
assert files(folder) == new
print(sorted(path.name for path in folder.parent.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two names cannot be exchanged in one step")
def test_a_kill_leaves_the_old_merge_or_the_new_one(shelf, tmp_path):
    """And what it leaves beside the folder is gone after the next call."""
    folder = merge(shelf, "a b c", tmp_path / "place" / "merge")
    new = remove_task(folder, "b", tmp_path / "new", progress=False)
    done = new_process.run(KILLED, folder, 20, new)
    assert done.returncode == 0, done.stderr
    seen, left = done.stdout.splitlines()
    assert seen == "{False, True}"
    assert left == "['first', 'merge', 'timed']"


@pytest.mark.parametrize("rank", [6, 8])
def test_a_limit_that_did_not_bite_yet_is_kept(shelf, tmp_path, rank):
    """No layer tells it; a merge that was made for a server must not outgrow it."""
    first = merge(shelf, "a b", tmp_path / "first", rank=rank)
    added = add_task(first, shelf["c"], tmp_path / "added", progress=False)
    expected = merge(shelf, "a b c", tmp_path / "expected", rank=rank)
    assert but_operations(added) == but_operations(expected)
    left = remove_task(added, "c", tmp_path / "left", progress=False)
    again = add_task(left, shelf["c"], tmp_path / "again", progress=False)
    assert but_operations(again) == but_operations(expected)


@pytest.mark.parametrize("projectors", ["routed", "mean"])
def test_a_task_of_weight_zero_gets_no_other(shelf, tmp_path, projectors):
    """Its projector was not written, without which it would be another task; one that trained none may."""
    zero = merge(shelf, "a b", tmp_path / "zero", weights=[0.0, 1.0], projectors=projectors)
    further = merge_adapter_files([zero, shelf["c"]], tmp_path / "more", projectors=projectors, progress=False)
    for folder in (zero, further):
        with pytest.raises(UnmergeableAdapterError, match=r"task 'a' had the weight 0, so its projector .* not kept"):
            add_task(folder, shelf["blind"], tmp_path / "added", weights={"a": 1.0}, progress=False)
    left = remove_task(further, "a", tmp_path / "left", progress=False) if projectors == "routed" else None
    if left is not None:
        again = add_task(left, shelf["a"], tmp_path / "again", progress=False)
        assert but_operations(again) == but_operations(merge(shelf, "a b c", tmp_path / "whole"))
    blind = merge(shelf, "a blind", tmp_path / "blind", weights=[1.0, 0.0], projectors=projectors)
    options = {"weights": {"blind": 1.0}, "projectors": projectors, "progress": False}
    heard = merge_adapter_files([blind], tmp_path / "heard", **options)
    expected = merge(shelf, "a blind", tmp_path / "both", projectors=projectors)
    assert but_operations(heard) == but_operations(expected)


def test_options_of_merges_that_the_new_one_cannot_have_are_not_its_own(shelf, tmp_path):
    gated = merge(shelf, "a b", tmp_path / "gated", gate_lora=True)
    for options in ({"projectors": "mean"}, {"method": "average"}):
        found = merge_adapter_files([gated, shelf["c"]], tmp_path / "found", overwrite=True, progress=False, **options)
        expected = merge(shelf, "a b c", tmp_path / "expected", overwrite=True, **options)
        assert but_operations(found) == but_operations(expected)
    with pytest.raises(ValueError, match="`gate_lora` is an option of routed projectors"):
        merge(shelf, "a b", tmp_path / "wrong", projectors="mean", gate_lora=True)
    shy = merge(shelf, "a b", tmp_path / "shy", router="gaussian", temperature=0.5, abstain_above=3.0)
    found = merge_adapter_files([shy, shelf["c"]], tmp_path / "cosine", router="cosine", progress=False)
    assert but_operations(found) == but_operations(merge(shelf, "a b c", tmp_path / "plain"))


def test_layers_that_can_have_no_larger_rank_are_no_limit(tmp_path):
    """Deltas of full rank are stored in one of that rank; the other layers keep their tasks' blocks."""
    options = {"family": "llama", "target_modules": ["q_proj", "up_proj"]}
    folders = [
        make(tmp_path / name, seed=seed, r=20, rank_pattern={"q_proj": 32}, **options).folder
        for seed, name in enumerate("abc")
    ]
    first = merge_adapter_files(folders[:2], tmp_path / "first", progress=False)
    added = add_task(first, folders[2], output_dir=tmp_path / "added", progress=False)
    at_once = merge_adapter_files(folders, tmp_path / "at_once", progress=False)
    found, expected = load_file(added / WEIGHTS), load_file(at_once / WEIGHTS)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    assert {tensor.shape[0] for key, tensor in found.items() if "lora_A" in key} == {32, 60}
