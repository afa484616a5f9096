"""Adapters by somebody malicious: refused with a clear error, in bounded time and memory, and nothing is executed.

`pytest tests/hostile --fuzz=20000` tries more mutations; each case is named by a seed, and can be run again by itself:
`python -m tests.hostile.run FOLDER SEED 1`, where `make_good` has filled `FOLDER/good`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file

from peft_many import merge_adapter_files, merge_adapter_sequence, merge_report
from peft_many.files import patterns
from peft_many.files.errors import MalformedAdapterError, UnmergeableAdapterError
from peft_many.files.untrusted import LARGEST_CONFIG
from tests import new_process
from tests.adapters import WEIGHTS, base, state_digest
from tests.hostile.good import make_good
from tests.hostile.mutations import CONFIG, TRAP

CASES = 500
CASE_RUNNER = Path(__file__).with_name("run.py")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    in_memory = Path("/dev/shm")  # where there is such a thing, as each case makes and removes a few files
    with tempfile.TemporaryDirectory(dir=in_memory if os.access(in_memory, os.W_OK) else None) as name:
        folder = Path(name)
        (folder / "good").mkdir()
        make_good(folder / "good")
        yield folder


@pytest.fixture
def edited(root, tmp_path):
    """Copies an adapter and changes its config."""

    def edit(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(root / "good" / name, tmp_path / "edited" / name))
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changes}))
        return folder

    return edit


def run_cases(root: Path, first: int, count: int) -> dict[str, Any]:
    done = new_process.run(CASE_RUNNER, root, first, count, timeout=120 + 5 * count)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_mutated_adapters(root, request):
    count = max(CASES, request.config.getoption("--fuzz"))
    found: dict[str, int] = {}
    for first in range(0, count, 5000):
        result = run_cases(root, first, min(5000, count - first))
        assert not result["failures"], "\n\n".join(result["failures"][:5])
        for outcome, times in result["outcomes"].items():
            found[outcome] = found.get(outcome, 0) + times
    assert sum(found.values()) == count
    worked = sum(times for outcome, times in found.items() if outcome.endswith("worked"))
    assert count / 20 < worked < count / 2, f"the mutations are too harsh or too mild: {found}"


def test_what_a_config_declares_is_checked_before_it_is_allocated(root, tmp_path):
    """In a process that has no memory for it; and the check itself takes next to none."""
    records = {
        of: json.loads((root / "good" / of / CONFIG).read_text())["merge"] for of in ("gaussian", "merge", "gated")
    }
    name, about = next(iter(records["gaussian"]["routing"].items()))
    many = [{"name": f"t{i}", "trained": True} for i in range(5000)]
    tasks = [{"name": f"t{i}", "weight": 1.0, "origin": {"sha256": str(i)}} for i in range(5000)]

    def record(of: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        return of, {"merge": {**records[of], **changes}}

    changes = [
        ("a", {"r": 10**8}),
        ("a", {"rank_pattern": {"q_proj": 10**8}}),
        ("a", {"layer_replication": [[0, 2]] * 10**5}),
        ("a", {"trainable_token_indices": [5] * 10**5}),
        record("gaussian", routing={name: {**about, "width": 10**9}}),
        record("gaussian", routing={name: {**about, "directions": 10**9}}),
        record("merge", tasks=tasks, routing={name: {"width": about["width"], "tasks": many}}),
        record("gated", task_ranks=[10**9, -(10**9) + 8]),
    ]
    (tmp_path / "changes.json").write_text(json.dumps(changes))
    script = f"""
import json, resource, shutil, sys
from pathlib import Path
from peft import PeftModel
from peft_many.files.errors import MalformedAdapterError
from tests.adapters import base
good, work = Path({str(root / "good")!r}), Path({str(tmp_path)!r})
models = [base("llava") for _ in range(9)]
PeftModel.from_pretrained(models.pop(), good / "merge")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
for i, (name, change) in enumerate(json.loads((work / "changes.json").read_text())):
    folder = Path(shutil.copytree(good / name, work / str(i)))
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({{**content, **change}}))
    try:
        PeftModel.from_pretrained(models.pop(), folder)
        print("loaded", change)
    except MalformedAdapterError as error:
        print("refused")
"""
    done = new_process.run(script)
    assert done.stdout.split() == ["refused"] * len(changes), done.stdout[-500:] + done.stderr[-3000:]


def test_a_large_rank_that_the_weights_have_is_loaded(tmp_path):
    from peft import get_peft_model

    from peft_many import MAnyConfig

    get_peft_model(base("llama"), MAnyConfig(r=600)).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(base("llama"), tmp_path).peft_config["default"].r == 600


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+!", r"(.*)*x", "(" * 3000, "["])
@pytest.mark.parametrize("field", ["rank_pattern", "target_modules", "modules_to_save", "exclude_modules"])
def test_regular_expressions_that_never_end(edited, monkeypatch, tmp_path, field, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    value = {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(field, pattern)
    folder = edited("a", **{field: value})
    start = time.monotonic()
    with pytest.raises(MalformedAdapterError, match="regular expressions"):
        PeftModel.from_pretrained(base("llava"), folder)
    if field == "rank_pattern":
        with pytest.raises(MalformedAdapterError, match="regular expressions"):
            merge_adapter_files([folder], tmp_path / "merged", progress=False)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("how", ["load", "merge"])
def test_a_regular_expression_that_ends_until_projectors_are_wrapped(edited, monkeypatch, how):
    """PEFT goes through longer names than the base model has."""
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    base_names = [name for name, _ in base("llava").named_modules()]
    longest = max(map(len, base_names))
    inside = "model.multi_modal_projector.modules_to_save.default.linear_1"
    assert len(inside) > longest
    pattern = rf"(?=.{{{longest + 1}}})(\w+\.?)+!"
    if how == "merge":
        folder = edited("a", target_modules=rf".*language_model.*layers\.0\..*(q|v|down)_proj|{pattern}")
    else:
        folder = edited("a", exclude_modules=pattern)
    calls = {
        "load": lambda: PeftModel.from_pretrained(base("llava"), folder),
        "merge": lambda: merge_adapter_sequence(base("llava"), [folder], progress=False),
    }
    with pytest.raises(MalformedAdapterError, match="regular expressions"):
        calls[how]()


def test_regular_expressions_that_end_are_fine(edited):
    folder = edited("a", target_modules=r".*language_model.*layers\.(0|1)\..*(q|k|v|o|gate|up|down)_proj")
    PeftModel.from_pretrained(base("llava"), folder)


def test_a_layer_whose_name_is_a_regular_expression(root, tmp_path):
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(root / "good" / "a", tmp_path / "bad"))
    tensors = {key.replace("layers.0.mlp", r"(\w+\.?)+!"): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UnmergeableAdapterError, match="cannot be that of a module's weight"):
        merge_adapter_files([folder], tmp_path / "merged", progress=False)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that can be imported, and must not be."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{TRAP}.py").write_text("class Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    __import__(TRAP)
    assert sys.modules.pop(TRAP).Model, "the trap works"
    yield
    assert TRAP not in sys.modules


@pytest.mark.parametrize("name", ["a", "merge"])
def test_no_module_is_imported_that_a_file_names(edited, tmp_path, trap, name):
    mapping = {"base_model_class": "Model", "parent_library": TRAP}
    folder = edited(name, auto_mapping=mapping, task_type=None, base_model_name_or_path="me/base")
    with pytest.raises(ValueError, match="allowlist"):
        AutoPeftModel.from_pretrained(folder)
    PeftModel.from_pretrained(base("llava"), folder)
    merged = merge_adapter_files([folder], tmp_path / "merged", progress=False)
    with pytest.raises(ValueError, match=r"allowlist|Cannot infer"):
        AutoPeftModel.from_pretrained(merged)


def test_megatron_is_not_imported_by_another_name(edited, tmp_path, trap):
    folder = edited("a", megatron_config={"a": 1}, megatron_core=TRAP)
    with pytest.raises(ValueError, match="megatron_core"):
        PeftModel.from_pretrained(base("llava"), folder)
    with pytest.raises(UnmergeableAdapterError, match="megatron_config"):
        merge_adapter_files([folder], tmp_path / "merged", progress=False)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"peft_type": "MANY", "tasks": ' + '{"a":' * 100_000, "9" * 10_000])
def test_a_config_that_is_nested_or_long_without_end(root, tmp_path, text):
    folder = Path(shutil.copytree(root / "good" / "merge", tmp_path / "bad"))
    (folder / CONFIG).write_text(text)
    for call in (lambda: merge_adapter_files([folder], tmp_path / "merged"), lambda: merge_report(folder)):
        with pytest.raises(UnmergeableAdapterError, match=CONFIG):
            call()


def test_a_config_that_is_large_without_end(root, tmp_path):
    folder = Path(shutil.copytree(root / "good" / "a", tmp_path / "bad"))
    with open(folder / CONFIG, "ab") as file:
        file.truncate(LARGEST_CONFIG + 1)
    with pytest.raises(UnmergeableAdapterError, match="larger than 16 MiB"):
        merge_adapter_files([folder], tmp_path / "merged", progress=False)


def test_a_config_that_is_refused_leaves_the_base_model_alone(edited):
    model = base("llava")
    before = state_digest(model)
    for changes in ({"r": 10**8}, {"r": True}, {"target_modules": "["}, {"merge": {"options": float("nan")}}):
        folder = edited("merge", **changes)
        with pytest.raises(MalformedAdapterError):
            PeftModel.from_pretrained(model, folder)
        shutil.rmtree(folder)
        assert state_digest(model) == before


@pytest.mark.parametrize("name", ["x|y", "# pwned\n\n# x", "<script>", "[a](b)", "<!-- /peft_many -->", "` `` `"])
def test_names_are_no_markdown_of_the_merges_card(edited, tmp_path, name):
    merged = merge_adapter_files([edited("a", task_name=name)], tmp_path / "merged", progress=False)
    lines = (merged / "README.md").read_text().splitlines()
    header = lines.index(next(line for line in lines if line.startswith("| task |")))
    row = lines[header + 2]
    assert " | 1 | " in row
    assert len(re.findall(r"(?<!\\)\|", row)) == lines[header].count("|")
    assert "# x" not in lines
    assert not re.search(r"(?<!\\)[<\[`]", row)
