"""The benchmarks run from the command line, at their quick sizes, and leave what they promise."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from safetensors import safe_open

from peft_many import merge_adapter_files
from tests import new_process

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG\r\n"


def run(script: str, *options: str) -> None:
    """Run a script as a user would, from the top of the repository."""
    done = new_process.run(ROOT / "benchmarks" / f"{script}.py", "--quick", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def results(script: str, folder: Path) -> dict[str, Any]:
    """Run a benchmark and read what it wrote; the plot is there too."""
    run(script, "--output", str(folder))
    assert {path.name for path in folder.iterdir()} == {f"{script}.json", f"{script}.png"}
    assert (folder / f"{script}.png").read_bytes().startswith(PNG)
    text = (folder / f"{script}.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    return json.loads(text)


def test_the_synthesised_adapters_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("synthesise", "--output", str(tmp_path / "one"))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("synthesise")
    module.synthesise(tmp_path / "two", module.QUICK, progress=False)
    for kind, peft_type in (("many", "MANY"), ("lora", "LORA")):
        folders = [tmp_path / "one" / kind / f"task_{t}" for t in range(3)]
        assert {str(PeftConfig.from_pretrained(folder).peft_type).rpartition(".")[2] for folder in folders} == {
            peft_type
        }
        merged = merge_adapter_files(folders, tmp_path / kind, progress=False)
        with safe_open(merged / "adapter_model.safetensors", framework="pt") as file:
            keys = set(file.keys())
            rows = file.get_slice("base_model.model.model.language_model.layers.1.mlp.down_proj.lora_A.weight")
            assert rows.get_shape() == [12, 160]
        assert ("base_model.model.model.multi_modal_projector.experts.task_2.linear_1.weight" in keys) == (
            kind == "many"
        )
    for file in ("adapter_model.safetensors", "adapter_statistics.safetensors"):
        one, two = ((tmp_path / name / "many" / "task_1" / file).read_bytes() for name in ("one", "two"))
        assert one == two


@pytest.mark.slow
def test_merge(tmp_path: Path) -> None:
    content = results("merge", tmp_path)
    methods = content["methods"]
    assert set(methods) == {
        "peft_many",
        "peft_many, with projectors",
        *(f"PEFT {kind}" for kind in ("linear", "cat", "ties", "svd")),
        "RegMean",
        "textbook RLS",
    }
    for name, result in methods.items():
        assert "failed" not in result, (name, result)
        assert result["seconds"] > 0
        assert result["peak_memory"] > 0
        assert result["output_bytes"] > 0
        assert result["extrapolated"] == (name in ("PEFT svd", "RegMean", "textbook RLS"))
        assert result["seconds_to_ours"] == pytest.approx(result["seconds"] / methods["peft_many"]["seconds"])
    assert methods["peft_many"]["distance_to_optimum"] < 1e-6 < methods["textbook RLS"]["distance_to_optimum"] < 0.1
    # At least the products of the stacked statistics with themselves, 24 rows each, in every input of two layers.
    assert content["ours_arithmetic"]["flops"]["float64"] > 2 * 2 * 24**2 * (3 * 64 + 160)
    assert content["ours_arithmetic"]["not_counted"] == []
    assert set(content["gemm_peak_flops"]) == {"float64", "float32"}
    assert content["machine"]["threads"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sketches", "collection", "routing", "gates", "lifelong", "instructions"])
def test_other_benchmarks(tmp_path: Path, script: str) -> None:
    content = results(script, tmp_path)
    assert content["benchmark"] == script
    assert content["machine"]["threads"] == 1
    assert content["results"]


def test_growth(tmp_path: Path) -> None:
    content = results("growth", tmp_path)
    assert set(content["series"]) == {"tasks", "width", "adapter_rank", "statistics_rank"}
    for series in content["series"].values():
        assert len(series["points"]) == len(series["values"])
        assert all(point["seconds"] > 0 and point["flops"] > 0 for point in series["points"])
        assert isinstance(series["exponent"], float)
