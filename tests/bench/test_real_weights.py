"""The benchmark on real weights, without any of them: tiny models, painted stand-ins, and archives made here."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image
from torch import nn
from transformers import TrainingArguments
from typer.testing import CliRunner

from benchmarks.real_weights import comparing, drawings, fetching, jobs, run
from benchmarks.real_weights.__main__ import app
from benchmarks.real_weights.alignment import say_words
from benchmarks.real_weights.charts import Table
from benchmarks.real_weights.learning import IGNORED, AnswerTrainer, Schedule, compile_layers, learn
from benchmarks.real_weights.messages import find_tasks
from benchmarks.real_weights.methods import METHODS, VARIANTS
from benchmarks.real_weights.packages import PICTURES, WEIGHTS, Package
from benchmarks.real_weights.pictures import paint_tasks
from benchmarks.real_weights.records import Records
from benchmarks.real_weights.scores import score
from benchmarks.real_weights.skills import prose
from benchmarks.real_weights.tasks import CAPTIONS, SHARING, TASKS
from benchmarks.real_weights.things import COUNTRIES, GROUP_OF
from peft_many import MAnyConfig, MergeOptions
from peft_many.data.batches import ChatCollator, Rows
from peft_many.reports.perplexity import perplexity_of
from tests import tiny
from tests.examples import toy

# --- Packages --------------------------------------------------------------------------------------------------------


def tarball(path: Path, files: dict[str, str]) -> Package:
    """An archive as npm packs it, and the package that it is."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("npm", "@scope/icons", "1.0.0", "MIT", "icons", digest)


def test_what_is_fetched_is_checked_and_kept(tmp_path, monkeypatch):
    package = tarball(tmp_path / "made.tgz", {"package/icons.json": "{}"})
    asked = []

    def give(wanted, folder):
        asked.append(wanted)
        target = folder / "given.tgz"
        target.write_bytes((tmp_path / "made.tgz").read_bytes())
        return target

    monkeypatch.setattr(fetching, "_from_npm", give)
    cache = tmp_path / "cache"
    for _ in range(2):
        fetching.fetch([package], cache)
    assert asked == [package]
    assert fetching.member(package, "package/icons.json", cache).read_text() == "{}"
    with pytest.raises(ValueError, match="the registry gives another file"):
        fetching.fetch([replace(package, sha256="0" * 64)], cache)
    assert len([path for path in cache.iterdir() if path.suffix == ".tgz"]) == 1, "nothing wrong is kept"


def test_without_npm_the_registry_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="NPM_CONFIG_REGISTRY"):
        fetching._npm_registry()
    (tmp_path / ".npmrc").write_text("audit = false\nregistry = https://registry.example/\n")
    assert fetching._npm_registry() == "https://registry.example/"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://other.example")
    assert fetching._npm_registry() == "https://other.example"


def test_every_package_says_what_it_is():
    for package in (*WEIGHTS, *PICTURES):
        assert len(package.sha256) == 64
        assert package.licence
        assert package.about
    listed = CliRunner().invoke(app, ["--licences"])
    assert listed.exit_code == 0
    assert listed.output.count("\n") == len((*WEIGHTS, *PICTURES))


# --- Pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    """Packages without a drawing in them: names as they are there, and squares in place of what they draw."""
    icons = {name: {"body": ""} for name in (*GROUP_OF, "abacus", "anvil", "arch", "axe", "barn", "bow")}
    countries = [
        {"code": code, "name": code.upper(), "capital": f"{code} city", "continent": "Asia", "iso": True}
        for code in COUNTRIES
    ]
    barley = [{"variety": f"v{i % 3}", "yield": 10 + (7 * i) % 23} for i in range(60)]
    files = {
        "country.json": countries,
        "metadata.json": {"categories": {name: [*GROUP_OF] for name in drawings._GROUPS}},
    }

    def member(package, name, cache):
        content = files.get(Path(name).name, barley)
        return toy.write(Path(cache) / "files" / Path(name).name, content)

    monkeypatch.setattr(drawings, "member", member)
    monkeypatch.setattr("benchmarks.real_weights.charts.member", member)
    table = Table("barley.json", "variety", "yield")
    monkeypatch.setattr("benchmarks.real_weights.charts._TABLES", dict.fromkeys(("train", "test"), (table,)))
    monkeypatch.setattr(drawings, "_icon_set", lambda package, cache: {"icons": icons})
    monkeypatch.setattr(drawings, "_icon", lambda *_: Image.new("RGBA", (40, 40), (200, 30, 60, 255)))
    monkeypatch.setattr(drawings, "_rendered", lambda svg: Image.new("RGBA", (40, 30), (20, 30, 160, 255)))
    photographs = (Image.new("RGB", (300, 260), (90, 120, 60)),)
    monkeypatch.setattr("benchmarks.real_weights.looks.photographs", lambda split: photographs)


def test_tasks_are_painted_once_and_alike_for_a_seed(stand_ins, tmp_path):
    every, counts = [*TASKS, *SHARING, CAPTIONS], {"train": 6, "test": 3}
    for folder in ("one", "two"):
        paint_tasks(tmp_path / folder, every, tmp_path / "cache", counts)
    tasks = find_tasks(tmp_path / "one")
    assert [task.name for task in tasks] == [task.name for task in every]
    for task, again in zip(tasks, find_tasks(tmp_path / "two")):
        for split, count in counts.items():
            examples, others = task.examples(split), again.examples(split)
            assert len(examples) == count
            assert [e.answer for e in examples] == [e.answer for e in others]
            assert all(e.answer for e in examples)
            for example, other in zip(examples, others):
                assert example.images[0].read_bytes() == other.images[0].read_bytes()
                with Image.open(example.images[0]) as image:
                    assert image.size == (224, 224)
    objects, sentences = (
        find_tasks(tmp_path / "one", [name])[0].examples("test") for name in ("objects", "sentences")
    )
    for one, other in zip(objects, sentences):
        assert (one.images, one.question) == (other.images, other.question)
        assert one.answer in other.answer
    written = (tmp_path / "one" / "tasks.json").stat().st_mtime_ns, (tmp_path / "one" / "objects").stat().st_mtime_ns
    paint_tasks(tmp_path / "one", every[:1], tmp_path / "cache", counts)
    assert (tmp_path / "one" / "objects").stat().st_mtime_ns == written[1]


def test_questions_have_the_answers_that_the_pictures_have():
    by_name = {task.name: task for task in (*TASKS, *SHARING, CAPTIONS)}
    rng = np.random.default_rng(0)
    solids = {"solids": [("red", "cube"), ("red", "sphere"), ("blue", "cube")]}
    for _ in range(20):
        question, answer = by_name["arithmetic"].ask(solids, rng)
        left = {"cubes": "1", "spheres": "2", "red": "1", "blue": "2"}
        assert answer == next(value for name, value in left.items() if f"all {name}" in question)
        question, letter = by_name["icons"].ask({"count": 3, "most": 6}, rng)
        assert f"{letter}. 3" in question
        assert len({*question.split()[-5::2]}) == 3
    scene = {"things": ["owl", "glasses"], "relation": "above", "count": 1}
    assert by_name["scenes"].ask(scene, rng)[1] == "an owl above glasses"
    assert by_name["neighbours"].ask(scene, rng) == ("What is the owl above?", "glasses")


# --- Tasks as files --------------------------------------------------------------------------------------------------


def test_tasks_are_the_folders_with_two_files(place, tmp_path):
    assert [task.name for task in find_tasks(place / "data")] == ["colours", "others"]
    assert [task.name for task in find_tasks(place / "data", ["others"])] == ["others"]
    with pytest.raises(FileNotFoundError, match="no train and test file"):
        find_tasks(tmp_path, ["task"])
    with pytest.raises(FileNotFoundError, match="no tasks"):
        find_tasks(tmp_path)


# --- Learning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    toy.save_base(folder / "base")
    toy.add_task(folder / "data", "colours", ["red", "blue", "green", "blue"] * 3)
    toy.add_task(folder / "data", "others", ["grey"] * 8)
    return folder


def trainer_of(place, tmp_path, model):
    collator = ChatCollator(toy.processor("llava"))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False)
    rows = Rows(find_tasks(place / "data")[0].examples("train"))
    return AnswerTrainer(model, arguments), collator.training([rows[i] for i in range(4)])


def test_the_loss_is_the_models_own(place, tmp_path):
    model = tiny.build("llava")
    trainer, batch = trainer_of(place, tmp_path, model)
    assert (batch["labels"] == IGNORED).any()
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)

    class Plain(nn.Module):
        """A model that computes all logits."""

        def forward(self, **inputs):
            return model(**inputs)

    torch.testing.assert_close(trainer.compute_loss(Plain(), batch), model(**batch).loss)


def test_frozen_means_stay_in_training(place, tmp_path):
    model = tiny.build("llava")
    model.add_module("norm", nn.BatchNorm2d(3))
    trainer, batch = trainer_of(place, tmp_path, model)
    model.train()
    trainer.compute_loss(model, batch)
    assert model.training
    assert not model.norm.training


def test_training_goes_on_where_it_stopped(place, tmp_path, monkeypatch):
    examples = find_tasks(place / "data")[0].examples("train")
    collator = ChatCollator(toy.processor("llava"))
    schedule = Schedule(steps=6, batch_size=4, learning_rate=1e-2, at_once=2, save_steps=2)

    def trained(folder, break_at=None):
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("llava"), MAnyConfig(r=2, task_name="colours"))
        steps = []

        def counted(self, *args, **kwargs):
            if len(steps) == break_at:
                raise KeyboardInterrupt
            steps.append(1)
            return original(self, *args, **kwargs)

        original = AnswerTrainer.compute_loss
        with monkeypatch.context() as patch:
            patch.setattr(AnswerTrainer, "compute_loss", counted)
            learn(model, collator, examples, schedule, folder, seed=0, label="learning")
        return get_peft_model_state_dict(model), len(steps)

    whole, passes = trained(tmp_path / "whole")
    assert passes == 12
    assert not (tmp_path / "whole").exists(), "the state is of no use afterwards"
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", break_at=9)
    resumed, rest = trained(tmp_path / "broken")
    assert rest == 4, "two steps of two passes were left"
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_compiled_layers_learn_what_others_do(place, tmp_path):
    learnt = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.build("llava"), MAnyConfig(r=2, task_name="colours"))
        trainer, batch = trainer_of(place, tmp_path, model)
        if compiled:
            compile_layers(model, backend="aot_eager")  # without a C++ compiler
        trainer.compute_loss(model, batch).backward()
        learnt.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(learnt[0]) > 10
    torch.testing.assert_close(learnt[1], learnt[0])


class Seeing(nn.Module):
    """What `say_words` needs of a model: a projector from colours to the width of the words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.multi_modal_projector = nn.Linear(3, 32)
        nn.init.zeros_(self.model.multi_modal_projector.weight)  # which says nothing yet
        self.words = nn.Embedding(words, 32, _weight=0.2 * torch.randn(words, 32))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_image_features(self, pixel_values):
        return SimpleNamespace(last_hidden_state=nn.functional.adaptive_avg_pool2d(pixel_values, 2))

    def get_input_embeddings(self):
        return self.words


def test_a_projector_learns_the_rare_words_of_captions(tmp_path):
    colours = ("red", "blue", "green", "grey")
    toy.add_task(tmp_path, "captions", [f"{colour} image" for colour in colours] * 16)
    examples = find_tasks(tmp_path)[0].examples("train")
    collator = ChatCollator(toy.processor("llava"))
    torch.manual_seed(0)
    model = Seeing(words=tiny.VOCABULARY)
    shares = say_words(model, collator, examples, rounds=1_600)
    assert shares[-1] < 0.2 < shares[0]
    tokenizer, rows = collator.processor.tokenizer, Rows(examples)
    said = []
    for i in range(len(colours)):
        pixels = collator.processor.image_processor(rows[i]["images"], return_tensors="pt")["pixel_values"]
        token = model.model.multi_modal_projector(model.get_image_features(pixels).last_hidden_state[0, :, 0, 0])
        said.append(tokenizer.decode(int(torch.cdist(token[None], model.words.weight).argmin())))
    assert said == list(colours), "not 'image', which all captions have"


COMPARED = ("zero-shot", "alone", "gated by both", "sequential")


def test_one_command_takes_any_model_and_any_tasks(place, tmp_path, monkeypatch):
    options = ["--output", str(tmp_path), "--model", str(place / "base"), "--data", str(place / "data")]
    options += ["--steps", "2", "--batch-size", "4", "--tests", "4"]
    options += [word for name in COMPARED for word in ("--method", name)]
    monkeypatch.setattr(comparing, "prose", lambda: "What? " * 40)
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "seed0" / run.RESULTS_NAME).read_text())
    compared = [name for name in results if name.startswith("methods/")]
    assert compared == [f"methods/{name}/colours+others" for name in COMPARED]
    for name in compared:
        found = results[name]["result"]
        assert list(found["scores"]) == ["colours", "others"]
        assert found["skills"]["perplexity"] > 1
        known = name.split("/")[1] in ("zero-shot", "alone")
        assert [len(given) for given in found["answers"].values()] == ([] if known else [4, 4])
        assert f"| {name.split('/')[1]} | 1 |" in (tmp_path / "tables.md").read_text()
    for name in ("alone/colours", "alone/others"):
        stage = results[name]
        assert 0 <= stage["result"]["score"] <= 100
        assert stage["result"]["losses"]
        assert (tmp_path / "seed0" / name / "adapter_statistics.safetensors").exists()
    picture = tmp_path / "methods-1.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    picture.unlink()
    monkeypatch.setattr(run, "learn", None)
    for again in (options, ["--only-report", "--output", str(tmp_path)]):
        done = CliRunner().invoke(app, again)
        assert done.exit_code == 0, done.output
        assert picture.exists()
    for wrong in (["--task", "nothing"], ["--method", "nothing"], ["--only-report", "--output", "nothing"]):
        refused = CliRunner().invoke(app, [*options, *wrong])
        assert refused.exit_code == 2
        assert "nothing" in refused.output


def test_variants_are_options_that_there_are():
    assert [method.name for method in comparing.chosen(["MAny, ridge=0.01", "MAny"])] == ["MAny", "MAny, ridge=0.01"]
    for variant in VARIANTS.values():
        MergeOptions(**variant.make.keywords)


def test_several_at_once_find_what_one_after_the_other_do(place, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "prose", lambda: "What? " * 40)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda count, context, **_: ThreadPoolExecutor(1))
    found = []
    for name in ("one", "several"):
        wants = run.Settings(
            tmp_path / name, str(place / "base"), place / "data", training=Schedule(2, 2, 1e-3), tests=2
        )
        bench, methods = run.Bench(wants), ["alone", "average", "joint"]
        if name == "one":
            bench.train()
            comparing.compare(bench, methods)
        else:
            jobs.at_the_same_time(wants, methods, 2)
        stages = bench.records.all()
        found.append({stage: stages[stage]["result"] for stage in sorted(stages)})
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_one_that_fails_does_not_end_the_others(place, tmp_path, monkeypatch):
    def broken(bench, names):
        if names == ["average"]:
            raise ValueError("no average today")
        bench.records.record(names[0], lambda: 1)

    monkeypatch.setattr(jobs, "compare", broken)
    monkeypatch.setattr(jobs, "_adapter", lambda *_: None)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda count, context, **_: ThreadPoolExecutor(1))
    wants = run.Settings(tmp_path, str(place / "base"), place / "data")
    with pytest.raises(ValueError, match="no average today"):
        jobs.at_the_same_time(wants, ["average", "MAny", "sequential"], 2)
    assert set(run.Bench(wants).records.all()) == {"MAny", "sequential"}


def test_processes_do_not_lose_each_others_records(tmp_path):
    path = tmp_path / "seed0" / "results.json"
    stages = [f"stage {i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda stage: Records(path).record(stage, lambda: stage.upper()), stages)] == [
            stage.upper() for stage in stages
        ]
    assert set(Records(path).all()) == set(stages)
    assert Records(path).record("stage 3", None) == "STAGE 3", "it is not made again"


def test_what_is_missing_to_build_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    refused = CliRunner().invoke(app, ["--output", str(tmp_path), "--only-prepare"])
    assert refused.exit_code == 2
    assert "pip install -e '.[real]'" in refused.output
    Records(tmp_path / run.PREPARED_NAME).record("pictures", dict)
    for stage in ("captions", "checkpoint", "alignment"):
        Records(tmp_path / run.PREPARED_NAME).record(stage, dict)
    assert CliRunner().invoke(app, ["--output", str(tmp_path), "--only-prepare"]).exit_code == 0


@pytest.mark.parametrize(
    ("given", "right", "expected"),
    [
        ("Fire Engine", "fire engine", 100),
        ("fire", "fire engine", 0),
        ("a fox below a hamburger", "a fox below a rocket", 200 / 3),
        ("The picture shows an owl.", "The picture shows a cat", 200 / 3),
        ("", "a fox below a rocket", 0),
    ],
)
def test_names_are_right_or_wrong_and_descriptions_share_words(given, right, expected):
    assert score([given], [right]) == pytest.approx(expected)
    assert score([given, right], [right, right]) == pytest.approx((expected + 100) / 2)


def test_prose_is_english_and_what_is_forgotten_is_seen():
    text = prose()
    assert 8_000 < len(text) < 80_000
    assert "handwritten digits" in text
    model, tokenizer = tiny.build("llava"), lambda text, return_tensors: {"input_ids": ids}
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = model(input_ids=ids, labels=ids).loss.exp(), perplexity_of(model, tokenizer, "")
    assert found == pytest.approx(float(expected), rel=1e-2)


def test_every_method_can_be_made(place, tmp_path):
    wants = run.Settings(tmp_path, str(place / "base"), place / "data", training=Schedule(2, 4, 1e-3), tests=2)
    bench = run.Bench(wants)
    bench.train()
    for method in METHODS.values():
        if method.name in COMPARED:
            continue
        answerer = method.make(bench)
        assert isinstance(answerer(bench.tasks()[0]), nn.Module), method.name
