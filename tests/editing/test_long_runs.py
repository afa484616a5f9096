"""Over and over: memory stays flat, nothing is left on the model, and equal inputs give equal bytes."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files, merge_adapter_sequence
from tests.adapters import base, batches, make, scatter, state_digest

CYCLES = 150


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_flat_over_many_merges(tmp_path, capsys):
    """Collect, merge, and unload on one model; a leak of one tiny adapter (20 kB) each time would be 2.7 MB."""
    folders = [make(tmp_path / name, "llama", seed=seed, r=2).folder for seed, name in enumerate("ab")]
    model = base("llama")
    loader = batches(model, "llama", 0, rows=1)
    before, traces = {}, digest(model)
    for cycle in range(CYCLES):
        measured = get_peft_model(model, MAnyConfig(r=2, target_modules=["q_proj", "v_proj"]))
        collect_statistics(measured, loader, progress=False)
        model = measured.unload()
        model = merge_adapter_sequence(model, folders, progress=False).unload()
        if cycle + 1 in (CYCLES // 10, CYCLES):
            gc.collect()
            before[cycle + 1] = resident()
    growth = before[CYCLES] - before[CYCLES // 10]
    with capsys.disabled():
        print(f"\nresident after {CYCLES // 10}: {before[CYCLES // 10] >> 20} MiB, growth since: {growth >> 10} KiB")
    assert growth < 2 << 20
    assert digest(model) == traces


def digest(model: nn.Module) -> dict[str, str]:
    """Every module and tensor of a model, but for `requires_grad`, which PEFT turns off for good."""
    found = {name: about.replace("True ", "").replace("False ", "") for name, about in state_digest(model).items()}
    del found["own attributes"]  # among which are caches of transformers' and PEFT's marks
    return found


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks each module has, and which of its attributes are functions of its own."""
    return {
        name: sum(len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict))
        + sum(callable(value) and not isinstance(value, nn.Module) for value in vars(module).values())
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("how", ["task", "merge", "gated", "gaussian"])
def test_unload_leaves_no_trace(tmp_path, how):
    folders = [make(tmp_path / name, seed=seed).folder for seed, name in enumerate("ab")]
    model = base("llava")
    collected = batches(model, "llava", 0)
    model(**collected[0])  # transformers hangs hooks of its own on a model when it first runs
    before, hooked = digest(model), hooks(model)
    if how == "task":
        wrapped = get_peft_model(model, MAnyConfig(r=2))
        collect_statistics(wrapped, batches(model, "llava", 0), progress=False)
    else:
        options = {"merge": {}, "gated": {"gate_lora": True}, "gaussian": {"router": "gaussian"}}[how]
        wrapped = merge_adapter_sequence(model, folders, progress=False, **options)
    for batch in batches(model, "llava", 0):
        wrapped(**batch)
    unloaded = wrapped.unload()
    assert hooks(unloaded) == hooked
    assert digest(unloaded) == before


def test_delete_adapter_leaves_no_trace(tmp_path):
    """Of a second adapter; the first one and the model are as they were before the second came."""
    folders = [make(tmp_path / name, seed=seed).folder for seed, name in enumerate("ab")]
    model = merge_adapter_sequence(base("llava"), folders, progress=False)
    model(**batches(model, "llava", 0)[0])
    before, hooked, modules = state_digest(model), hooks(model), [name for name, _ in model.named_modules()]
    for _ in range(2):
        model.add_adapter("other", MAnyConfig(r=2))
        model.set_adapter("other")
        scatter(model, 1)
        collect_statistics(model, batches(model, "llava", 0), adapter_name="other", progress=False)
        model.set_adapter("default")
        model.delete_adapter("other")
        assert [name for name, _ in model.named_modules()] == modules
        assert hooks(model) == hooked
        changed = {name for name, about in state_digest(model).items() if before.get(name) != about}
        assert not {name for name in changed if "prototypes" in name}
        assert not any("other" in getattr(module, "covariance", {}) for module in model.modules())
        assert set(model.peft_config) == {"default"}


def survivors() -> Counter[str]:
    """How many tensors, modules and objects of this package there are in this process."""
    gc.collect()
    kinds = Counter(map(type, gc.get_objects()))  # not by `isinstance`, which asks lazy modules for attributes
    return Counter(
        {
            f"{kind.__module__}.{kind.__qualname__}": count
            for kind, count in kinds.items()
            if issubclass(kind, (torch.Tensor, nn.Module)) or str(kind.__module__).startswith("peft_many")
        }
    )


@pytest.fixture(params=["task", "gated", "gaussian"])
def another(tmp_path, request) -> Callable[[PeftModel], None]:
    """Gives a model with an adapter "default" another one, and runs it on images."""
    options = {"gated": {"gate_lora": True}, "gaussian": {"router": "gaussian"}}.get(request.param, {})
    folders = [make(tmp_path / name, seed=seed).folder for seed, name in enumerate("ab")]
    merged = merge_adapter_files(folders, tmp_path / "merged", progress=False, **options)

    def give(model: PeftModel) -> None:
        shown = batches(model, "llava", 0)
        if request.param == "task":
            model.add_adapter("other", MAnyConfig(r=2))
            model.set_adapter("other")
            collect_statistics(model, shown, adapter_name="other", progress=False)
        else:
            model.load_adapter(merged, "other")
            model.set_adapter("other")
        for batch in shown:
            model(**batch)

    return give


@pytest.mark.parametrize("end", ["unload", "delete_adapter"])
def test_nothing_stays_in_memory(another, end):
    """Not one tensor, module or object of ours, however often adapters came, saw images, and went."""
    plain = base("llava")
    model = get_peft_model(plain, MAnyConfig(r=2))
    before: Counter[str] = Counter()
    for cycle in range(3):
        another(model)
        if end == "unload":
            plain = model.unload()
            model = get_peft_model(plain, MAnyConfig(r=2))
        else:
            model.set_adapter("default")
            model.delete_adapter("other")
        before = before if cycle else survivors()
    assert survivors() - before == Counter()


SAVE_AND_MERGE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from peft import LoraConfig
from peft_many import export_lora, export_model, export_routed_model, merge_adapter_files, merge_report
from tests.adapters import base, make
root = Path(sys.argv[1])
made = [make(root / name, seed=seed, task_name=name, energy=0.99).folder for seed, name in enumerate("ab")]
make(root / "lora", seed=3, kind=LoraConfig, target_modules=["v_proj", "q_proj"], modules_to_save=None)
for name, options in {"plain": {}, "gated": {"gate_lora": True}, "gaussian": {"router": "gaussian"}, "low": {"rank": 3}}.items():
    merge_adapter_files(made, root / name, progress=False, **options)
merge_adapter_files(made, root / "ties", method="ties", projectors="mean", progress=False)
base("llava").save_pretrained(root / "base")
export_lora(root / "plain", root / "exported lora")
export_model(root / "plain", root / "exported model", base_model=root / "base")
export_routed_model(root / "plain", root / "exported routed", base_model=root / "base")
print(hash("a word"))
(root / "report.txt").write_text(repr(merge_report(root / "plain", progress=False).to_dict()))
"""  # noqa: E501


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes(tmp_path, monkeypatch):
    """All files of adapters and merges, in this process and in one that hashes strings differently."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", SAVE_AND_MERGE, str(there)]
    done = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert done.stdout != f"{hash('a word')}\n"
    monkeypatch.setattr(sys, "argv", ["-c", str(here)])
    exec(SAVE_AND_MERGE, {})
    found = []
    for root in (here, there):
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        found.append({str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths})
    assert len(found[0]) > 30
    different = {name for name in {*found[0], *found[1]} if found[0].get(name) != found[1].get(name)}
    assert different <= {"lora/adapter_config.json"}  # PEFT writes the target modules of its own types as a set
