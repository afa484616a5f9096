"""The command line: that it does what the functions behind it do, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peft_many import (
    __version__,
    add_task,
    export_lora,
    export_model,
    export_routed_model,
    inspect_adapter,
    merge_adapter_files,
    merge_report,
    pool_adapters,
    remove_task,
)
from peft_many.commands import app
from peft_many.commands.merge_options import as_typed
from tests import new_process
from tests.adapters import STATISTICS, base, but_operations, files, make

ROOT = Path(__file__).parents[2]
NAMES = (
    *("measure", "ask", "evaluate", "plan", "merge", "inspect", "report", "add", "remove", "refit", "pool", "export"),
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shelf")
    return {name: make(root / name, seed=seed, task_name=name).folder for seed, name in enumerate("abc")}


@pytest.fixture
def merged(shelf, tmp_path) -> Path:
    return merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "merged", progress=False)


def run(*words: object, code: int = 0):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    assert "Traceback" not in done.output
    return done


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples(name):
    told = run(name, "--help").output
    assert "Examples" in told
    assert f"peft-many {name}" in told
    (command,) = (one.callback for one in app.registered_commands if one.callback.__name__ == name)
    examples = re.findall(r"^ *(peft-many .*)", command.__doc__, re.MULTILINE)
    assert [one for one in examples if len(re.sub(r"\[/?dim\]", "", one)) > 78] == [], "a terminal would break these"
    assert ("--quiet" in told) == (name != "inspect"), "all others may show bars"
    assert name in run("--help").output


def test_merge_is_merge_adapter_files(shelf, tmp_path):
    options = ["--weight", "b=0.5", "--ridge", "1e-3", "--rank", "5", "--router", "gaussian", "--dtype", "bfloat16"]
    told = run("merge", shelf["a"], shelf["b"], "-o", tmp_path / "1", *options, "--top-k", "1", "--quiet")
    assert told.stdout == f"The merge: {tmp_path / '1'}\n"
    merge_adapter_files(
        [shelf["a"], shelf["b"]],
        tmp_path / "2",
        weights={"b": 0.5},
        ridge=1e-3,
        rank=5,
        router="gaussian",
        dtype=torch.bfloat16,
        top_k=1,
        progress=False,
    )
    assert files(tmp_path / "1") == files(tmp_path / "2")
    gated = ["--gate-lora", "--temperature", "0.5", "--without", "b", "--device", "cpu", "-q"]
    run("merge", *shelf.values(), "--output", tmp_path / "3", *gated)
    chosen = [shelf["a"], shelf["c"]]
    merge_adapter_files(chosen, tmp_path / "4", gate_lora=True, temperature=0.5, progress=False)
    assert files(tmp_path / "3") == files(tmp_path / "4")
    other = ["--method", "ties", "--projectors", "mean", "-q"]
    run("merge", *chosen, "--output", tmp_path / "4", *other, "--overwrite")
    merge_adapter_files(chosen, tmp_path / "5", method="ties", projectors="mean", progress=False)
    assert files(tmp_path / "4") == files(tmp_path / "5")


def test_a_recipe_and_what_the_command_line_says_over_it(shelf, tmp_path):
    recipe = tmp_path / "tasks.yaml"
    adapters = [{"adapter": str(shelf["a"]), "name": "first"}, str(shelf["b"])]
    recipe.write_text(json.dumps({"adapters": adapters, "options": {"ridge": 1e-2, "router": "gaussian"}}))
    run("merge", "--recipe", recipe, "-o", tmp_path / "1", "--ridge", "1e-3", "-q")
    options = {"task_names": ["first", None], "ridge": 1e-3, "router": "gaussian"}
    merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "2", **options, progress=False)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    run("merge", "--recipe", recipe, "-o", tmp_path / "3", "--ridge", "1e-3", "--name", f"{shelf['b']}=second", "-q")
    assert inspect_adapter(tmp_path / "3").tasks[1].name == "second"


def test_weights_of_the_command_line_replace_one_by_one_those_of_a_recipe(shelf, tmp_path):
    recipe = tmp_path / "tasks.yaml"
    adapters = [str(shelf["a"]), str(shelf["b"])]
    recipe.write_text(json.dumps({"adapters": adapters, "options": {"weights": {"a": 2, "b": 3}}}))
    run("merge", "--recipe", recipe, "-o", tmp_path / "1", "--weight", "a=0.5", "-q")
    merge_adapter_files(adapters, tmp_path / "2", weights=[0.5, 3.0], progress=False)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    recipe.write_text(json.dumps({"adapters": [{"adapter": one, "weight": 3} for one in adapters]}))
    refused = run("merge", "--recipe", recipe, "-o", tmp_path / "3", "--weight", "a=0.5", "-q", code=2)
    assert "gives weights by adapter" in " ".join(refused.stderr.replace("│", " ").split())
    assert not (tmp_path / "3").exists()


def test_plan_says_it_and_writes_nothing(shelf, tmp_path):
    before = [files(folder) for folder in shelf.values()]
    told = run("plan", shelf["a"], shelf["b"], "-q").stdout
    assert "A merge of 2 tasks" in told
    assert "14 layers of rank 8, 8 problems to solve" in told
    read = json.loads(run("plan", shelf["a"], shelf["b"], "--rank", 3, "--json").stdout)
    assert read["ranks"] == [3, 3]
    assert [task["name"] for task in read["tasks"]] == ["a", "b"]
    assert [files(folder) for folder in shelf.values()] == before
    failed = run("plan", shelf["a"], tmp_path / "nowhere", "--json", code=1)
    assert "nowhere" in json.loads(failed.stdout)["problems"][0]
    assert "nowhere" in run("plan", shelf["a"], tmp_path / "nowhere", "-q", code=1).stderr


def test_add_and_remove_are_the_functions(shelf, merged, tmp_path):
    run("add", merged, shelf["c"], "-o", tmp_path / "1", "--name", "new", "--weight", "new=0.5", "-q")
    add_task(merged, shelf["c"], tmp_path / "2", task_name="new", weights={"new": 0.5}, progress=False)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    run("remove", tmp_path / "1", "a", "--output", tmp_path / "3", "-q")
    remove_task(tmp_path / "2", "a", progress=False)
    assert files(tmp_path / "3") == files(tmp_path / "2")
    run("remove", tmp_path / "1", "a", "-q")
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_pool_is_the_function_and_cannot_be_taken_apart(shelf, merged, tmp_path):
    run("pool", shelf["a"], shelf["b"], "-o", tmp_path / "1", "--name", "ab", "--rank", 3, "--weight", "b=2", "-q")
    options = {"task_name": "ab", "rank": 3, "weights": {"b": 2.0}}
    pool_adapters([shelf["a"], shelf["b"]], tmp_path / "2", **options, progress=False)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert "ab is a pool of a, b" in run("inspect", tmp_path / "1").stdout
    run("merge", tmp_path / "1", shelf["c"], "-o", tmp_path / "3", "-q")
    told = run("remove", tmp_path / "3", "a", "-q", code=1).stderr
    assert "The task 'a' is part of the pool 'ab'" in told
    run("remove", tmp_path / "3", "ab", "-q")
    run("merge", shelf["c"], "-o", tmp_path / "4", "-q")
    assert but_operations(tmp_path / "3") == but_operations(tmp_path / "4")
    told = json.loads((tmp_path / "3" / "adapter_config.json").read_text())["merge"]["operations"]
    assert [line["kind"] for line in told] == ["pool", "merge", "remove"]
    assert '"a"' not in json.dumps(told)


def test_a_merge_says_what_it_was_written_over(shelf, merged, tmp_path):
    there = shutil.copytree(shelf["c"], tmp_path / "there")
    told = run("merge", merged, "-o", there, "--overwrite", "-q").stderr
    assert "It was written in place of the adapter that was there." in told
    told = run("merge", merged, "-o", there, "--overwrite", "-q").stderr
    assert "It was written in place of the merge of 2 tasks that was there." in told


def test_dry_runs_write_nothing(shelf, merged, tmp_path):
    before = files(tmp_path)
    told = run("merge", shelf["a"], shelf["c"], "-o", tmp_path / "new", "--dry-run", "-q").stdout
    assert "A merge of 2 tasks" in told
    assert told.endswith(f"Nothing was written. The merge would be: {tmp_path / 'new'}\n")
    told = run("add", merged, shelf["c"], "--dry-run", "-q").stdout
    assert "A merge of 3 tasks" in told
    replaced = ", in place of the merge of 2 tasks that was there\n"
    assert told.endswith(f"Nothing was written. The merge would be: {merged}{replaced}")
    told = run("remove", merged, "a", "--dry-run", "-q").stdout
    assert told.startswith("Without 'a':\nA merge of 1 task\n")
    assert told.endswith(replaced)
    told = run("remove", merged, "a", "-o", shelf["b"], "--dry-run", "-q", code=1).stderr
    assert "already exists and is not empty" in told
    assert "`--overwrite`" in run("merge", shelf["a"], "-o", merged, "--dry-run", "-q", code=1).stderr
    told = run("remove", merged, "x", "--dry-run", "-q", code=1).stderr
    assert "no task 'x' to remove; the tasks are 'a', 'b'" in told
    assert files(tmp_path) == before


def test_inspect_shows_it(merged):
    told = run("inspect", merged).stdout
    assert "a merge of 2 tasks" in told
    found = inspect_adapter(merged)
    assert found.tasks[0].sha256[:8] in told
    read = json.loads(run("inspect", merged, "--json").stdout)
    assert read["tasks"][1]["name"] == "b"
    assert read["files"][STATISTICS] == (merged / STATISTICS).stat().st_size
    run("remove", merged, "b", "-q")
    assert "a merge of 1 task" in run("inspect", merged).stdout


def test_inspect_says_what_chooses(shelf, tmp_path):
    for name, by, said in (("1", "images", "by images"), ("2", "both", "by images and instructions")):
        merge_adapter_files(
            [shelf["a"], shelf["b"]], tmp_path / name, gate_by="both", route_by=by, progress=False, router="gaussian"
        )
        told = " ".join(run("inspect", tmp_path / name).stdout.split())
        assert f"multi_modal_projector, {said}: a, b" in told
        assert "by its images and instructions" in told


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_word_of_a_table_is_broken(shelf, tmp_path, monkeypatch, columns):
    """Not by a narrow terminal, nor by a task's name of 300 characters, which would push all else out."""
    monkeypatch.setenv("COLUMNS", str(columns))
    run("merge", shelf["a"], shelf["b"], "-o", tmp_path / "1", "--name", f"{shelf['a']}={'long' * 75}", "-q")
    told = run("inspect", tmp_path / "1").stdout.partition("Tasks\n")[2].partition("Energy is")[0]
    assert "…longlonglong" in told
    assert max(map(len, told.splitlines())) <= columns
    assert {"samples", "instructions", "covariances", "interference", "energy"} <= set(re.findall(r"\w+", told))


def test_inspect_says_why_an_adapter_cannot_be_merged(shelf, tmp_path):
    bad = Path(shutil.copytree(shelf["a"], tmp_path / "bad"))
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    told = run("inspect", bad).stdout
    assert "14 layers of rank 4" in told
    assert "It cannot be merged: " in told
    assert "trains biases (`bias='all'`)" in told
    assert "trains biases" in json.loads(run("inspect", bad, "--json").stdout)["problem"]
    assert "trains biases" in run("export", bad, "-o", tmp_path / "lora", "--dry-run", code=1).stderr


def test_report_writes_and_says_it(merged, tmp_path):
    told = run("report", merged, "-o", tmp_path / "report", "-q").stdout
    found = merge_report(merged, progress=False)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == found.to_dict()
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.png", "report.json"}
    assert all(f"{share:.3f}" in told for share in found.interference.values())
    assert "'a' and 'b' contradict each other a little: merged as a pair, one loses " in told
    told = run("report", merged, "-o", tmp_path / "2", "--no-conflicts", "-q").stdout
    assert "contradict" not in told


def test_exports_are_the_functions(shelf, merged, tmp_path):
    place = tmp_path / "base"
    base("llava").save_pretrained(place)
    before = files(tmp_path)
    told = run("export", merged, "-f", "model", "-o", tmp_path / "1", "--base-model", place, "--dry-run").stdout
    assert told == f"Nothing was written. The export would be: {tmp_path / '1'}\n"
    told = run("export", merged, "-f", "model", "-o", tmp_path / "1", "--projector", "c", "--dry-run", code=1).stderr
    assert "There is no task 'c' whose projector could be kept" in told
    assert files(tmp_path) == before
    asked = run("export", merged, "-o", tmp_path / "1", code=2).stderr
    assert f"peft-many export {merged} --output {tmp_path / '1'} --format routed\n  keeps all" in asked
    asked = run("export", shelf["a"], "-o", tmp_path / "1", code=2).stderr
    assert f"peft-many export {shelf['a']} --output {tmp_path / '1'} --format model\n  for plain" in asked
    assert "routed" not in asked, "which it would refuse"
    assert "`--format model`" in run("export", shelf["a"], "-f", "routed", "-o", tmp_path / "1", code=1).stderr
    told = run("export", shelf["a"], "-f", "lora", "-o", tmp_path / "1", "--dry-run").stderr
    assert "`export_model` (`--format model`) keeps the projector." in told
    more = ["--with-tasks", "--check-for", "vllm", "--base-model", place]
    told = run("export", merged, "-f", "lora", "-o", tmp_path / "1", *more).stderr
    assert "expect most answers about images to be wrong" in told
    assert (tmp_path / "1" / "task_1" / "adapter_config.json").is_file()
    export_lora(merged, tmp_path / "2", with_tasks=True)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    more = ["--format", "model", "--base-model", place]
    told = run("export", merged, *more, "--projector", "a", "-o", tmp_path / "3")
    done = export_model(merged, tmp_path / "4", base_model=place, projector="a")
    assert files(tmp_path / "3") == files(tmp_path / "4")
    assert done.notes[0] in told.stderr
    read = json.loads(run("export", merged, *more, "-o", tmp_path / "5", "--json").stdout)
    assert read.keys() == {"folder", "notes"}
    assert "is the mean of the tasks'" in read["notes"][0]
    run("export", merged, "-f", "routed", "--base-model", place, "-o", tmp_path / "6")
    export_routed_model(merged, tmp_path / "7", base_model=place)
    assert files(tmp_path / "6") == files(tmp_path / "7")


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("Pass `gate_by='instructions'`.", "Pass `--gate-by instructions`."),
        ("With `rank=512` or `gate_lora=True`.", "With `--rank 512` or `--gate-lora`."),
        ('Not `gate_lora=False` but `projectors="mean"`.', "Not `--no-gate-lora` but `--projectors mean`."),
        ("It trains biases (`bias='all'`); `overwrite=True`.", "It trains biases (`bias='all'`); `overwrite=True`."),
    ],
)
def test_options_of_merging_are_called_as_they_are_typed(message, typed):
    assert as_typed(message) == typed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["merge", "x", "-o", "y"], 1, "There is no folder 'x'"),
        (["merge", "a", "b"], 2, "--output"),
        (["merge", "-o", "y"], 2, "Give either adapters or a --recipe"),
        (["merge", "a", "--recipe", "r", "-o", "y"], 2, "Give either adapters or a --recipe"),
        (["merge", "--recipe", "nowhere.yaml", "-o", "y"], 1, "There is no recipe"),
        (["merge", "a", "-o", "y", "--weight", "a"], 2, "'a' is not TASK=NUMBER"),
        (["merge", "a", "-o", "y", "--weight", "a=b"], 2, "'a=b' is not TASK=NUMBER"),
        (["merge", "a", "-o", "y", "--name", "b=c"], 2, "'b=c' is not ADAPTER=TASK; the adapters are 'a'"),
        (["merge", "a", "-o", "y", "--dtype", "int8"], 2, "`dtype` must be one of"),
        (["merge", "a", "-o", "y", "--rank", "0"], 2, "`rank` must be at least 1"),
        (["merge", "a", "-o", "y", "-w", "a=1", "-w", "a=2"], 2, "'a' is weighed twice"),
        (["merge", "a", "-o", "y", "--method", "magic"], 2, "unknown method 'magic'"),
        (["merge", "a", "-o", "y", "--device", "nonsense"], 1, "cannot be used here"),
        (["remove", "nowhere", "a", "-o", "y"], 1, "There is no folder 'nowhere'"),
        (["remove", "nowhere", "a"], 1, "is not a local folder, so it cannot be replaced"),
        (["export", "nowhere", "-o", "y"], 1, "There is no folder 'nowhere'"),
        (["export", "a", "-o", "y", "-f", "gguf"], 2, "'gguf' is not one of 'lora', 'model', 'routed'"),
        (["export", "a", "-o", "y", "-f", "lora", "--projector", "a"], 2, "Only --format model keeps"),
        (["export", "a", "-o", "y", "-f", "lora", "--base-model", "a"], 2, "needs no base model"),
        (["export", "a", "-o", "y", "-f", "model", "--with-tasks"], 2, "Only --format lora writes the"),
        (["export", "a", "-o", "y", "-f", "model", "--check-for", "vllm"], 2, "Only --format lora is checked"),
        (["report", "nowhere", "-o", "y"], 1, "There is no folder 'nowhere'"),
        (["inspect", "nowhere"], 1, "There is no folder 'nowhere'"),
        (["magic"], 2, "magic"),
    ],
)
def test_mistakes_end_in_one_message_and_a_code(tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    done = run(*words, code=code)
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere", "me/nowhere", "/nowhere/at/all"])
def test_the_last_line_is_the_error_though_a_bar_was_open(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    told = run("merge", name, "-o", "new", code=1).stderr
    assert "Reading adapters" in told
    assert told.rstrip("\n").rpartition("\n")[2].startswith("There is no folder")


def test_only_debug_shows_a_traceback(tmp_path, monkeypatch):
    done = CliRunner().invoke(app, ["--debug", "inspect", "nowhere"])
    assert isinstance(done.exception, FileNotFoundError)

    def fails(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("peft_many.inspect_adapter", fails)
    told = run("inspect", "x", code=1).stderr
    assert "Unexpected RuntimeError: a bug" in told
    assert "please report" in told


def test_version():
    assert run("--version").stdout.strip() == __version__


def test_tab_completion_knows_the_tasks_of_a_merge(merged, monkeypatch):
    words = f"peft-many remove {merged} "
    monkeypatch.setenv("_PEFT_MANY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", "3")
    done = CliRunner().invoke(app, [], prog_name="peft-many")
    assert done.stdout.split() == ["a", "b"]
    monkeypatch.setenv("COMP_WORDS", "peft-many merge x --router g")
    monkeypatch.setenv("COMP_CWORD", "4")
    assert CliRunner().invoke(app, [], prog_name="peft-many").stdout.split() == ["gaussian"]


def test_a_merge_ends_with_the_tasks_that_its_routing_confuses(shelf, tmp_path):
    chosen = [shelf["a"], shelf["b"], "--temperature", "9"]
    told = run("merge", *chosen, "-o", tmp_path / "1")
    assert told.stdout == f"The merge: {tmp_path / '1'}\n"
    line = next(line for line in told.stderr.splitlines() if line.startswith("• "))
    assert line.startswith("• 'a' and 'b' look alike: ")
    assert "interference" in told.stderr
    assert f"peft-many report {tmp_path / '1'} --output" in told.stderr
    assert line in run("merge", *chosen, "-o", tmp_path / "2", "--quiet").stderr
    head = "Expected routing of images at 'model.multi_modal_projector': "
    for words in (["inspect", tmp_path / "1"], ["plan", *chosen], ["report", tmp_path / "1", "-o", tmp_path / "r"]):
        shown = run(*words).stdout
        assert head in shown
        assert line in shown
    assert json.loads((tmp_path / "r" / "report.json").read_text())["doubts"] == [line.removeprefix("• ")]
    routing = json.loads(run("plan", *chosen, "--json", "-q").stdout)["routing"]
    assert routing["model.multi_modal_projector"]["shares"]["a"].keys() == {"a", "b"}


@pytest.mark.slow
def test_the_real_thing(shelf, tmp_path):
    """The entry point in a process of its own, progress bars and all."""
    scripts = re.search(r'^peft-many = "(.*):(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    program = f"import sys; sys.argv[0] = 'peft-many'; from {scripts[1]} import {scripts[2]} as run; run()"

    def call(*words):
        return new_process.run(program, *words, cwd=tmp_path)

    done = call("merge", shelf["a"], shelf["b"], "--output", "merged")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The merge: merged\n"
    assert "Merging 2 tasks: 100%" in done.stderr
    merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "expected", progress=False)
    assert files(tmp_path / "merged") == files(tmp_path / "expected")
    failed = call("merge", "x", "--output", "y")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "There is no folder 'x'" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "A", "B", "-o", "A", "--overwrite"],
        ["merge", "A", "B", "-o", "A", "--overwrite", "--dry-run"],
        ["add", "M", "B", "-o", "B"],
        ["pool", "A", "B", "-o", "A"],
        ["export", "A", "-f", "lora", "-o", "A"],
        ["export", "A", "-f", "lora", "-o", "A", "--dry-run"],
        ["export", "M", "-f", "model", "-o", "B", "--base-model", "B"],
        ["evaluate", "M", "-d", "a=none.json", "-o", "M"],
        ["report", "M", "-o", "M"],
    ],
)
def test_no_output_takes_the_place_of_an_input(shelf, merged, words):
    places = {"A": shelf["a"], "B": shelf["b"], "M": merged}
    before = {name: files(place) for name, place in places.items()}
    given = [str(places[word[:1]]) + word[1:] if word[:1] in places else word for word in words]
    assert "is also an input; nothing was written" in run(*given, code=1).stderr
    assert {name: files(place) for name, place in places.items()} == before


def test_an_output_may_lie_in_an_input(shelf, tmp_path):
    adapter = shutil.copytree(shelf["a"], tmp_path / "a")
    before = files(adapter)
    run("merge", adapter, shelf["b"], "-o", adapter / "merged", "-q")
    merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "expected", progress=False)
    assert files(adapter / "merged") == files(tmp_path / "expected")
    assert before.items() <= files(adapter).items()


def test_a_folder_around_the_inputs_is_not_replaced(shelf):
    before = files(shelf["a"])
    told = run("merge", shelf["a"], shelf["b"], "-o", shelf["a"].parent, "--overwrite", code=1).stderr
    assert "and no adapter to replace; nothing was written" in told
    assert files(shelf["a"]) == before


def test_a_merge_may_be_replaced_by_what_is_made_of_it(shelf, merged, tmp_path):
    run("merge", merged, shelf["c"], "-o", merged, "--overwrite", "-q")
    add_task(merge_adapter_files([shelf["a"], shelf["b"]], tmp_path / "2", progress=False), shelf["c"], progress=False)
    assert files(merged) == files(tmp_path / "2")


def test_a_report_replaces_an_earlier_one_only_if_asked_to(merged, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").touch()
    run("report", merged, "-o", out, "--no-conflicts", "-q")
    before = files(out)
    with monkeypatch.context() as patched:
        patched.setattr("peft_many.merge_report", None)  # it is found out before anything is computed
        told = run("report", merged, "-o", out, "-q", code=1).stderr
        assert "already holds 'report.png'" in told
        assert "`--overwrite`" in told
        patched.setitem(__import__("sys").modules, "peft_many.reports.page", None)
        assert 'pip install "peft-many[report]"' in run("report", merged, "-o", out, "-q", code=1).stderr
    assert files(out) == before
    run("report", merged, "-o", out, "-q", "--overwrite")
    assert files(out).keys() == before.keys()
    assert files(out)["report.json"] != before["report.json"]


def test_a_pool_is_not_made_for_a_folder_that_is_taken(shelf, merged, monkeypatch):
    monkeypatch.setattr("peft_many.editing.pooling.prepare_merge", None)
    assert "not empty" in run("pool", shelf["a"], shelf["b"], "-o", merged, code=1).stderr


def test_a_folder_that_may_not_be_read_is_said_in_words(shelf, monkeypatch):
    monkeypatch.setattr("os.access", lambda *asked: False)  # root may read all
    assert f"The folder '{shelf['a']}' cannot be read: permission denied." in run("inspect", shelf["a"], code=1).stderr

    def fails(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "x/y")

    monkeypatch.setattr("peft_many.inspect_adapter", fails)
    assert run("inspect", "x", code=1).stderr == "'x/y': Permission denied.\n"
