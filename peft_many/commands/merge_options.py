"""The options of the command line for the fields of `MergeOptions`, which takes torch to import."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Option:
    help: str
    kind: type = str
    choices: Sequence[str] = ()
    default: str | None = None


_METHODS = (
    "lpm",
    "average",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "regmean",
    "knots",
    "core_space",
    "robust_merge",
)
_INPUTS = ("images", "instructions", "both")
OPTIONS = {
    "method": _Option("How to merge the LoRA deltas.", choices=_METHODS, default="lpm"),
    "projectors": _Option(
        "Route each image to the tasks' projectors, or average the projectors' weights.",
        choices=("routed", "mean"),
        default="routed",
    ),
    "ridge": _Option("The ridge λ of the method lpm.", float, default="1e-4"),
    "router": _Option(
        "How an image is compared with the tasks' images.", choices=("cosine", "gaussian"), default="cosine"
    ),
    "temperature": _Option("The temperature τ of the router's softmax.", float, default="0.02, gaussian: 1"),
    "top_k": _Option("The most projectors that an image is sent through.", int, default="no limit"),
    "rank": _Option("The largest rank of a merged layer.", int, default="the sum of the tasks' ranks"),
    "gate_lora": _Option("Let each input choose among the tasks' LoRAs, not only their projectors.", bool),
    "gate_by": _Option("What --gate-lora chooses by.", choices=_INPUTS, default="images"),
    "route_by": _Option("What chooses among the projectors.", choices=_INPUTS, default="images"),
    "abstain_above": _Option(
        "Use the base model's own weights for inputs that are further than this from every task; 3 loses hardly any "
        "of the tasks' own.",
        float,
        default="never",
    ),
    "dtype": _Option(
        "The dtype of the merged LoRA weights.", choices=("float32", "bfloat16", "float16"), default="float32"
    ),
}


def with_merge_options(command: Command) -> Command:
    """Give a command with `**options` an option for each field of `MergeOptions`, before its `--device`."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    place = [one.name for one in own].index("device")
    options = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_typed(name, option))
        for name, option in OPTIONS.items()
    ]
    parameters = [*own[:place], *options, *own[place:]]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _typed(name: str, option: _Option) -> Any:
    """The type of a command's argument, as typer reads it."""
    help = option.help + (f" One of {', '.join(option.choices)}." if option.choices else "")
    if option.default:
        help += f" [dim]default: {option.default}[/dim]"
    names = [f"--{name}/--no-{name}".replace("_", "-")] if option.kind is bool else []

    def completions(incomplete: str) -> list[str]:
        return [one for one in option.choices if one.startswith(incomplete)]

    return Annotated[
        option.kind | None, typer.Option(*names, help=help, autocompletion=completions, show_default=False)
    ]
