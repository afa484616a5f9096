"""The gate in vLLM: each request gets the LoRA of the task that its images are like, or the merged one.

vLLM wants to know the LoRA when a request comes, before anything is encoded. So the images are encoded by themselves
first, and again with the request: vision encoder and projectors see each image twice.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from ..algebra.gating import confidence
from .merge import ServedMerge


class RoutingWorker:
    """Extends vLLM's workers: `worker_extension_cls="peft_many.serving.gate.RoutingWorker"`."""

    def route_images(self: Any, images: list[bytes]) -> list[list[float]]:
        """What each task of the merge counts for each image, given as the bytes of an image file."""
        config = self.model_runner.model_config
        processor = MULTIMODAL_REGISTRY.create_processor(config)
        prompt = processor.dummy_inputs.get_dummy_text({"image": 1})
        found = []
        for content in images:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
            inputs = processor(prompt, processor.info.parse_mm_data({"image": [picture]}))
            items = [("image", item) for item in inputs["mm_kwargs"]["image"]]
            with torch.inference_mode():
                for _, _, arguments in group_and_batch_mm_kwargs(items, device=self.device):
                    found += self.model_runner.get_model().task_weights(**arguments).tolist()
        return found


class Gate:
    """Chooses the LoRA of a request by its images, as a merge with `gate_lora=True` does.

    Args:
        llm ([`~vllm.LLM`]):
            With `additional_config={"peft_many": merge}`, `enable_lora=True` and
            `worker_extension_cls="peft_many.serving.gate.RoutingWorker"`. With `max_loras` one more than there are
            tasks, requests of all tasks run together.
        loras (`str`): What `export_lora(merge, loras, with_tasks=True)` wrote.

    Raises:
        ValueError: The server routes by no merge, or `loras` lacks the LoRA of a task.

    Example:

        ```python
        llm = LLM(
            base,
            enable_lora=True,
            max_loras=3,
            additional_config={"peft_many": "merged"},
            worker_extension_cls="peft_many.serving.gate.RoutingWorker",
        )
        gate = Gate(llm, "merged-lora")
        prompts = [{"prompt": "USER: <image>\\nWhat is it? ASSISTANT:", "multi_modal_data": {"image": image}}]
        llm.generate(prompts, lora_request=[gate.lora_for([image])])
        ```
    """

    def __init__(self, llm: LLM, loras: str | Path) -> None:
        told = llm.llm_engine.vllm_config.additional_config.get("peft_many")
        self.loras = LoRAs(ServedMerge.read(told), Path(loras))
        self._llm = llm

    def lora_for(self, images: Sequence[Image.Image]) -> LoRARequest | None:
        """The LoRA for a request with these images: the merged one without images, none if they are like no task's."""
        if not images:
            return self.loras.merged
        weights = self._llm.collective_rpc("route_images", args=([as_file(image) for image in images],))[0]
        return self.loras.chosen(weights)


class LoRAs:
    """The merged LoRA and those of the tasks, as requests."""

    def __init__(self, merge: ServedMerge, folder: Path) -> None:
        names = merge.record.names
        missing = next((t for t in range(len(names)) if not (folder / f"task_{t}").is_dir()), None)
        if missing is not None:
            raise ValueError(
                f"'{folder}' lacks the LoRA of the task '{names[missing]}': export it again, with `with_tasks=True` "
                "(`peft-many export --format lora --with-tasks`)."
            )
        self.merged = LoRARequest("merged", 1, str(folder))
        self.of_tasks = [LoRARequest(name, 2 + t, str(folder / f"task_{t}")) for t, name in enumerate(names)]

    def chosen(self, weights: list[list[float]]) -> LoRARequest | None:
        """By the tasks' weights for each image of a request, `(images, tasks)`."""
        mean = torch.tensor(weights).mean(dim=0, keepdim=True)
        if not mean.any():
            return None
        return self.of_tasks[int(mean.argmax())] if confidence(mean).item() else self.merged


def as_file(image: Image.Image) -> bytes:
    """The bytes of an image file, without loss."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=0)
    return file.getvalue()
