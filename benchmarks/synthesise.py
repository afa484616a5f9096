"""Task adapters on disk as `model.save_pretrained` leaves them, made without any base model: input for the benchmarks.

The default sizes are those of LLaVA-1.5-7B: LoRA on all linear layers of the language model, low-rank covariances of
their inputs, a copy of the projector with its visual prototype. The numbers are random and the same for the same seed.
Every covariance has a decaying spectrum, a large direction that all tasks share, and a small remainder, as those of a
trained model have; the rows of its factor are Gaussian, which at these widths are as good as orthogonal.

Two folders are written, each with one adapter per task: `many` (`MAnyConfig`, with projectors) and `lora`
(`LoraConfig`, the same LoRA weights and statistics, without projectors), since PEFT's own merging refuses projectors.

    python benchmarks/synthesise.py --output adapters --tasks 6
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from peft_many import MAnyConfig
from peft_many.algebra.covariance import LowRankCovariance
from peft_many.files.fingerprints import weight_fingerprint
from peft_many.files.statistics import (
    STATISTICS_NAME,
    AdapterStatistics,
    FeatureStatistics,
    InputStatistics,
    TaskStatistics,
)

KEY_PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
PROJECTOR = "model.multi_modal_projector"
# The linear layers of one decoder layer, those that share their input together.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
COMMON_SHARE = 0.5  # of the energy of every task's inputs lies along the direction that all tasks share
REMAINDER_SHARE = 0.001  # of the energy is in no direction in particular, as after truncation to 0.999


@dataclass(frozen=True)
class Sizes:
    """The sizes of the synthesised adapters. The fields are the options of the command line."""

    tasks: int = 6
    layers: int = 32
    width: int = 4096
    intermediate: int = 11008
    image_width: int = 1024
    r: int = 16
    statistics_rank: int = 256
    seed: int = 0

    def groups(self) -> list[tuple[str, ...]]:
        """The adapted layers by their path in the base model, those that share their input together."""
        return [
            tuple(f"model.language_model.layers.{i}.{name}" for name in names)
            for i in range(self.layers)
            for names in SHARED_INPUTS
        ]

    def shape(self, module: str) -> tuple[int, int]:
        """`(in, out)` of an adapted layer."""
        if module.endswith("down_proj"):
            return self.intermediate, self.width
        return self.width, self.width if ".self_attn." in module else self.intermediate


QUICK = Sizes(tasks=3, layers=2, width=64, intermediate=160, image_width=32, r=4, statistics_rank=8)


def synthesise(root: Path, sizes: Sizes, progress: bool = True) -> dict[str, list[Path]]:
    """Write the adapters of all tasks below `root`, unless it already holds those of the same sizes.

    Returns:
        `dict[str, list[Path]]`: The adapter folders of the kinds `many` and `lora`.
    """
    folders = {kind: [root / kind / f"task_{t}" for t in range(sizes.tasks)] for kind in ("many", "lora")}
    done = root / "sizes.json"
    if done.is_file():
        if json.loads(done.read_text()) != asdict(sizes):
            raise FileExistsError(f"'{root}' holds adapters of other sizes; remove it or choose another folder.")
        return folders
    for t in tqdm(range(sizes.tasks), desc="Synthesising", unit="adapter", disable=not progress):
        _write_task(folders["many"][t], folders["lora"][t], sizes, t)
    done.write_text(json.dumps(asdict(sizes)))
    return folders


def _write_task(many: Path, lora: Path, sizes: Sizes, t: int) -> None:
    generator = torch.Generator().manual_seed(sizes.seed + 1_000_003 * (t + 1))
    config: dict[str, Any] = {
        "r": sizes.r,
        "lora_alpha": 2 * sizes.r,
        "target_modules": rf"model\.language_model\..*\b(?:{'|'.join(_layer_names())})",
        "inference_mode": True,
    }
    weights, fingerprints = {}, {}
    for module in (module for group in sizes.groups() for module in group):
        inputs, outputs = sizes.shape(module)
        A = torch.randn(sizes.r, inputs, generator=generator) * inputs**-0.5
        B = torch.randn(outputs, sizes.r, generator=generator) * 0.01
        weights[f"{KEY_PREFIX}{module}.lora_A.weight"] = A
        weights[f"{KEY_PREFIX}{module}.lora_B.weight"] = B
        fingerprints[module] = weight_fingerprint(A, B)
    lora.mkdir(parents=True)
    save_file(weights, lora / WEIGHTS_NAME, {"format": "pt"})
    LoraConfig(**config).save_pretrained(lora)

    statistics = TaskStatistics(
        name=f"task_{t}",
        samples=256,
        inputs=dict(_inputs(sizes, generator)),
        input_of={module: group[0] for group in sizes.groups() for module in group},
        projectors={PROJECTOR: FeatureStatistics(torch.randn(sizes.image_width, generator=generator), None, 256)},
        fingerprints=fingerprints,
    )
    weights |= {f"{KEY_PREFIX}{PROJECTOR}.{key}": tensor for key, tensor in _projector(sizes, generator).items()}
    many.mkdir(parents=True)
    save_file(weights, many / WEIGHTS_NAME, {"format": "pt"})
    MAnyConfig(
        **config,
        task_name=f"task_{t}",
        modules_to_save=[PROJECTOR],
        projector_modules=[PROJECTOR],
        statistics=AdapterStatistics((statistics,)),
    ).save_pretrained(many)
    os.link(many / STATISTICS_NAME, lora / STATISTICS_NAME)  # the same bytes; at full size most of the adapter


def _layer_names() -> list[str]:
    return sorted(name.rpartition(".")[2] for names in SHARED_INPUTS for name in names)


def _inputs(sizes: Sizes, generator: torch.Generator) -> Iterator[tuple[str, InputStatistics]]:
    """Each distinct input, by the first layer that it reaches."""
    for g, group in enumerate(sizes.groups()):
        width = sizes.shape(group[0])[0]
        rank = min(sizes.statistics_rank, width)
        common = torch.randn(width, generator=torch.Generator().manual_seed(sizes.seed + g))
        factor = torch.randn(rank, width, generator=generator) * width**-0.5
        factor[0] = common / common.norm()
        share = 1.0 / torch.arange(1, rank + 1)
        share[1:] *= (1 - COMMON_SHARE) / share[1:].sum() if rank > 1 else 1.0
        share[0] = COMMON_SHARE if rank > 1 else 1.0
        factor *= (width * share).sqrt()[:, None]  # so that the mean squared input is one
        covariance = LowRankCovariance(remainder=REMAINDER_SHARE, factor=factor).in_half_precision()
        yield group[0], InputStatistics(covariance, 4096)


def _projector(sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for name, inputs in (("linear_1", sizes.image_width), ("linear_2", sizes.width)):
        tensors[f"{name}.weight"] = torch.randn(sizes.width, inputs, generator=generator) * inputs**-0.5
        tensors[f"{name}.bias"] = torch.zeros(sizes.width)
    return tensors


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `Sizes`."""
    for field in fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", help=f"default {field.default}, quick {_quick(field.name)}")


def sizes_from(options: argparse.Namespace) -> Sizes:
    """The sizes that the command line asks for."""
    given = {f.name: getattr(options, f.name) for f in fields(Sizes) if getattr(options, f.name) is not None}
    return replace(QUICK if options.quick else Sizes(), **given)


def _quick(name: str) -> int:
    return getattr(QUICK, name)


def main() -> None:
    """Write adapters and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/scratch"), help="where to write the adapters")
    parser.add_argument("--quick", action="store_true", help="tiny adapters")
    add_size_options(parser)
    options = parser.parse_args()
    folders = synthesise(options.output, sizes_from(options))
    written = sum(path.stat().st_size for folder in folders["many"] for path in folder.iterdir())
    print(f"{len(folders['many'])} adapters of {written / len(folders['many']) / 1e6:,.1f} MB in {options.output}")


if __name__ == "__main__":
    main()
