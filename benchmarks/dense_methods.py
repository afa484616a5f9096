"""Merges on full covariance matrices: the textbook recursion, RegMean, and the float64 optimum they are held against.

All weights `w_t` are one. Groups are layers that share their input; what depends on the input alone (covariance, gain,
inverse) is computed once for each group, which published implementations do for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from synthesise import KEY_PREFIX, WEIGHTS_NAME
from torch import Tensor
from weighted_adapter import read_weights

from peft_many.algebra.covariance import LowRankCovariance
from peft_many.algebra.lpm import LowRankDelta
from peft_many.files.statistics import STATISTICS_NAME, AdapterStatistics

RIDGE = 1e-4  # the default of peft_many
# RegMean's factor on off-diagonal entries: FusionBench ships 0.95 for CLIP and 0.6 for GPT-2.
REGMEAN_SCALING = 0.95

Groups = Sequence[Sequence[str]]


class Task:
    """One adapter folder, read layer by layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = LoraConfig.from_pretrained(folder)
        self.scaling = config.lora_alpha / config.r
        self.measured = AdapterStatistics.load(folder / STATISTICS_NAME).tasks[0]

    def delta(self, module: str) -> LowRankDelta:
        """The layer's low-rank delta in float32, scaling folded in."""
        A, B = read_weights(self.folder, [module]).values()
        return LowRankDelta(A=self.scaling * A, B=B)

    def covariance(self, module: str, dtype: torch.dtype, ridge: float) -> Tensor:
        """The full matrix `C_t`, ridge included, computed in `dtype` from the low-rank statistics."""
        low_rank = self.measured.covariance_of(module)
        assert isinstance(low_rank, LowRankCovariance)
        factor = low_rank.factor_rows().to(dtype)
        matrix = factor.T @ factor
        matrix.diagonal().add_(low_rank.remainder)
        matrix.diagonal().add_(ridge * matrix.diagonal().mean())
        return matrix


def recursion(folders: Sequence[Path], output: Path, groups: Groups) -> None:
    """Recursive least squares in covariance form, as the method is written down, in float32 and with dense deltas.

    `R_t = R_{t−1} + C_t,  K_t = C_t R_t⁻¹,  ΔW_t* = ΔW*_{t−1} + (ΔW_t − ΔW*_{t−1}) K_t`. The first task is taken over
    as it is, and the two products of `ΔW*_{t−1}(I − K_t) + ΔW_t K_t` are one: both is kinder than the letter.
    """
    tasks = [Task(folder) for folder in folders]
    merged: dict[str, Tensor] = {}
    for group in groups:
        total = tasks[0].covariance(group[0], torch.float32, RIDGE)
        merged |= {module: _dense(tasks[0].delta(module)) for module in group}
        for task in tasks[1:]:
            covariance = task.covariance(group[0], torch.float32, RIDGE)
            total += covariance
            gain = covariance @ torch.linalg.inv(total)
            for module in group:
                merged[module] += (_dense(task.delta(module)) - merged[module]) @ gain
    _save_dense(merged, output)


def regmean(folders: Sequence[Path], output: Path, groups: Groups) -> None:
    """RegMean (arXiv 2212.09849): `(Σ_t W_t G_t)(Σ_t G_t)⁻¹`, off-diagonal entries of `G_t` scaled down."""
    tasks = [Task(folder) for folder in folders]
    merged: dict[str, Tensor] = {}
    for group in groups:
        total, products = torch.tensor(0.0), dict.fromkeys(group, torch.tensor(0.0))
        for task in tasks:
            gram = task.covariance(group[0], torch.float32, ridge=0.0)
            diagonal = gram.diagonal().clone()
            gram.mul_(REGMEAN_SCALING).diagonal().copy_(diagonal)
            total = total + gram
            products = {module: product + _dense(task.delta(module)) @ gram for module, product in products.items()}
        inverse = torch.inverse(total)
        merged |= {module: product @ inverse for module, product in products.items()}
    _save_dense(merged, output)


def optimum(folders: Sequence[Path], output: Path, groups: Groups) -> None:
    """The rows `[A_1 C_1; …] R⁻¹` of the least-squares optimum by a dense Cholesky solve in float64."""
    tasks = [Task(folder) for folder in folders]
    rows: dict[str, Tensor] = {}
    for group in groups:
        total = torch.tensor(0.0)
        parts: dict[str, list[Tensor]] = {module: [] for module in group}
        for task in tasks:
            covariance = task.covariance(group[0], torch.float64, RIDGE)
            total = total + covariance
            for module in group:
                parts[module].append(task.delta(module).A.double() @ covariance)
        root = torch.linalg.cholesky(total)
        for module in group:
            rows[module] = torch.cholesky_solve(torch.cat(parts[module]).T, root).T.contiguous()
    save_file(rows, output)


def relative_distance(folders: Sequence[Path], merged: Path, optimal_rows: Path) -> float:
    """The largest `‖ΔW − ΔW*‖ / ‖ΔW*‖` over the layers of `optimal_rows`; `merged` is a merge's weights file."""
    distances = []
    with safe_open(optimal_rows, framework="pt") as optimal, safe_open(merged, framework="pt") as found:
        stored = set(found.keys())
        for module in optimal.keys():  # noqa: SIM118  (not a dict)
            key = f"{KEY_PREFIX}{module}.lora_B.weight"
            B = torch.cat([read_weights(folder, [module])[key] for folder in folders], dim=1)
            expected = B.double() @ optimal.get_tensor(module)
            if module in stored:
                delta = found.get_tensor(module)
            else:
                A, B = (found.get_tensor(f"{KEY_PREFIX}{module}.lora_{half}.weight") for half in "AB")
                delta = LowRankDelta(A=A, B=B).dense()
            distances.append(((delta - expected).norm() / expected.norm()).item())
    return max(distances)


def _dense(delta: LowRankDelta) -> Tensor:
    return delta.B @ delta.A


def _save_dense(merged: dict[str, Tensor], output: Path) -> None:
    output.mkdir(parents=True)
    save_file(merged, output / WEIGHTS_NAME)
