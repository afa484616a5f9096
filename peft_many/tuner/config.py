"""`MAnyConfig`: a `LoraConfig` that also trains the projector and carries what merging needs."""

from __future__ import annotations

import copy
import enum
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig
from peft.utils import CONFIG_NAME

from ..algebra.spectrum import DEFAULT_ENERGY
from ..files.card import update_card
from ..records import MergeRecord, PoolRecord
from ..records.checking import RecordError

FORMAT_VERSION = 2


class Statistics(Protocol):
    """What a config carries beside its fields: an adapter's statistics, or where on the Hub they are."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write them into a folder."""


class MAnyPeftType(str, enum.Enum):
    """The PEFT type of this plugin. PEFT's own enum cannot be extended from outside; lookups go by the string."""

    MANY = "MANY"


@dataclass
class MAnyConfig(LoraConfig):
    """Configuration of a MAny adapter (arXiv 2604.14016): LoRA on the language model, and a copy of the projector.

    All arguments of [`~peft.LoraConfig`] mean the same here. Without `target_modules` all linear layers of the
    language model get a LoRA, but not the vision tower, the projector and the output head. On a model that takes no
    images the defaults of [`~peft.LoraConfig`] apply, and all linear layers where it has none.

    Args:
        task_name (`str`, *optional*):
            What to call the task in merges. Defaults to the name of the folder or Hub repository at merging.
        projector_modules (`list[str]`, *optional*):
            Names of the multimodal projector's modules, matched at their end like `modules_to_save`. By default they
            are looked for between the vision tower and the language model. An empty list trains no projector.
        energy (`float`, defaults to `0.9999`):
            The default of [`collect_statistics`]: the share of each covariance's energy whose directions are kept, in
            (0, 1]. The rest is spread evenly over all directions (MAny* in the paper).
        merge ([`MergeRecord`], *optional*):
            What a merge was made of and how. Written by merging.
        pool ([`PoolRecord`], *optional*):
            What an adapter was pooled from. Written by pooling.
        format_version (`int`): Version of the layout of adapter folders.
        statistics ([`AdapterStatistics`], *optional*):
            Covariances and prototypes, or where on the Hub they are. No part of `adapter_config.json`; they are saved
            in a file of their own.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_many import MAnyConfig

        >>> model = get_peft_model(base, MAnyConfig(r=16, lora_alpha=32, task_name="clevr"))
        >>> model.peft_config["default"].projector_modules
        ['model.multi_modal_projector']
        ```
    """

    # `HfArgumentParser` shows these to people who train by command line.
    task_name: str | None = field(default=None, metadata={"help": "What to call the task in merges."})
    projector_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the projector's modules. Looked for if not given; [] trains no projector."},
    )
    energy: float = field(
        default=DEFAULT_ENERGY, metadata={"help": "Share of each covariance's energy whose directions are kept."}
    )
    merge: MergeRecord | None = None
    pool: PoolRecord | None = None
    format_version: int = FORMAT_VERSION
    # A field, so that `dataclasses.replace` keeps it; no part of the configuration's value or of its JSON.
    statistics: Statistics | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MAnyPeftType.MANY
        if not 0.0 < self.energy <= 1.0:
            raise ValueError(f"`energy` must be in (0, 1], but it is {self.energy}.")
        if not isinstance(self.task_name, (str, type(None))):  # which would be found out when its file is read
            raise TypeError(f"`task_name` must be a string, but it is {self.task_name!r}.")
        if isinstance(self.projector_modules, str):
            self.projector_modules = [self.projector_modules]
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"This adapter has format version {self.format_version}, and this peft_many reads {FORMAT_VERSION}. "
                "Please install the version of peft_many that it was saved with."
            )
        self._read_records()

    def _read_records(self) -> None:
        for name, kind in (("merge", MergeRecord), ("pool", PoolRecord)):
            content = getattr(self, name)
            if content is None or isinstance(content, kind):
                continue
            try:
                setattr(self, name, kind.read(content))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise RecordError(f"`{name}` cannot be used: {reason:.500}") from None

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
        return self.merge is not None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, without the statistics; sets as sorted lists, for equal bytes."""
        plain = copy.copy(self)
        plain.merge = plain.pool = plain.statistics = None  # PEFT would copy all that hangs on them
        content: dict[str, Any] = super(MAnyConfig, plain).to_dict()
        del content["statistics"]
        content |= {name: record.to_json() for name, record in (("merge", self.merge), ("pool", self.pool)) if record}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration, the statistics if there are any, and what the model card must say of them."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".", suffix=".partial") as beside:
            super().save_pretrained(beside, **kwargs)  # PEFT writes in place
            os.replace(Path(beside, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
        update_card(Path(save_directory), self)
        if self.statistics is not None:
            self.statistics.save(save_directory)
