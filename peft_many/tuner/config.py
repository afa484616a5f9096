"""`MAnyConfig`: a `LoraConfig` that also trains the projector and carries what merging needs."""

from __future__ import annotations

import enum
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..files.card import update_card
from ..files.statistics import DEFAULT_ENERGY

DEFAULT_TEMPERATURE = 0.02
ROUTERS = {"cosine": DEFAULT_TEMPERATURE, "gaussian": 1.0}  # with their default temperatures


class Statistics(Protocol):
    """What a config carries beside its fields: an adapter's statistics, or where on the Hub they are."""

    def save(self, folder: str | os.PathLike[str], energy: float = ...) -> None:
        """Write them into a folder."""


class MAnyPeftType(str, enum.Enum):
    """The PEFT type of this plugin. PEFT's own enum cannot be extended from outside; lookups go by the string."""

    MANY = "MANY"


@dataclass
class MAnyConfig(LoraConfig):
    """Configuration of a MAny adapter (arXiv 2604.14016): LoRA on the language model, a copy of the projector.

    Everything of [`~peft.LoraConfig`] works as there. Where `target_modules` is not given, all linear layers of the
    language model are adapted, never the vision tower, the projector or the output head; on a model without images,
    those that [`~peft.LoraConfig`] would adapt, or all linear layers where it has no default.

    Args:
        task_name (`str`, *optional*):
            What to call the task in merges. Defaults to the name of the folder or Hub repository at merging.
        projector_modules (`list[str]`, *optional*):
            Names of the multimodal projector's modules, matched at their end like `modules_to_save`. Found by itself
            if not given; an empty list trains no projector.
        energy (`float`, defaults to `0.9999`):
            Share of each covariance's energy that is kept when statistics are saved, in (0, 1]; the rest is kept as an
            isotropic remainder (MAny*). `1.0` keeps them whole.
        ridge (`float`, *optional*):
            In a merge, the `λ` it was made with. Written by merging.
        temperature (`float`, defaults to `0.02`):
            In a merge, the `τ` of the projector routing. Written by merging.
        router (`str`, defaults to `"cosine"`):
            In a merge, how images are compared with the tasks' prototypes, `"cosine"` or `"gaussian"`. Written by
            merging.
        abstain_above (`float`, *optional*):
            In a merge with a Gaussian router, the distance from every task's prototype above which an image is left
            to the base model's projector. Written by merging.
        top_k (`int`, *optional*):
            In a merge, how many tasks' projectors each image is routed to, those of the largest weights; `None` mixes
            all whose weight is not negligible. Written by merging.
        gate_lora (`bool`, defaults to `False`):
            In a merge, whether the routing weights of a row's images also choose among the tasks' own LoRA deltas.
            Written by merging.
        task_ranks (`list[int]`, *optional*):
            In a merge with `gate_lora`, the rank of each task's block in a layer. Written by merging.
        task_rank_pattern (`dict[str, list[int]]`, *optional*):
            The layers where it is another, as in `rank_pattern`. Written by merging.
        tasks (`list[dict]`, *optional*):
            In a merge, the tasks it was made of: name, weight, source, revision, hash and options of the adapter, how
            many samples and images it was measured on, the data sets that its model card names, and what merging
            costs it ([`MergeReport`]'s `interference`). Written by merging.
        operations (`list[dict]`, *optional*):
            In a merge or pool, what was done to make it, in its order: each operation's tasks and options. Tasks that
            were forgotten are counted, not named. Written by merging.
        routing (`dict[str, dict]`, *optional*):
            In a merge, for each projector the routed tasks and the width of its prototypes. Written by merging.
        averaged_projectors (`dict[str, list[str]]`, *optional*):
            In a merge with `projectors="mean"`, for each projector the tasks whose weights were averaged. Written by
            merging.
        pooled (`list[dict]`, *optional*):
            In an adapter that was pooled from several, these tasks: name, weight, source, revision and hash. Written
            by pooling.
        method (`dict`, *optional*):
            In a merge by another method than LPM, its name, source and options. Written by merging.
        format_version (`int`): Version of the layout of adapter folders.
        statistics ([`AdapterStatistics`], *optional*):
            Covariances and prototypes, or where on the Hub they are. No part of `adapter_config.json`; they travel in
            a file of their own.
    """

    task_name: str | None = field(default=None, metadata={"help": "What to call the task in merges."})
    projector_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the projector's modules. Found by itself if not given; [] trains no projector."},
    )
    energy: float = field(
        default=DEFAULT_ENERGY, metadata={"help": "Share of each covariance's energy that is kept when saving."}
    )
    ridge: float | None = field(default=None, metadata={"help": "The ridge of a merge. Written by merging."})
    temperature: float = field(
        default=DEFAULT_TEMPERATURE, metadata={"help": "Temperature of the projector routing of a merge."}
    )
    router: str = field(
        default="cosine", metadata={"help": "How a merge compares images with prototypes. Written by merging."}
    )
    abstain_above: float | None = field(
        default=None,
        metadata={"help": "From which distance on a merge leaves images to the base projector. Written by merging."},
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "How many tasks' projectors a merge routes each image to; all if not given. Written by merging."
        },
    )
    gate_lora: bool = field(
        default=False,
        metadata={"help": "Whether a merge's LoRA is chosen by the images of each row too. Written by merging."},
    )
    task_ranks: list[int] | None = field(
        default=None, metadata={"help": "The rank of each task's block in a gated merge. Written by merging."}
    )
    task_rank_pattern: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "The layers where `task_ranks` are others. Written by merging."}
    )
    tasks: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "The tasks a merge was made of. Written by merging."}
    )
    operations: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "What was done to make a merge. Written by merging."}
    )
    routing: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "The routed projectors of a merge. Written by merging."}
    )
    averaged_projectors: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "The averaged projectors of a merge. Written by merging."}
    )
    pooled: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "The tasks that a task adapter was pooled from. Written by pooling."}
    )
    method: dict[str, Any] | None = field(
        default=None, metadata={"help": "The method of a merge, if it is not LPM. Written by merging."}
    )
    format_version: int = field(default=1, metadata={"help": "Version of the layout of adapter folders."})
    # A field, so that `dataclasses.replace` keeps it; no part of the configuration's value or of its JSON.
    statistics: Statistics | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MAnyPeftType.MANY
        if not 0.0 < self.energy <= 1.0:
            raise ValueError(f"`energy` must be in (0, 1], but it is {self.energy}.")
        if self.temperature <= 0.0:
            raise ValueError(f"`temperature` must be positive, but it is {self.temperature}.")
        if self.router not in ROUTERS:
            raise ValueError(f"`router` must be one of {', '.join(map(repr, ROUTERS))}, but it is {self.router!r}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, or `None` for all tasks, but it is {self.top_k}.")
        if self.gate_lora and (self.tasks is None or self.task_ranks is None):
            raise ValueError("`gate_lora` is no option of training; pass it when you merge.")
        if isinstance(self.projector_modules, str):
            self.projector_modules = [self.projector_modules]
        if self.format_version != 1:
            raise ValueError(
                f"This adapter has format version {self.format_version}; please upgrade peft_many to load it."
            )

    @property
    def init_weights(self) -> Any:
        """What PEFT calls `init_lora_weights` in configs of other types; it sets this to undo PiSSA and the like."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value

    @property
    def is_merge(self) -> bool:
        """Whether this adapter is a merge of tasks."""
        return self.tasks is not None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, without the statistics; sets as sorted lists, for equal bytes."""
        content: dict[str, Any] = super().to_dict()
        del content["statistics"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration, the statistics if there are any, and what the model card must say of them."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".", suffix=".partial") as beside:
            super().save_pretrained(beside, **kwargs)  # PEFT writes in place
            os.replace(Path(beside, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
        update_card(Path(save_directory), self)
        if self.statistics is not None:
            self.statistics.save(save_directory, self.energy)
