"""`evaluate_merge`: scores of the models' own answers, by who answered and by task; and what is shown of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import PeftWarning
from transformers import AutoTokenizer
from typer.testing import CliRunner

from peft_many import evaluate_merge, merge_adapter_files, save_evaluation
from peft_many.commands import app
from peft_many.data import scores
from peft_many.data.conversations import question_about
from peft_many.hub.sources import find_adapter
from peft_many.reports.evaluation import Evaluation
from peft_many.reports.running import BASE, MERGE, RunningMerge, answers_of
from tests.adapters import make, scatter
from tests.examples import toy
from tests.reports.test_asking import QUESTION, load, place, said  # noqa: F401  (a fixture)

ALONE = ["cold alone", "warm alone"]


@pytest.fixture(scope="module")
def data(place):  # noqa: F811
    """Questions whose right answer is what the task's own adapter says, so that it always scores full marks."""
    found = {}
    for task, colour in (("warm", "red"), ("cold", "blue")):
        model = PeftModel.from_pretrained(load(place), place / task)
        answer = said(model, place, colour)
        rows = [{"image": f"{colour}.png", "question": QUESTION, "answer": answer}] * 3
        found[task] = toy.write(place / f"{task}-test.json", rows)
    return found


def test_everybody_is_asked_everything(place, data, monkeypatch):  # noqa: F811
    found = evaluate_merge(place / "gated", data, max_new_tokens=8, progress=False)
    assert list(found.scores) == [MERGE, BASE, *ALONE]
    assert all(found.scores[f"{task} alone"][task] == 100 for task in data)
    assert found.scores[BASE] == {"warm": 0, "cold": 0}
    merged = PeftModel.from_pretrained(load(place), place / "gated")
    answer = said(merged, place, "red")
    assert found.answers[MERGE]["warm"] == [answer] * 3
    (row, *_) = found.conversations()["warm"]
    assert (row["question"], row["said"][MERGE]) == (QUESTION, answer)
    assert [row["said"]["warm alone"]] == row["right"]
    assert row["images"] == [str(place / "red.png")]
    assert found.cut_short == {who: {"warm": 3, "cold": 3} for who in found.scores}, "the toy never ends by itself"
    assert found.questions == {"warm": 3, "cold": 3}
    assert found.forgotten == {task: 100 - found.scores[MERGE][task] for task in data}
    assert found.mean["cold alone"] == sum(found.scores["cold alone"].values()) / 2
    own = evaluate_merge(place / "gated", data, alone="own", limit=2, max_new_tokens=8, progress=False)
    assert {who: list(row) for who, row in own.scores.items() if who in ALONE} == {
        "cold alone": ["cold"],
        "warm alone": ["warm"],
    }
    assert own.forgotten == found.forgotten
    assert own.questions == {"warm": 2, "cold": 2}
    none = evaluate_merge(place / "gated", {"other": data["warm"]}, alone="none", max_new_tokens=2, progress=False)
    assert list(none.scores) == [MERGE, BASE]
    assert none.forgotten == {}


def test_an_answer_ends_where_the_model_ends_it(place):  # noqa: F811
    running = RunningMerge.load(find_adapter(place / "merged"), [], hub={})
    example = question_about([], QUESTION)
    (said,) = answers_of(running.model, running.collator, [example], max_new_tokens=3)
    assert not said.ended
    ids = running.collator.tokenizer(said.text.split()[-1], add_special_tokens=False)["input_ids"]
    running.model.generation_config.eos_token_id = ids
    (said,) = answers_of(running.model, running.collator, [example], max_new_tokens=3)
    assert said.ended


def test_caption_metrics_are_told_one_by_one(place, data, monkeypatch):  # noqa: F811
    asked = []

    def caption_scores(captions, references):
        asked.append((captions, references))
        return {"CIDEr": 60.0, "mean": 30.0}

    monkeypatch.setattr(scores, "caption_scores", caption_scores)
    monkeypatch.setattr(scores, "check_captions_can_be_scored", lambda: None)
    options = {"metric": {"warm": "captions"}, "alone": "own", "max_new_tokens": 8, "progress": False}
    found = evaluate_merge(place / "gated", data, **options)
    assert found.captions == {
        who: {"warm": {"CIDEr": 60.0, "mean": 30.0}} for who in found.scores if who != "cold alone"
    }
    assert {row["warm"] for row in found.scores.values() if "warm" in row} == {30.0}
    assert found.scores["cold alone"] == {"cold": 100.0}
    assert [captions for captions, _ in asked] == [row["warm"] for row in found.answers.values() if "warm" in row]
    assert found.to_dict()["captions"] == found.captions


def test_one_tasks_adapter_is_evaluated_too(place, data):  # noqa: F811
    found = evaluate_merge(place / "warm", data, limit=1, max_new_tokens=8, progress=False)
    assert list(found.scores) == ["adapter", BASE]
    assert (found.scores["adapter"]["warm"], found.forgotten) == (100, {})


def test_tasks_that_were_never_measured_are_asked_alone(place, data, tmp_path):  # noqa: F811
    for seed, task in enumerate(data):
        model = get_peft_model(load(place), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        scatter(model, seed)
        model.save_pretrained(tmp_path / task)
    merge_adapter_files([tmp_path / task for task in data], tmp_path / "merged", method="ties", progress=False)
    found = evaluate_merge(tmp_path / "merged", data, limit=1, max_new_tokens=8, progress=False)
    for task in data:
        model = PeftModel.from_pretrained(load(place), tmp_path / task)
        assert found.answers[f"{task} alone"]["warm"] == [said(model, place, "red")]


def test_what_cannot_be_taken_out_is_said(place, data, tmp_path):  # noqa: F811
    merge_adapter_files([place / "warm", place / "cold"], tmp_path / "1", weights={"warm": 0.0}, progress=False)
    with pytest.warns(match="'warm' cannot be asked alone: .* had the weight 0"):
        found = evaluate_merge(tmp_path / "1", data, alone="own", limit=1, max_new_tokens=8, progress=False)
    assert found.forgotten.keys() == {"cold"}


def test_means_of_projectors_cannot_be_taken_apart(place, data, tmp_path):  # noqa: F811
    merge_adapter_files([place / "warm", place / "cold"], tmp_path / "mean", projectors="mean", progress=False)
    with pytest.warns(match="'cold' cannot be asked alone: "):
        found = evaluate_merge(tmp_path / "mean", data, limit=1, max_new_tokens=2, progress=False)
    assert list(found.scores) == [MERGE, BASE]


def test_perplexity_is_that_of_the_texts_tokens(place, data, tmp_path, monkeypatch):  # noqa: F811
    text = tmp_path / "prose.txt"
    text.write_text("What colour is it ? red green blue grey a chat between a curious user and an assistant")
    monkeypatch.setattr("peft_many.reports.perplexity._WINDOW", 1000)
    whole = evaluate_merge(place / "merged", data, text=text, alone="none", limit=1, max_new_tokens=1, progress=False)
    ids = AutoTokenizer.from_pretrained(place / "base")(text.read_text(), return_tensors="pt")["input_ids"]
    for who, model in {BASE: load(place), MERGE: PeftModel.from_pretrained(load(place), place / "merged")}.items():
        with torch.no_grad():
            expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
        assert whole.perplexity[who] == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("peft_many.reports.perplexity._WINDOW", 4)
    cut = evaluate_merge(place / "merged", data, text=text, alone="none", limit=1, max_new_tokens=1, progress=False)
    assert cut.perplexity[BASE] != whole.perplexity[BASE]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"data": {}}, "nothing to evaluate on"),
        ({"data": ["warm.json"]}, "`data` must map tasks' names to test questions, but it is a list"),
        ({"metric": "bleu"}, "no metric 'bleu'"),
        ({"metric": {"warm": "bleu"}}, "no metric 'bleu'"),
        ({"data": {"warm": "nowhere.json"}}, "There is no file"),
        ({"text": "nowhere.txt"}, "There is no file 'nowhere.txt'"),
        ({"alone": "some"}, "`alone` must be one of 'all', 'own', 'none'"),
        ({"metric": {"wram": "vqa"}}, "`metric` names 'wram', of which no data are given; there are 'warm', 'cold'"),
    ],
)
def test_mistakes_show_before_the_model_is_loaded(place, data, monkeypatch, options, match):  # noqa: F811
    monkeypatch.setattr("peft_many.reports.running.RunningMerge.load", None)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        evaluate_merge(place / "merged", **{"data": data, **options})


def test_data_that_no_task_is_called_by_are_named(place, data):  # noqa: F811
    given = {"limit": 1, "max_new_tokens": 2, "progress": False}
    with pytest.warns(PeftWarning, match="called 'wram'.*the tasks are 'cold', 'warm'.*Did you mean 'warm' by 'wram'"):
        evaluate_merge(place / "merged", {"wram": data["warm"], "cold": data["cold"]}, alone="own", **given)


FOUND = Evaluation(
    {"warm": "exact", "cold": "vqa"},
    {"warm": 3, "cold": 3},
    {MERGE: {"warm": 50.0, "cold": 75.0}, "warm alone": {"warm": 60.0}},
    {MERGE: 9.5, BASE: 9.25},
)


def test_what_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    folder = save_evaluation(FOUND, tmp_path / "new" / "evaluated")
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "evaluation.png", "answers.json"}
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["forgotten"] == {"warm": 10.0}
    assert written["mean"] == {MERGE: 62.5}
    assert (folder / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_long_names_keep_their_ends_in_the_picture():
    draw_scores = pytest.importorskip("peft_many.reports.scores_picture").draw_scores
    figure = draw_scores({"one_of_many_adapters_on_charts alone": {"x": 1.0}}, {"x": "exact"})
    (label,) = figure.axes[0].get_yticklabels()
    assert label.get_text() == "one_of_many_adapt…charts alone"


def test_an_earlier_evaluation_is_replaced_only_if_asked_to(tmp_path, monkeypatch):
    folder = save_evaluation(FOUND, tmp_path / "evaluated")
    (folder / "evaluation.json").unlink()
    with pytest.raises(FileExistsError, match=r"already holds 'answers.json'.*--overwrite"):
        save_evaluation(FOUND, folder)
    monkeypatch.setattr("peft_many.evaluate_merge", None)
    told = CliRunner().invoke(app, ["evaluate", "merged", "--data", "a=a.json", "-o", str(folder)])
    assert told.exit_code == 1
    assert "already holds" in told.stderr
    monkeypatch.setitem(__import__("sys").modules, "peft_many.reports.scores_picture", None)
    save_evaluation(FOUND, folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "answers.json"}, "no picture of the earlier"


def test_an_output_that_cannot_be_is_found_out_before_anybody_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_many.evaluate_merge", None)
    (tmp_path / "file").touch()
    words = ["evaluate", "merged", "--data", "a=a.json", "-o", str(tmp_path / "file" / "new")]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 1
    assert "is a file" in told.stderr
    adapter = make(tmp_path / "a").folder
    with pytest.raises(FileExistsError, match="is an adapter's; nothing was written"):
        save_evaluation(FOUND, adapter)


def test_what_was_found_is_shown_though_it_cannot_be_written(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("peft_many.evaluate_merge", lambda *args, **options: FOUND)
    monkeypatch.setattr("peft_many.save_evaluation", full)
    told = CliRunner().invoke(app, ["evaluate", "merged", "--data", "a=a.json", "-o", str(tmp_path / "new")])
    assert told.exit_code == 1
    assert "75.0" in told.stdout
    assert "No space left" in told.stderr


def test_the_command(place, data, tmp_path):  # noqa: F811
    words = ["evaluate", str(place / "gated"), "--data", f"warm={data['warm']}", f"cold={data['cold']}"]
    words += ["--max-new-tokens", "8", "--limit", "1", "--alone", "own", "--quiet"]
    told = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "evaluated"), "--metric", "cold=vqa"])
    assert told.exit_code == 0, told.output
    for word in (
        "merge",
        BASE,
        *ALONE,
        "100.0",
        "Questions: warm 1 (exact), cold 1 (vqa)",
        "The merge compared with each task's adapter alone, in points",
    ):
        assert word in told.stdout
    found = evaluate_merge(
        place / "gated", data, metric={"cold": "vqa"}, limit=1, alone="own", max_new_tokens=8, progress=False
    )
    assert json.loads((tmp_path / "evaluated" / "evaluation.json").read_text()) == found.to_dict()
    told = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(told.stdout)["scores"].keys() == found.scores.keys()
    assert CliRunner().invoke(app, words[:2]).exit_code == 2
    twice = CliRunner().invoke(app, [*words[:2], "--data", "a/test.jsonl", "b/test.jsonl"])
    assert twice.exit_code == 2
    assert "given twice" in twice.output
    assert CliRunner().invoke(app, [*words, "--metric", "vqa", "--metric", "exact"]).exit_code == 2
