"""One adapter's pass over its data: the hooks that measure it, and the order in which they see a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm

from ..algebra.devices import device_of
from ..algebra.spectrum import Truncation
from ..algebra.total import FiniteCheck
from ..files.processes import Processes
from ..files.statistics import TaskStatistics
from ..routing.watching import watching_calls
from .features import SPREAD_OF_INSTRUCTIONS, gather_features
from .forward import forward, in_inference, run_together
from .images import PrototypeHooks
from .inputs import CovarianceHooks
from .instructions import InstructionHook
from .projectors import projector_shapes, unmoved_projectors
from .prompts import PromptHooks, gather_prompts


@dataclass(frozen=True)
class Measuring:
    """An adapter that can be measured, and the hooks that do it."""

    model: nn.Module
    base: nn.Module
    adapter_name: str
    layers: Mapping[str, Any]
    sharded: bool
    truncation: Truncation
    inputs: CovarianceHooks
    images: PrototypeHooks
    asked: InstructionHook
    prompts: PromptHooks

    @property
    def task_name(self) -> str | None:
        """What the adapter's config calls its task."""
        configs: Any = self.model.peft_config
        return getattr(configs[self.adapter_name], "task_name", None)

    def run(
        self,
        dataloader: Iterable[Any],
        max_samples: int | None,
        forward_fn: Callable[[nn.Module, Any], Any] | None,
        processes: Processes,
        progress: bool,
    ) -> int:
        """Run the model over the batches; the rows that were seen, over all processes, or a `ValueError` if none."""
        bar = tqdm(
            total=max_samples,
            desc=f"Measuring '{self.task_name or self.adapter_name}'",
            unit="sample",
            disable=not progress or processes.index > 0,
        )
        with (
            bar,
            in_inference(self.model, self.adapter_name),
            watching_calls(self.base),
            self.asked,
            ExitStack() as hooks,
        ):
            for hook in (self.images, self.inputs, self.prompts):
                hooks.enter_context(hook)

            def run(batch: Any, counts: bool) -> None:
                self.asked.counts = counts
                if counts:
                    self.inputs.begin_batch(batch)  # its masks are still on the CPU, as a rule
                else:
                    hooks.close()
                forward(self.model, send_to_device(batch, device_of(self.model)), forward_fn)
                self.inputs.end_batch()

            samples = run_together(self._checked(dataloader), max_samples, processes, run, bar.update, self.sharded)
        if samples == 0:
            raise ValueError("The dataloader gave no batch, so there is nothing to measure.")
        return samples

    def features(self, samples: int, processes: Processes) -> TaskStatistics:
        """The task's statistics but for its layers: of images and words, and of the adapter's copies of projectors.

        Over all processes, which saw so many samples.
        """
        seen = gather_features(processes.together(self.images.result), processes)
        asked = gather_features(processes.together(self.asked.result), processes, SPREAD_OF_INSTRUCTIONS)
        projectors = list(self.images.projectors)
        unseen = [name for name in projectors if name not in seen]
        return TaskStatistics(
            name=self.task_name,
            samples=samples,
            projectors=seen,
            instructions=next(iter(asked.values()), None),
            prompts=gather_prompts(self.prompts, processes),
            projector_shapes=projector_shapes(self.base, self.adapter_name, projectors),
            unmoved_projectors=processes.together(lambda: unmoved_projectors(self.base, self.adapter_name, unseen)),
        )

    def _checked(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, if nothing was wrong with what was measured of those before.

        A GPU is not waited for: while it works on a batch, the next one is given, and what was asked about is read
        when it has arrived, or after one batch more. Of the last batches, the results ask again.
        """
        asked: deque[FiniteCheck] = deque()
        for batch in batches:
            yield batch
            asked.extend((self.images.check(), self.inputs.check()))
            while asked and (asked[0].arrived or len(asked) > 2):
                asked.popleft().refuse()
