"""What a merge would be, said before it is made: compared with what it becomes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from peft.utils import PeftWarning

from peft_many import merge_adapter_files, plan_merge
from peft_many.files import tensor_file
from peft_many.merging.prepare import prepare_merge
from peft_many.methods import Ties
from peft_many.records import MergeOptions
from tests.adapters import STATISTICS, WEIGHTS, files, make


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shelf")
    options = {
        "a": {},
        "b": {"r": 2},
        "few": {"target_modules": r".*language_model.*(q|down)_proj"},
        "blind": {"projector_modules": []},
        "text": {"images": False, "projector_modules": []},
    }
    made = {
        name: make(root / name, seed=seed, task_name=name, **more).folder
        for seed, (name, more) in enumerate(options.items())
    }
    made["bare"] = shutil.copytree(made["b"], root / "bare")
    (made["bare"] / STATISTICS).unlink()
    return made


def test_it_says_what_the_merge_becomes_and_touches_nothing(shelf, tmp_path):
    chosen = [shelf["a"], shelf["b"]]
    before = [files(folder) for folder in chosen]
    found = plan_merge(chosen, weights={"b": 0.5}, rank=5, progress=False)
    assert [files(folder) for folder in chosen] == before
    merged = merge_adapter_files(chosen, tmp_path / "merged", weights={"b": 0.5}, rank=5, progress=False)
    assert found.problems == []
    assert [(task.name, task.weight, task.ranks, task.samples) for task in found.tasks] == [
        ("a", 1.0, (4, 4), 4),
        ("b", 0.5, (2, 2), 4),
    ]
    assert (found.layers, found.groups, found.ranks) == (14, 8, (5, 5))
    assert found.options == {
        "method": "lpm",
        "projectors": "routed",
        "ridge": 1e-4,
        "router": "cosine",
        "temperature": 0.02,
        "rank": 5,
        "gate_lora": False,
        "dtype": "float32",
    }
    assert found.projectors == {"model.multi_modal_projector": ["a", "b"]}
    header = 6000
    assert 0 <= (merged / WEIGHTS).stat().st_size - found.output_bytes < header
    assert found.multiplications > 0
    ties = plan_merge(chosen, method="ties", projectors="mean", progress=False)
    assert ties.options["method"]["density"] == Ties().density
    assert "ridge" not in ties.options
    assert "router" not in ties.options


def test_statistics_are_read_once(shelf, monkeypatch):
    """Their header takes long to parse where tasks and layers are many, and PEFT's way of loading reads it too."""
    opened = []

    def open_tensors(path, error):
        opened.append(path.parent.name)
        return tensor_file.open_tensors(path, error)

    monkeypatch.setattr("peft_many.files.statistics.open_tensors", open_tensors)
    prepare_merge([shelf["a"], shelf["b"]], MergeOptions(), hub={}, progress=False)
    assert opened == ["a", "b"]


def test_it_notes_what_may_surprise(shelf):
    notes = "\n".join(plan_merge([shelf[name] for name in ("a", "few", "blind", "text")], progress=False).notes)
    assert "'few' did not train 10 of 14 layers ('model.language_model.layers.0.mlp.gate_proj', …); its delta" in notes
    assert "but in 6 of them nothing was measured, and the task is left out there" in notes
    own = "'blind' has no projector 'model.multi_modal_projector' of its own: its images get the base model's."
    assert own in notes
    assert "'text' saw no image at 'model.multi_modal_projector', so no image is sent to it." in notes
    assert "'a' was measured on 4 samples" in notes
    assert "look alike" not in notes
    hot = "\n".join(plan_merge([shelf["a"], shelf["b"]], temperature=2.0, progress=False).notes)
    assert re.search(
        r"'a' and 'b' look alike: (each takes \d+ % of the other's|'[ab]' takes \d+ % of the) images", hot
    )
    light = plan_merge([shelf["a"], shelf["b"]], weights={"b": 0.0}, router="gaussian", progress=False).notes
    assert "'b' has weight 0, so it does not influence the merge; its LoRA is kept, its projector is not." in light


def test_it_says_where_inputs_will_go_and_what_would_tell_more(shelf):
    chosen = [shelf["a"], shelf["b"]]
    plain = plan_merge(chosen, progress=False)
    assert list(plain.routing) == ["model.multi_modal_projector"]
    assert any(re.match(r"With `gate_by='\w+'` \d+ % .* instead of one LoRA for all\.", note) for note in plain.notes)
    gated = plan_merge(chosen, gate_by="both", progress=False)
    assert gated.routing["gate_lora"].by == "both"
    assert gated.routing["gate_lora"].accuracy > 0.9
    for options in ({"gate_by": "both"}, {"rank": 4}, {"method": "ties"}, {"projectors": "mean"}):
        assert "gate_by" not in "\n".join(plan_merge(chosen, progress=False, **options).notes)
    text = plan_merge([shelf["a"], shelf["text"]], gate_lora=True, progress=False)
    assert text.routing["gate_lora"].undecided["text"] == 1.0
    notes = "\n".join(text.notes)
    assert "Inputs that no task has half of the weight of get the merged LoRA: 100 % of 'text'." in notes
    assert re.search(r"With `gate_by='\w+'` \d+ % .* instead of 50 %\.", notes)


def test_every_adapters_problem_is_told(shelf, tmp_path):
    found = plan_merge([shelf["a"], shelf["bare"], tmp_path / "nowhere"], local_files_only=True, progress=False)
    assert len(found.problems) == 2
    assert "bare has no statistics" in found.problems[0]
    assert "nowhere" in found.problems[1]
    assert found.tasks == []
    assert plan_merge([shelf["a"], shelf["bare"]], method="average", projectors="mean", progress=False).problems == []


def test_adapters_that_do_not_go_together(shelf, tmp_path):
    chosen = [shutil.copytree(shelf[name], tmp_path / name) for name in "ab"]
    for folder in chosen:
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"base of {folder.name}"
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(PeftWarning, match="base of a.*base of b.*same_base=True"):
        assert plan_merge(chosen, progress=False).problems == []
    (problem,) = plan_merge([shelf["a"], shelf["a"]], progress=False).problems
    assert "given twice" in problem
    with pytest.raises(ValueError, match="`rank` must be at least 1"):
        plan_merge([shelf["a"]], rank=0, progress=False)
    with pytest.raises(ValueError, match="cannot be used here"):
        plan_merge([shelf["a"]], device="nonsense", progress=False)
