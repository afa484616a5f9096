"""Write what the command line says of itself, which the tests compare.

That is the options of merging, from the fields of `MergeOptions`, and the reference part of docs/command-line.md, from
the commands' own help.

python scripts/document_commands.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path

import typer

from peft_many import MergeOptions

ROOT = Path(__file__).parents[1]
OPTIONS = ROOT / "peft_many" / "commands" / "merge_options.json"
PAGE = ROOT / "docs" / "command-line.md"
WIDTH = 86  # of code on a page; see tests/docs/test_rendered.py
BEGIN = "<!-- made by scripts/document_commands.py -->"


def listed() -> str:
    """The options of merging as the command line reads them: help, type and choices of each."""
    defaults = MergeOptions().filled_in([]).describe()
    found = {}
    for option in dataclasses.fields(MergeOptions):
        help, choices = option.metadata["help"], option.metadata["choices"]
        default = option.metadata["by_default"] or defaults.get(option.name)
        help += f" One of {', '.join(choices)}." if choices else ""
        help += f" [dim]default: {default}[/dim]" if default else ""
        kind = next((kind for kind in ("bool", "float", "int") if re.match(rf"{kind}\b", str(option.type))), "str")
        found[option.name] = {"help": help, "kind": kind, "choices": choices}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def documented() -> str:
    """The page as it should be: what is written by hand, and every command below it."""
    from peft_many.commands import app  # which reads the options that are listed

    by_hand = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    group = typer.main.get_command(app)
    return by_hand + BEGIN + "\n" + "".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command) -> str:
    text, _, examples = inspect.cleandoc(command.help).partition("[bold]Examples[/bold]")
    about = "\n\n".join(textwrap.fill(_plain(part), 119) for part in text.strip().split("\n\n"))
    lines = [re.sub(r" *\[dim\](.*?)\[/dim\]", r"  \1", line) for line in examples.splitlines() if line]
    lines = [part for line in lines for part in _broken(line)]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    usage = " ".join(_shown(argument) for argument in arguments)
    rows = [(f"`{_shown(argument)}`", _help(argument)) for argument in arguments]
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            names = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
            names += f" `{option.metavar}`" if option.metavar else ""
            rows.append((names, _help(option)))
    table = "\n".join(f"| {names} | {text} |" for names, text in rows)
    shown = "\n".join(lines)
    return (
        f"\n## peft-many {name}\n\n`peft-many {name} {usage}`\n\n{about}\n\n```bash\n{shown}\n```\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _broken(line: str) -> list[str]:
    """A command in lines that the page shows whole, broken before its options."""
    lines = [line]
    while len(lines[-1]) > WIDTH and (end := lines[-1].rfind(" --", 5, WIDTH - 2)) > 0:
        lines[-1:] = [f"{lines[-1][:end]} \\", f"    {lines[-1][end + 1 :]}"]
    return lines


def _shown(argument) -> str:
    name = (argument.metavar or argument.name).upper()
    several = f"{name}..." if argument.nargs == -1 else name
    return several if argument.required else f"[{several}]"


def _help(parameter) -> str:
    text = _plain(parameter.help or "").rstrip()
    if parameter.param_type_name == "option" and parameter.required:
        return f"{text} Required."
    default = parameter.default
    if isinstance(default, (str, int, float, Path)) and not isinstance(default, bool):
        text += f" default: {default}"
    return text.replace("|", r"\|")


def _plain(text: str) -> str:
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"**\1**", text)
    return re.sub(r"\[dim\](.*?)\[/dim\]", r"\1", text)


if __name__ == "__main__":
    OPTIONS.write_text(listed(), encoding="utf-8")
    PAGE.write_text(documented(), encoding="utf-8")
