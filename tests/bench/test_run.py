"""The benchmark in small: what it measures, that it goes on where it stopped, and the report that is made of it."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from typer.testing import CliRunner

from benchmarks.mini_ucit import plain_merge, workshop
from benchmarks.mini_ucit.__main__ import app
from benchmarks.mini_ucit.ablations import ablations
from benchmarks.mini_ucit.gates import gates
from benchmarks.mini_ucit.methods import MAIN, METHODS, Method, same
from benchmarks.mini_ucit.model import MODELS
from benchmarks.mini_ucit.parts import added, pairs_of, with_parts
from benchmarks.mini_ucit.pictures import residuals
from benchmarks.mini_ucit.plain_merge import plain_merges
from benchmarks.mini_ucit.prediction import MERGES, predictions
from benchmarks.mini_ucit.report import read_results, write_report
from benchmarks.mini_ucit.routers import routers
from benchmarks.mini_ucit.run import Settings, all_methods, run
from benchmarks.mini_ucit.tables import tables_of
from benchmarks.mini_ucit.tasks import TASKS
from benchmarks.mini_ucit.workshop import MEASURED, Workshop

LLAVA = MODELS["llava"]
ROWS = 8  # of a batch
FEW = [task for task in TASKS if task.name in ("charts", "scenes", "captions")]


class FewSamples(Workshop):
    """Measures on two batches at the most, the second smaller than the first."""

    def samples(self, task, count=MEASURED):
        return super().samples(task, min(count, ROWS + 2))


def few_steps(folder, steps=2, tests=4, tasks=FEW[:2], kind=FewSamples):
    return kind(LLAVA, None, tasks, folder, seed=0, steps=steps, tests=tests)


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    with pytest.MonkeyPatch.context() as patch:
        for module in (workshop, plain_merge):
            patch.setattr(module, "BATCH_SIZE", ROWS)
        patch.setattr(plain_merge, "KEPT", 2)
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return few_steps(tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def logits(model):
    return model(**shop_batch()).logits


def shop_batch():
    return few_steps(None).measured(FEW[0], samples=3)[0]


def test_parts_are_those_of_the_adapters(shop):
    one, two = (shop.alone(task) for task in shop.tasks)
    whole = PeftModel.from_pretrained(shop.base(), one)
    torch.testing.assert_close(logits(with_parts(shop.base, lora=one, projectors=one)), logits(whole))
    mixed = with_parts(shop.base, lora=one, projectors=two)
    assert not torch.allclose(logits(mixed), logits(whole))
    layer = "model.language_model.layers.0.mlp.down_proj"
    delta = mixed.get_base_model().get_submodule(layer).get_delta_weight("default")
    torch.testing.assert_close(delta, whole.get_base_model().get_submodule(layer).get_delta_weight("default"))
    both = with_parts(shop.base, lora=added([pairs_of(one), pairs_of(two)]), projectors=None)
    other = PeftModel.from_pretrained(shop.base(), two).get_base_model().get_submodule(layer)
    expected = delta + other.get_delta_weight("default")
    torch.testing.assert_close(both.get_base_model().get_submodule(layer).get_delta_weight("default"), expected)


def test_adapters_name_the_model_not_its_folder(shop):
    assert PeftConfig.from_pretrained(shop.alone(FEW[0])).base_model_name_or_path == "mini-ucit/llava"


def test_an_adapter_is_made_once_and_whole(shop):
    folder = shop.alone(shop.tasks[0])
    changed = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert shop.alone(shop.tasks[0]) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == changed

    def fails(place):
        (place / "half").touch()
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        shop.made("broken", fails)
    assert not (shop.folder / "broken").exists()


OTHERS = [*plain_merges(), *ablations(), *predictions()]
ONE_OF_EACH = [*METHODS.values(), *gates(), *{one.group: one for one in OTHERS}.values()]


@pytest.mark.parametrize("method", ONE_OF_EACH, ids=lambda method: method.name)
def test_every_method_scores(shop, method):
    measured = method.measure(shop)
    rows = measured.scores
    assert [len(row) for row in rows] == ([1, 2] if getattr(method, "every_stage", False) else [2])
    assert all(0 <= score <= 100 for row in rows for score in row)
    assert (measured.base is not None) == isinstance(method, Method)


def test_routers_know_their_tasks():
    """Negatives and night pictures are far apart; with more images than one everybody can tell."""
    shop = few_steps(None, kind=Workshop)
    for router in routers():
        if any(few in router.name for few in ("4 images", "16", "8 prototypes", "unknown task left, above 6")):
            continue
        assert min(router.measure(shop).scores[0]) > 50, router.name


def test_names_are_used_once():
    names = [method.name for method in all_methods()]
    assert len(set(names)) == len(names)
    assert not {method.group for method in OTHERS} & {method.group for method in METHODS.values()}


def test_orthogonal_training_adds_up(shop):
    first, both = (pairs_of(shop.orthogonal(stage)) for stage in (1, 2))
    for name, (A, B) in first.items():
        torch.testing.assert_close(both[name][0][: len(A)], A)
        torch.testing.assert_close(both[name][1][:, : len(A)], B)
        assert len(both[name][0]) == 2 * len(A)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    asked = []

    def fake(name, every_stage=False):
        def after(shop, stage):
            asked.append((name, stage))
            return same(shop.base())

        return Method(name, MAIN, "", after, every_stage)

    settings = Settings(steps=1, tests=2, tasks=FEW[:2])
    run(tmp_path, ["llava"], [3], settings, [fake("zero-shot")])
    found = run(tmp_path, ["llava"], [3], settings, [fake("zero-shot"), fake("MAny", every_stage=True)])
    assert asked == [("zero-shot", 2), ("MAny", 1), ("MAny", 2)]
    content = json.loads((tmp_path / "llava" / "seed3" / "results.json").read_text())
    assert content["scores"] == found[0].scores
    assert [len(row) for row in content["scores"]["MAny"]] == [1, 2]
    assert found[0].matrix("zero-shot") is None
    assert found[0].matrix("MAny").tasks == ("charts", "scenes")
    with pytest.raises(ValueError, match="another output folder"):
        run(tmp_path, ["llava"], [3], Settings(steps=2, tests=2, tasks=FEW[:2]), [])


def results_of(folder, seeds):
    """Invented scores, to be read by the report."""
    tasks = [task.name for task in TASKS]
    for seed in range(seeds):
        scores = {
            "alone": [[80.0 + seed] * 6],
            "MAny": [[70.0 + seed] * t for t in range(1, 7)],
            "λ = 1": [[50.0] * 6],
        }
        about = {
            "model": "llava",
            "seed": seed,
            "steps": 1,
            "tests": 1,
            "tasks": tasks,
            "environment": {"python": "3"},
        }
        place = folder / "llava" / f"seed{seed}"
        place.mkdir(parents=True)
        content = {"about": about, "scores": scores, "seconds": dict.fromkeys(scores, 1.0)}
        (place / "results.json").write_text(json.dumps(content))


def test_the_report_is_made_of_the_results_alone(tmp_path):
    results_of(tmp_path, seeds=3)
    page = write_report(read_results(tmp_path), tmp_path / "report").read_text()
    assert "71.0 ± 1.0" in page
    assert "88%" in page
    assert page.count("data:image/png;base64,") == 3
    assert "<script" not in page
    tables = (tmp_path / "report" / "tables.md").read_text()
    assert "### llava: methods (3 seeds)" in tables
    assert "| λ = 1 | 50.0 |" in tables
    assert (tmp_path / "report" / "llava-forgetting.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_fewer_seeds_say_so(tmp_path):
    results_of(tmp_path, seeds=3)
    runs = read_results(tmp_path)["llava"]
    del runs[0].scores["λ = 1"], runs[2].scores["MAny"]
    tables = {table.title: table for table in tables_of(runs, list(all_methods()))}
    assert "seeds" in tables["llava: methods (3 seeds)"].columns
    rows = {row[0]: row for row in tables["llava: methods (3 seeds)"].rows}
    assert rows["alone"][1:3] == ["3", "81.0"]
    assert rows["MAny"][1:3] == ["2", "70.5"]
    assert "88%" in rows["MAny"]  # of what these two seeds get alone
    assert tables["llava: ridge (3 seeds)"].rows[0][1] == "2"


def test_residuals_and_losses_are_compared_by_rank(tmp_path):
    results_of(tmp_path, seeds=2)
    runs = read_results(tmp_path)["llava"]
    assert residuals(runs) is None
    for run_ in runs:
        for place, name in enumerate(MERGES):
            run_.scores[f"residual of {name}"] = [[10.0 * place + 3 * t for t in range(6)]]
            run_.scores[f"accuracy of {name}"] = [[80.0 - 5 * place - t * (-1) ** t for t in range(6)]]
    by_task, by_merge = residuals(runs).axes
    assert "rank correlation 1.00" in by_task.get_title()
    losses = [0, -1, 2, -3, 4, -5]
    ranks = [sorted(losses).index(lost) for lost in losses]
    expected = 1 - 6 * sum((rank - t) ** 2 for t, rank in enumerate(ranks)) / (6 * 35)
    assert f"rank correlation {expected:.2f}" in by_merge.get_title()


def test_every_method_answers_what_the_base_model_could(tmp_path):
    """The base model keeps all of it; several models share the questions."""
    shop = few_steps(None, tests=40)
    base = shop.base()
    whole, shared = shop.base_skills([base]), shop.base_skills([base, shop.base(), base])
    assert (whole.plain, whole.unseen) == (shared.plain, shared.unseen)
    assert whole.perplexity == pytest.approx(shared.perplexity, rel=0.3)  # by tokens, of each part
    assert whole.plain > 70 > whole.unseen > 20
    assert shop.base_skills([LLAVA.build().eval()]).perplexity > 10 * whole.perplexity


def test_tables_say_what_is_left_of_the_base_model(tmp_path):
    results_of(tmp_path, seeds=1)
    runs = read_results(tmp_path)["llava"]
    columns = next(tables_of(runs, list(all_methods()))).columns
    assert "base kept" not in columns  # results of earlier runs
    runs[0].scores["zero-shot"] = [[0.0] * 6]
    runs[0].base["zero-shot"] = {"plain": 80.0, "unseen": 0.0, "perplexity": 2.0}
    runs[0].base["MAny"] = {"plain": 60.0, "unseen": 10.0, "perplexity": 3.0}
    table = next(tables_of(runs, list(all_methods())))
    rows = {row[0]: dict(zip(table.columns, row)) for row in table.rows}
    kept = ("base kept", "unseen look kept", "perplexity of text")
    assert [rows["MAny"][column] for column in kept] == ["75%", "", "× 1.5"]
    assert [rows["alone"][column] for column in kept] == ["", "", ""]


def test_the_command_says_what_is_wrong(tmp_path):
    for arguments, message in (
        (["--model", "gpt"], "no model 'gpt'"),
        (["--method", "magic"], "no method 'magic'"),
        (["--suite", "seven"], "no suite 'seven'; there are hard, six"),
        (["--suite", "hard", "--method", "ridge"], "no method 'ridge'"),
        (["--only-report"], "no results of the benchmark"),
    ):
        result = CliRunner().invoke(app, ["--output", str(tmp_path), *arguments])
        assert result.exit_code == 2
        assert message in result.output
    results_of(tmp_path, seeds=1)
    result = CliRunner().invoke(app, ["--output", str(tmp_path), "--only-report"])
    assert result.exit_code == 0
    assert "report.html" in result.output
