"""What a family is put through: attach, train, measure, merge, route, generate, save, and load in a new process."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_many import MAnyConfig, collect_statistics, merge_adapter_sequence
from peft_many.families.image_layouts import image_rows_of
from peft_many.routing.calls import projector_call
from peft_many.tuner.projector import ProjectorMixture, ProjectorWrapper
from tests.files.making import perturb

from .inputs import Inputs
from .models import build
from .pixels import KINDS, Arguments, Picture, picture
from .rows import row_of
from .video import takes_videos, video_inputs

STYLES = (1, 6)  # of the two tasks: complementary colours
TEMPERATURE = 0.5  # at which both tasks have a say in each image
TOLERANCE = 2e-4
NEW_TOKENS = 3
EXPECTED = "expected.safetensors"


class Unmet(Exception):  # noqa: N818 - a finding, not a fault
    """What was checked does not hold; the message says what."""


@dataclass
class Finding:
    """What the checks found out about one family.

    Args:
        family (`str`): The `model_type`.
        projectors (`list[str]`): Their paths.
        layout (`str`): What arrives at the first projector, and how it is shared out among the images.
        routed (`bool`): A joint batch of images of different tasks gives the same as one row at a time.
        generated (`bool`): Likewise `generate`.
        reloaded (`bool`): The saved merge gives the same in a new process.
        video (`str`): `"yes"` if videos are routed exactly too, `""` if the family has none, or why not.
        note (`str`): What is missing, and why.
    """

    family: str
    projectors: list[str] = field(default_factory=list)
    layout: str = ""
    routed: bool = False
    generated: bool = False
    reloaded: bool = False
    video: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(family: str, folder: Path, load: Callable[[str, Path], str]) -> Finding:
    """Put a family through everything.

    Args:
        family (`str`): The `model_type`.
        folder (`Path`): Takes its adapters.
        load (`Callable`): `tests.families.reload.what_is_wrong`, in a new process.
    """
    finding = Finding(family)
    row = row_of(family)
    if row.unfit is not None:
        finding.note = row.unfit
        if row.text_only:
            require_text_only(family)
            finding.note += "; `projector_modules=[]` adapts its language model alone"
        return finding
    try:
        _check(finding, folder, load)
    except Unmet as unmet:
        finding.note = str(unmet)
    except Exception as error:  # the table says of each family what stands in the way
        last = traceback.extract_tb(error.__traceback__)[-1]
        finding.note = (
            f"{type(error).__name__} in {Path(last.filename).name}: {str(error).partition(chr(10))[0][:160]}"
        )
    return finding


def require_text_only(family: str) -> None:
    """A family without a projector is refused by default; the argument that the message names adapts the rest."""
    try:
        get_peft_model(build(family), MAnyConfig())
    except ValueError as error:
        if "projector_modules=[]" not in str(error):
            raise
    else:
        raise Unmet("by now a projector is found")
    get_peft_model(build(family), MAnyConfig(projector_modules=[]))


def _check(finding: Finding, folder: Path, load: Callable[[str, Path], str]) -> None:
    family, row = finding.family, row_of(finding.family)
    base = build(family)
    inputs = Inputs(base, row)
    rows = joint_rows(inputs.kind, row.images_per_row)
    batch = inputs(rows)
    require_same(logits(base, batch), one_by_one(base, inputs, rows, batch), "the base model is not")
    for task, style in enumerate(STYLES):
        make_task(family, task, style, folder / f"task-{task}")
    merged = merge_adapter_sequence(
        base, [folder / "task-0", folder / "task-1"], temperature=TEMPERATURE, progress=False
    )
    finding.projectors = merged.peft_config["default"].projector_modules
    if not finding.projectors:
        raise Unmet("no projector was found")
    decisions, joint = routed_call(merged, batch)
    finding.layout = decisions.layout
    require_decisions(
        decisions.tasks, [style for row_styles in joint_styles(row.images_per_row) for style in row_styles]
    )
    require_same(joint, one_by_one(merged, inputs, rows, batch), "routed, it is not")
    finding.routed = True
    require_generation(merged, inputs, rows, batch)
    finding.generated = True
    finding.video = check_videos(merged, family)
    merged.save_pretrained(str(folder / "merged"))
    save_file({"logits": joint}, folder / "merged" / EXPECTED)
    wrong = load(family, folder / "merged")
    if wrong:
        raise Unmet(wrong)
    finding.reloaded = True
    finding.note = row.note


def joint_inputs(base: PreTrainedModel, family: str) -> Arguments:
    """The joint batch of a family."""
    row = row_of(family)
    inputs = Inputs(base, row)
    return inputs(joint_rows(inputs.kind, row.images_per_row))


def joint_styles(images_per_row: str) -> list[list[int]]:
    """The pictures of each row: of one task, of both, none, of the other; where a row has to have one, one each."""
    first, second = STYLES
    return (
        [[first], [second], [first], [second]] if images_per_row == "one" else [[first], [second, first], [], [second]]
    )


def joint_rows(kind: str, images_per_row: str) -> list[list[Picture]]:
    sizes, number, rows = KINDS[kind][1], 0, []
    for styles in joint_styles(images_per_row):
        rows.append([picture(style, 10 + i, sizes[(number + i) % len(sizes)]) for i, style in enumerate(styles)])
        number += len(styles)
    return rows


def logits(model: nn.Module, batch: Arguments) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**batch).logits
    return output


def one_by_one(model: nn.Module, inputs: Inputs, rows: list[list[Picture]], batch: Arguments) -> Tensor:
    length = batch["input_ids"].shape[1]
    return torch.cat([logits(model, inputs([row], length)) for row in rows])


def require_same(joint: Tensor, alone: Tensor, what: str) -> None:
    difference = (joint - alone).abs().amax().item()
    if not difference <= TOLERANCE * max(1.0, alone.abs().amax().item()):
        raise Unmet(f"{what} the same jointly as one row at a time (they differ by {difference:.1e})")


def make_task(family: str, task: int, style: int, folder: Path) -> None:
    """Train a step, move the weights on so that tasks differ, measure on images of one style, and save."""
    base, row = build(family), row_of(family)
    inputs = Inputs(base, row)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task)
        model = get_peft_model(base, MAnyConfig(task_name=f"task-{task}"))
    batches = list(task_batches(inputs, style, row.images_per_row))
    train_a_step(model, batches[0])
    perturb(model, "default", seed=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts that no token was sent to
        collect_statistics(model, batches, progress=False)
    model.save_pretrained(str(folder))


def task_batches(inputs: Inputs, style: int, images_per_row: str) -> Iterator[Arguments]:
    sizes = KINDS[inputs.kind][1]
    for number in range(2):
        first, second, third = (picture(style, 3 * number + i, sizes[i % len(sizes)]) for i in range(3))
        yield inputs([[first], [second]] if images_per_row == "one" else [[first], [second, third], []])


def train_a_step(model: nn.Module, batch: Arguments) -> None:
    """A step of training; every projector and the language model have to move."""
    parts = [module for module in model.modules() if isinstance(module, (ProjectorWrapper, LoraLayer))]
    if not any(isinstance(part, ProjectorWrapper) for part in parts):
        raise Unmet("no projector was found")
    trained = [[parameter for parameter in part.parameters() if parameter.requires_grad] for part in parts]
    before = [[parameter.detach().clone() for parameter in some] for some in trained]
    optimizer = torch.optim.AdamW([parameter for some in trained for parameter in some], lr=1e-3, weight_decay=0.0)
    logits_of(model, batch).square().mean().backward()
    optimizer.step()
    moved = [
        any(not torch.equal(old, new) for old, new in zip(olds, news, strict=True))
        for olds, news in zip(before, trained, strict=True)
    ]
    still = [part for part, has_moved in zip(parts, moved, strict=True) if not has_moved]
    if len(still) == len(parts) or any(isinstance(part, ProjectorWrapper) for part in still):
        raise Unmet(f"a training step leaves {len(still)} of {len(parts)} adapted modules as they are")


def logits_of(model: nn.Module, batch: Arguments) -> Tensor:
    output: Tensor = model(**batch).logits
    return output


@dataclass
class Decisions:
    """What the router decided in one call.

    Args:
        tasks (`list[list[int]]`): Of each projector, the task that each image resembles most.
        layout (`str`): What arrived at the first projector.
    """

    tasks: list[list[int]]
    layout: str


def routed_call(merged: PeftModel, batch: Arguments) -> tuple[Decisions, Tensor]:
    """The logits of a call, and what the router decided meanwhile."""
    mixtures = [module for module in merged.modules() if isinstance(module, ProjectorMixture)]
    wrappers = [module for module in merged.modules() if isinstance(module, ProjectorWrapper)]
    seen: list[list[int]] = [[] for _ in mixtures]
    shapes: list[str] = []
    for mixture, found in zip(mixtures, seen, strict=True):
        mixture.task_weights = _noting(mixture, found)  # type: ignore[method-assign]
    handle = wrappers[0].register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(_layout_seen(module, args, kwargs)), with_kwargs=True
    )
    try:
        output = logits(merged, batch)
    finally:
        handle.remove()
        for mixture in mixtures:
            del mixture.task_weights
    return Decisions(seen, max(shapes, key=len, default="")), output


def _noting(mixture: ProjectorMixture, found: list[int]) -> Any:
    def task_weights(pooled: Tensor) -> Tensor:
        weights = type(mixture).task_weights(mixture, pooled)
        found.extend(weights.argmax(-1).tolist())
        return weights

    return task_weights


def _layout_seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What arrives at a projector, in words."""
    call = projector_call(module, args, kwargs)
    if not call.vision_features.is_floating_point():
        return ""
    layout = image_rows_of(replace(call, features=call.vision_features, arguments={}))
    if layout.flat:
        return "flat patches" if len(layout.lengths) > 1 else "flat patches, a call for each image"
    kind = "maps of a convolution" if layout.channels_first else "patches"
    if call.tower_features is not None:
        kind = "the vision tower's patches"
    if layout.leading > 1:
        return f"padded {kind}"
    if len(layout.lengths) == 1:
        return f"{kind}, a call for each image"
    return kind if layout.lengths.max() == 1 else f"tiles of {kind}"


def require_decisions(tasks: list[list[int]], styles: list[int]) -> None:
    """Every image gets one decision at each projector, for the task that it is of."""
    wanted = [STYLES.index(style) for style in styles]
    for found in tasks:
        if found != wanted:
            raise Unmet(f"{len(wanted)} images of tasks {wanted} were routed to {found}")


def check_videos(merged: PeftModel, family: str) -> str:
    """Whether each video gets one decision and the same jointly as alone: `"yes"`, `""` if there are none, or why."""
    base, row = merged.get_base_model(), row_of(family)
    if row.inputs == "instructed_video":
        return "yes"  # all of its inputs are videos
    if not takes_videos(base):
        return ""
    if row.video_unfit is not None:
        try:
            logits(build(family), video_inputs(base, list(STYLES), row))
        except (RuntimeError, TypeError):
            return f"no: {row.video_unfit}"
        raise Unmet(f"videos run by now, of which was said: {row.video_unfit}")
    decisions, joint = routed_call(merged, video_inputs(base, list(STYLES), row))
    if any(len(found) != len(STYLES) for found in decisions.tasks):
        raise Unmet(f"{len(STYLES)} videos got the decisions {decisions.tasks}")
    alone = [logits(merged, video_inputs(base, [style], row)) for style in STYLES]
    require_same(joint, torch.cat(alone), "with videos, routed, it is not")
    return "yes"


def require_generation(merged: PeftModel, inputs: Inputs, rows: list[list[Picture]], batch: Arguments) -> None:
    length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        joint = merged.generate(**batch, **options)
        alone = torch.cat([merged.generate(**inputs([row], length), **options) for row in rows])
    if not torch.equal(joint, alone):
        raise Unmet("`generate` does not give the same jointly as one row at a time")
