"""The example scripts at toy size, for real: two ways of training, and merging what is on the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.mini_ucit.model import MODELS, Collator
from benchmarks.mini_ucit.tasks import TASKS
from peft_many import merge_adapter_files
from tests import new_process
from tests.adapters import WEIGHTS, files
from tests.examples.scripts import EXAMPLES, script, training_arguments, write_toy
from tests.hub_server import StandInHub, talk_to

# On machines without a GPU too: it means torch's launcher, and the scripts ask for CPUs. `--cpu` would need MPI.
LAUNCH = (
    "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
)
NAMES = ("charts", "scenes", "icons")


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def adapters(toy, tmp_path_factory) -> dict[str, Path]:
    """One adapter for each task, trained by the Trainer script."""
    folder, train = tmp_path_factory.mktemp("adapters"), script("train_with_trainer")
    for task in NAMES:
        trainer = train.main(training_arguments(toy, task, folder / task))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.5 * losses[0], losses
    return {task: folder / task for task in NAMES}


def test_questions_to_evaluate_on_are_about_other_pictures(toy):
    seen, held_out = ({path.read_bytes() for path in (toy / name).glob("*.png")} for name in ("icons", "icons-test"))
    assert len(held_out) > 40
    assert not seen & held_out
    assert len((toy / "icons-test.jsonl").read_text().splitlines()) == 48


def test_the_toy_is_made_from_within_its_folder():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "toy_data.py", "--help"], cwd=EXAMPLES, env=environment, check=True, timeout=300)


def test_batches_are_those_the_model_was_pre_trained_on(toy):
    data = script("question_data")
    rows = data.Questions(toy / "icons.jsonl")
    found = data.Collator(AutoProcessor.from_pretrained(toy / "model"))([rows[i] for i in range(8)])
    task = next(task for task in TASKS if task.name == "icons")
    expected = Collator(MODELS["llava"])(task.examples(8, "train", 0))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_the_trainer_script_leaves_measured_adapters(adapters):
    for task, folder in adapters.items():
        statistics = PeftConfig.from_pretrained(folder).statistics.tasks[0]
        assert (statistics.name, statistics.samples, statistics.images) == (task, 64, 64)


@pytest.mark.slow
def test_the_accelerate_script_in_two_processes(toy, adapters, tmp_path):
    run_in_two_processes(
        "train_with_accelerate.py", *training_arguments(toy, "scenes", tmp_path / "scenes"), progress="3/3"
    )
    statistics = PeftConfig.from_pretrained(tmp_path / "scenes").statistics.tasks[0]
    assert (statistics.name, statistics.samples) == ("scenes", 64)
    before, trained = load_file(adapters["charts"] / WEIGHTS), load_file(tmp_path / "scenes" / WEIGHTS)
    assert trained.keys() == before.keys()
    assert all(trained[key].abs().max() > 0 for key in trained)
    merge_adapter_files([adapters["charts"], tmp_path / "scenes"], tmp_path / "merged", progress=False)


def run_in_two_processes(name: str, *arguments: str, progress: str) -> None:
    """By `accelerate launch`; the progress bar must have come to `progress`, half of what one process would do."""
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [*LAUNCH.split(), EXAMPLES / name, *arguments]
    done = new_process.run(Path(launch.__file__), *words, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert progress in done.stderr, done.stderr[-4000:]


def test_three_adapters_from_the_hub(toy, adapters, tmp_path, monkeypatch, capsys):
    with StandInHub() as server:
        talk_to(server, monkeypatch, tmp_path)
        for task, folder in adapters.items():
            server.add(f"me/{task}", folder, branch="v2" if task == "scenes" else "main")
        monkeypatch.chdir(tmp_path)
        picture = toy / "charts" / "1.png"
        asked = ["--image", str(picture), "--question", "which bar is highest ?"]
        entries = ["me/charts", "me/scenes@v2", "me/icons"]
        script("merge_from_hub").main([*entries, "--model", str(toy / "model"), "--output", "merged", *asked])
        merge_adapter_files(entries, "alone", progress=False)
    said, answer = capsys.readouterr().out.splitlines()[-2:]
    assert sorted(said.removeprefix("Merged: ").split(", ")) == sorted(NAMES)
    assert files(tmp_path / "merged").keys() == files(tmp_path / "alone").keys()
    assert load_file("merged/" + WEIGHTS).keys() == load_file("alone/" + WEIGHTS).keys()

    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(toy / "model"), "merged")
    processor = AutoProcessor.from_pretrained(toy / "model")
    prompt = script("question_data").prompt(processor, "which bar is highest ?")
    inputs = processor(images=[Image.open(picture)], text=[prompt], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(generated, skip_special_tokens=True)
    words = answer.split()
    assert (words[0], words[-1]) == ("the", "bar"), "the task's way of answering, which the base model does not have"


@pytest.mark.parametrize("name", ["toy_data", "train_with_trainer", "train_with_accelerate", "merge_from_hub"])
def test_scripts_explain_themselves_and_are_short(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        script(name).main(["--help"])
    assert stopped.value.code == 0
    assert f"{name}.py" in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100
