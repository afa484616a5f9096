"""The projectors in an adapter's file: those that a task trained, and a merge's experts or means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..families.family import is_registered_projector
from ..families.structure import modules_around
from ..records import MergeRecord
from .errors import UnmergeableAdapterError
from .fingerprints import same_weights, state_fingerprint
from .statistics import TaskStatistics
from .stored_delta import trained_further
from .tensor_keys import SHARDED

# The last path component of a projector, by the names that transformers' families use: there is no model to look at.
PROJECTOR_NAME = re.compile(
    r"multi_modal_projector|mm_projector|projector|connector|merger|deepstack_merger_list|aligner|"
    r"language_projection|vision_projection"
)


def projector_of(adapter: str, config: PeftConfig, key: str, known: Sequence[str]) -> str:
    """The projector that a tensor of a module that was trained whole belongs to; other modules cannot be merged."""
    projector = next((name for name in known if key.startswith(f"{name}.")), None)
    if projector is None:
        raise UnmergeableAdapterError(
            f"{adapter}: tensor '{key}' belongs to a module that is trained whole and is no projector; such modules "
            "cannot be merged."
            + ("" if known else " (If it is one, name it: `MAnyConfig(projector_modules=[…])`, or measure on images.)")
        )
    if not is_saved_whole(projector, config):
        raise UnmergeableAdapterError(
            f"{adapter}: tensor '{key}' is a part of the projector '{projector}'; only projectors that are trained "
            f"whole can be merged (`modules_to_save=['{projector.rpartition('.')[2]}']`)."
        )
    return projector


def projectors_of_adapter(
    adapter: str, config: PeftConfig, measured: TaskStatistics, rest: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The state dict of each projector that a task trained, out of `rest`, the tensors of modules saved whole.

    Other modules that were trained whole are refused, and so are projectors that were trained in part or are missing.
    Copies that are still the base model's, as training on text leaves them, are no projectors of the task's own.
    """
    # A plain LoRA adapter does not say which of its modules is a projector; measuring it found out.
    known = getattr(config, "projector_modules", None) or [*measured.projectors, *measured.unmoved_projectors]
    if not known and not measured.is_measured:
        known = _named_like_projectors(rest)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in rest.items():
        projector = projector_of(adapter, config, key, known)
        found.setdefault(projector, {})[key.removeprefix(f"{projector}.")] = tensor
    lost = next((name for name in known if name not in found and is_saved_whole(name, config)), None)
    if lost is not None:
        raise UnmergeableAdapterError(
            f"{adapter} trained the projector '{lost}', but its {SAFETENSORS_WEIGHTS_NAME} has no tensor of it: "
            "the file is incomplete; save or download the adapter again."
        )
    for projector, state in found.items():
        _check_shapes(adapter, projector, state, measured)
    for projector, fingerprint in measured.unmoved_projectors.items():
        if not same_weights(fingerprint, state_fingerprint(found.pop(projector, {}))):
            raise trained_further(adapter, projector)
    return found


def _check_shapes(adapter: str, projector: str, state: Mapping[str, Tensor], measured: TaskStatistics) -> None:
    """Refuse what is not the projector that was measured: others may be damaged alike, and only loading would tell."""
    found, seen = shapes_of(state), measured.projectors.get(projector)
    _check_not_flat(adapter, projector, found, None if seen is None else len(seen.prototype))
    expected = measured.projector_shapes.get(projector, found)
    for key in dict.fromkeys([*expected, *found]):
        now, then = (f"of shape {shapes[key]}" if key in shapes else "missing" for shapes in (found, expected))
        if now != then:
            raise UnmergeableAdapterError(
                f"{adapter}: tensor '{projector}.{key}' of the projector is {now}, but was {then} when it was "
                "measured: the file is damaged or incomplete; save or download the adapter again."
            )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a state dict's tensors."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _check_not_flat(adapter: str, projector: str, shapes: Mapping[str, tuple[int, ...]], width: int | None) -> None:
    """Refuse flattened weights: other adapters' may be flat too, and only loading the merge would tell.

    Norms have vectors as well, as long as their biases are, and without biases as long as the features are wide.
    """
    all_flat = width is not None and all(len(shape) < 2 for shape in shapes.values())
    for key, shape in shapes.items():
        if len(shape) > 1 or not f".{key}".endswith(".weight"):
            continue
        bias = shapes.get(f"{key.removesuffix('weight')}bias")
        fits = bias == shape != () if bias is not None else not all_flat or shape == (width,)
        if not fits:
            raise UnmergeableAdapterError(
                f"{adapter}: tensor '{projector}.{key}' of the projector has the impossible shape {shape}: {SHARDED}."
            )


def projectors_in_merge(
    adapter: str, merge: MergeRecord, measured: TaskStatistics, task: str, rest: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The state dict of each projector that stands for a task in a merge: its own expert, or the mean it is in."""
    found: dict[str, dict[str, Tensor]] = {}
    for projector, routed in merge.routing.items():
        if task not in routed.names:
            continue
        seen = measured.projectors.get(projector)
        if seen is None or len(seen.prototype) != routed.width:
            raise UnmergeableAdapterError(
                f"{adapter}, task '{task}': its statistics lack its prototype at '{projector}': they are damaged, "
                "or another merge's; save or download the merge again."
            )
        place = routed.names.index(task)
        if routed.tasks[place].trained:  # else the base model's projector serves the task
            found[projector] = tensors_inside(rest, f"{projector}.experts.task_{place}.")
    for projector, averaged in merge.averaged_projectors.items():
        if task in averaged:
            found[projector] = tensors_inside(rest, f"{projector}.")
    where = f"{adapter}, task '{task}'"
    for projector, state in found.items():
        if not state:
            raise UnmergeableAdapterError(
                f"{where} lacks the tensors of its projector '{projector}': the file is incomplete; save or download "
                "it again."
            )
        _check_shapes(where, projector, state, measured)
    return found


def tensors_inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one module, by the rest of their names."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _named_like_projectors(rest: Iterable[str]) -> list[str]:
    """The modules of these tensors that are called as projectors of known families are."""
    parents = dict.fromkeys(path for key in rest for path in reversed(modules_around(key)))
    found: list[str] = []
    for path in parents:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        named = PROJECTOR_NAME.fullmatch(path.rpartition(".")[2]) or is_registered_projector(path)
        if named and not inside:
            found.append(path)
    return found


def is_saved_whole(module: str, config: PeftConfig) -> bool:
    """Whether `modules_to_save` names the module or one around it; PEFT compares the ends of paths."""
    paths = [module, *modules_around(module)]
    return any(path.endswith(name) for path in paths for name in getattr(config, "modules_to_save", None) or [])
