"""Recipes: every field, and what is said of every mistake."""

from __future__ import annotations

import pytest
import torch

from peft_many import merge_adapter_files, read_recipe
from peft_many.merging.recipe import RecipeError
from peft_many.methods import Ties
from tests.adapters import files, make


def write(folder, text: str):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field(tmp_path):
    (tmp_path / "clevr").mkdir()
    found = read_recipe(
        write(
            tmp_path,
            """
adapters:
  - me/iconqa@v2
  - clevr
  - {adapter: me/charts, revision: main, weight: 5e-1, name: charts}
  - {adapter: me/merged, name: [one, two]}
options:
  method: {name: ties, density: 0.3}
  projectors: routed
  ridge: null
  router: gaussian
  temperature: 1e-1
  top_k: 2
  abstain_above: 4
  rank: 32
  gate_lora: false
  dtype: bfloat16
  device: cpu
  without: [two]
""",
        )
    )
    assert found == {
        "adapters": ["me/iconqa@v2", str(tmp_path / "clevr"), "me/charts@main", "me/merged"],
        "weights": [1.0, 1.0, 0.5, 1.0],
        "task_names": [None, None, "charts", ["one", "two"]],
        "method": Ties(density=0.3),
        "projectors": "routed",
        "router": "gaussian",
        "temperature": 0.1,
        "top_k": 2,
        "abstain_above": 4.0,
        "rank": 32,
        "gate_lora": False,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "without": ["two"],
    }
    assert read_recipe(write(tmp_path, "adapters: [me/a]")) == {"adapters": ["me/a"]}
    weights = read_recipe(write(tmp_path, "adapters: [me/a]\noptions: {weights: {a: 1e-2}, method: lpm}"))
    assert weights == {"adapters": ["me/a"], "weights": {"a": 0.01}, "method": "lpm"}


def test_a_recipe_is_arguments_of_merging(tmp_path):
    for seed, name in enumerate("ab"):
        make(tmp_path / name, seed=seed, task_name=name)
    recipe = write(tmp_path, "adapters: [a, {adapter: b, weight: 0.5}]\noptions: {ridge: 1e-3}")
    merge_adapter_files(**read_recipe(recipe), output_dir=tmp_path / "1", progress=False)
    folders = [tmp_path / "a", tmp_path / "b"]
    merge_adapter_files(folders, tmp_path / "2", weights=[1.0, 0.5], ridge=1e-3, progress=False)
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: [", "is no YAML"),
        ("- a", "needs a list of `adapters`"),
        ("adapters: a", "needs a list of `adapters`"),
        ("adapters: []", "needs a list of `adapters`"),
        ("adapters: [a]\noutput: b", r"a recipe knows no `output`; it knows `adapters`, `options`"),
        ("adapters: [a, 3]", "adapter 2 must be a folder or Hub id"),
        ("adapters: [{path: a}]", "adapter 1 must be a folder or Hub id"),
        ("adapters: [{adapter: a, wieght: 1}]", "adapter 1 knows no `wieght`; it knows `adapter`, `revision`"),
        ("adapters: [{adapter: a, weight: heavy}]", "the weight of adapter 1 must be a number, but it is 'heavy'"),
        ("adapters: [{adapter: a, name: 3}]", "the name of adapter 1 must be a string"),
        ("adapters: [{adapter: a/b@v1, revision: v2}]", "names its revision twice"),
        ("adapters: [{adapter: here, revision: v2}]", "is a folder, which has no `revision`"),
        ("adapters: [a]\noptions: [ridge]", "`options` must map"),
        ("adapters: [a]\noptions: {lambda: 1}", "`options` knows no `lambda`; it knows `method`"),
        ("adapters: [a]\noptions: {ridge: large}", "`ridge` must be a number, but it is 'large'"),
        ("adapters: [a]\noptions: {ridge: true}", "`ridge` must be a number, but it is True"),
        ("adapters: [a]\noptions: {rank: 1.5}", "`rank` must be a whole number"),
        ("adapters: [a]\noptions: {gate_lora: maybe}", "`gate_lora` must be True or False"),
        (
            "adapters: [a]\noptions: {dtype: int8}",
            "`dtype` must be one of torch.float32, torch.bfloat16, torch",
        ),
        ("adapters: [a]\noptions: {method: magic}", "unknown method 'magic'; known: lpm, average"),
        ("adapters: [a]\noptions: {method: {name: ties, denisty: 0.3}}", "`method`: .*denisty"),
        ("adapters: [a]\noptions: {method: {name: ties, density: 3}}", "`density` must be in"),
        ("adapters: [a]\noptions: {method: {name: lpm, density: 3}}", "`method` must be one of average"),
        ("adapters: [a]\noptions: {without: a}", "`without` must be a list"),
        ("adapters: [a]\noptions: {weights: [1]}", "`weights` must map"),
        ("adapters: [{adapter: a, weight: 1}]\noptions: {weights: {a: 1}}", "either by adapter"),
        ("adapters: [a]\noptions: {device: 0}", "`device` must be a string"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "here").mkdir()
    with pytest.raises(RecipeError, match=message) as error:
        read_recipe(write(tmp_path, text))
    assert str(tmp_path / "recipe.yaml") in str(error.value)


def test_nothing_is_executed_and_a_missing_file_is_said(tmp_path):
    with pytest.raises(RecipeError, match="is no YAML"):
        read_recipe(write(tmp_path, "adapters: !!python/object/apply:os.system [touch hacked]"))
    with pytest.raises(FileNotFoundError, match="There is no recipe"):
        read_recipe(tmp_path / "nowhere.yaml")
