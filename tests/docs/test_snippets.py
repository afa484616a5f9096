"""Every Python snippet of the README and the docs runs, and every command line there is one that parses.

The snippets of a page share one namespace and one folder, where tiny adapters lie under the names that the docs use.
Where sections stand for themselves, each finds these adapters as they were. `base` is the base model, freshly loaded
for each snippet.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText

from peft_many import MAnyConfig, collect_statistics, merge_adapter_files
from peft_many.commands import app
from peft_many.metrics import AccuracyMatrix
from tests.adapters import WEIGHTS, batches, scatter
from tests.docs.pages import PAGES, ROOT, commands, folders_written, imported, python_snippets, run, snippets
from tests.examples import toy
from tests.examples.scripts import EXAMPLES, script
from tests.hub.llava_files import checkpoint
from tests.hub_server import StandInHub, talk_to

# By folder, the task's name. All are on the Hub too, as me/…
MEASURED = {"clevr": "clevr", "iconqa": "iconqa", "vizwiz": "vizwiz", "new-task": "new", "charts": "charts"} | {
    folder: folder for folder in ("task1", "task2", "task3", "pool-49", "task-50")
}
LOCAL = ("clevr", "task1", "task2", "task3", "pool-49", "task-50", "merged", "old", "Task4_llava_lora")
OF_SECTIONS = {"how-to"}  # folders of pages whose sections stand for themselves
OPTIONAL = {"trl"}  # there is no version of it for Python 3.10


class Examples(Dataset):
    """A training set for `Trainer`, of rows that `collate` puts together."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        self.rows = [
            {name: tensor[i] for name, tensor in {**batch, "labels": labels}.items()} for i in range(len(labels))
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The base model, and adapters under the names that the docs use."""
    root = tmp_path_factory.mktemp("docs")
    toy.save_base(root / "base")
    for seed, (folder, task) in enumerate(MEASURED.items()):
        save_adapter(root, folder, seed, MAnyConfig(r=4, lora_alpha=8, task_name=task))
    attention = ["q_proj", "k_proj", "v_proj"]
    for seed, folder in enumerate(("plain-lora", "charts-lora", "icons-lora"), start=20):
        save_adapter(
            root, folder, seed, LoraConfig(r=4, target_modules=attention, modules_to_save=["multi_modal_projector"])
        )
    save_adapter(root, "loha", 30, LoHaConfig(r=2, target_modules=attention, init_weights=False))
    merge_adapter_files([root / name for name in ("clevr", "iconqa", "vizwiz")], root / "merged", progress=False)
    checkpoint(root / "Task4_llava_lora")
    shutil.copytree(root / "plain-lora", root / "old")
    weights = load_file(root / "old" / WEIGHTS)
    save_file({before_version_5(name): tensor for name, tensor in weights.items()}, root / "old" / WEIGHTS)
    return root


def before_version_5(name: str) -> str:
    """What transformers called a module of LLaVA before version 5."""
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    return name.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")


def lay_out(place: Path) -> None:
    """Put the adapters into the current folder, and nothing else."""
    for old in Path().iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for folder in LOCAL:
        shutil.copytree(place / folder, folder)
    Image.new("RGB", (16, 16), "red").save("x.png")
    row = {"image": "x.png", "question": "What colour is it ?", "answer": "red"}
    for task in ("clevr", "iconqa"):
        Path(f"{task}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)


def load_base(root: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(root / "base")


def last_token(ids: torch.Tensor) -> torch.Tensor:
    """Labels by which the last token is the answer."""
    return ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)


def save_adapter(root: Path, folder: str, seed: int, config: PeftConfig) -> None:
    torch.manual_seed(seed)
    base = load_base(root)
    model = get_peft_model(base, config)
    scatter(model, seed)
    if isinstance(config, MAnyConfig):
        answered = [{**batch, "labels": last_token(batch["input_ids"])} for batch in batches(base, "llava", seed)]
        collect_statistics(model, answered, keep_prompts=2, progress=False)
    model.save_pretrained(root / folder)


@pytest.fixture
def hub(place, tmp_path, monkeypatch):
    """The stand-in for the Hub with all adapters; the process may write to it."""
    with StandInHub() as server:
        talk_to(server, monkeypatch, tmp_path / "hub")
        monkeypatch.setenv("HF_TOKEN", server.token)
        for folder in (*MEASURED, "plain-lora", "charts-lora", "loha", "merged"):
            for branch in ("main", "v2"):
                server.add(f"me/{folder}", place / folder, branch=branch)
        server.add("you/icons-lora", place / "icons-lora")
        yield server


def conversations(picture: Image.Image) -> Any:
    """Rows as TRL wants them."""
    from datasets import Dataset

    asked, answered = [{"role": "user", "content": "What colour is it ?"}], [{"role": "assistant", "content": "red"}]
    return Dataset.from_list([{"images": [picture], "prompt": asked, "completion": answered}] * 4)


@pytest.fixture
def names(place, tmp_path, monkeypatch, hub) -> dict[str, object]:
    """What the snippets of a page find: adapters in the current folder, and these names."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    base = load_base(place)
    loader = [{**batch, "labels": batch["input_ids"]} for batch in batches(base, "llava", 1)]
    loaders = (
        "dataloader",
        "train_dataloader",
        "dataloader_of_its_task",
        "clevr_loader",
        "iconqa_loader",
        "own_answers",
    )
    picture = Image.new("RGB", (16, 16), "red")
    train_dataset = Examples(batches(base, "llava", 1, rows=8)[0])
    return {
        **dict.fromkeys(loaders, loader),
        "train_dataset": train_dataset,
        "collate": lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        "conversations": conversations(picture) if importlib.util.find_spec("trl") else None,
        "processor": toy.processor("llava"),
        "image": picture,
        "adapters": ["clevr", "me/iconqa"],
        "inputs": batches(base, "llava", 2)[0],
        **{f"seed_{n}": AccuracyMatrix([[90 + n], [80 - n, 70]], tasks=["one", "two"]) for n in (1, 2, 3)},
    }


@pytest.mark.parametrize(
    "page", [path for path in PAGES if python_snippets(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_snippets_run(page, names, place):
    found = python_snippets(page)
    for snippet, before in zip(found, [None, *found]):
        if before is None or (page.parent.name in OF_SECTIONS and snippet.section != before.section):
            lay_out(place)
        lacking = [name for name in imported(snippet) & OPTIONAL if importlib.util.find_spec(name) is None]
        if snippet.not_run is not None or lacking:
            continue
        for folder in folders_written(snippet):
            shutil.rmtree(folder, ignore_errors=True)
        names["base"], names["new_base"] = load_base(place), load_base(place)
        run(snippet, page, names)


# ------------------------------------------------------------------------------------------------------ command lines

COMMANDS = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)}")
    for path in PAGES
    for words in commands(path.read_text(encoding="utf-8"), "peft-many")
]


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Read a command line as the program would, without running it.

    Raises:
        Exception: It has an unknown command or option, lacks an argument, or has one too many.
    """
    context = command.context_class(command, info_name=command.name, parent=parent)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    if hasattr(command, "commands"):
        if rest:
            assert rest[0] in command.commands, f"There is no command '{rest[0]}'."
            parse(command.commands[rest[0]], rest[1:], context)
        return
    assert not rest, f"'{' '.join(rest)}' is one too many."
    missing = [param.name for param in command.params if param.required and not values.get(param.name)]
    assert not missing, f"'{missing[0]}' is missing."


@pytest.mark.parametrize("words", COMMANDS)
def test_command_lines_parse(words):
    parse(typer.main.get_command(app), words[1:])


@pytest.mark.parametrize("wrong", ["plan --quack", "inspect x much", "brew", "merge --seeds"])
def test_wrong_command_lines_do_not_parse(wrong):
    with pytest.raises(Exception, match=r"quack|much|brew|seeds"):
        parse(typer.main.get_command(app), wrong.split())


SCRIPTS = [
    pytest.param(name, words, id=" ".join(words))
    for name in ("train_with_trainer", "train_with_trl", "train_with_accelerate", "merge_from_hub")
    if name != "train_with_trl" or importlib.util.find_spec("trl") is not None
    for start in (("python",), ("accelerate", "launch"))
    for text in [(EXAMPLES / "README.md").read_text(encoding="utf-8")]
    for words in commands(text, *start, f"{name}.py")
]


@pytest.mark.parametrize(("name", "words"), SCRIPTS)
def test_command_lines_of_examples_parse(name, words):
    place = words.index(f"{name}.py")
    script(name).arguments_parser().parse_args(words[place + 1 :])


# ------------------------------------------------------------------------------------------------------ this harness


def test_pages_are_read_as_readers_read_them():
    page = (
        "Call `peft-many plan | merge …` or `peft-many inspect MERGE`.\n\n"
        "```python\na = 1\n```\n\n<!-- not run: it would take a week -->\n```python\nb = 2\n```\n\n"
        "```bash\npeft-many merge a b \\\n  --output c  # here\npeft-many-else\nls | wc\n```\n"
    )
    one, two, _ = snippets(page)
    assert (one.code, one.line, one.not_run) == ("a = 1\n", 4, None)
    assert (two.code, two.line, two.not_run) == ("b = 2\n", 9, "it would take a week")
    assert list(commands(page, "peft-many")) == [
        ["peft-many", "merge", "a", "b", "--output", "c"],
    ]


def test_a_snippet_that_fails_shows_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nraise KeyError('here')\n```\n")
    (snippet,) = python_snippets(page)
    with pytest.raises(KeyError, match="here") as caught:
        run(snippet, page, {})
    assert (caught.traceback[-1].lineno, str(caught.traceback[-1].path)) == (4, str(page))  # counted from zero


def test_folders_that_a_snippet_writes_are_known():
    (snippet,) = snippets('```python\nmerge_adapter_files(["a", "b"], "c", rank=2)\nx.save_pretrained("d")\n```\n')
    assert folders_written(snippet) == ["c"]


def test_adapters_of_the_docs_are_what_they_are_called(place):
    assert PeftConfig.from_pretrained(place / "merged").merge.names == ["clevr", "iconqa", "vizwiz"]
