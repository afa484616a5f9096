"""The gate in vLLM: each request gets the LoRA of the task that its images and words are like, or the merged one.

vLLM wants to know the LoRA when a request comes, before anything is encoded. So the images are encoded by themselves
first, and again with the request: vision encoder and projectors see each image twice. Words are looked up only.
"""

from __future__ import annotations

import io
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from vllm import LLM
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.tokenizers import cached_tokenizer_from_config

from ..algebra.gating import confidence
from ..records import TASKS_NAME
from ..records.options import INSTRUCTIONS
from .asked import told_merge
from .merge import ServedMerge, served_merge
from .words import placeholders, router_of_words, scores_of_words, weights_of_request


class RoutingWorker:
    """Extends vLLM's workers: `worker_extension_cls="peft_many.serving.gate.RoutingWorker"`."""

    def route_request(self: Any, images: list[bytes], prompt: str | list[int] | None = None) -> list[float] | None:
        """What each task of the merge counts for a request, by what its gates go by; `None` if nothing tells.

        Images are the bytes of image files. A prompt is a text with a placeholder for each of them, or token ids in
        which these are as long as the model sees them.
        """
        merge = served_merge(told_merge(self.vllm_config))  # which no model knows if it routes none
        opened = {content: Image.open(io.BytesIO(content)).convert("RGB") for content in dict.fromkeys(images)}
        pictures = [opened[content] for content in images]
        with torch.inference_mode():
            goes_by_images = bool(merge.record.routing) and merge.record.options.gate_by != INSTRUCTIONS
            by_images, fits = _by_images(self, pictures) if goes_by_images else (None, None)
            scores = None
            if merge.record.instructions is not None:
                scores = _by_words(self, merge, _token_ids(self, pictures, prompt))
            found = weights_of_request(by_images, scores, fits)
        return None if found is None else found.tolist()


def _by_images(worker: Any, pictures: list[Image.Image]) -> tuple[Tensor | None, Tensor | None]:
    """What each task counts for each image, and which tasks take it, `(images, tasks)`; `None` if nothing tells."""
    if not pictures:
        return None, None
    runner, found = worker.model_runner, {}
    processor = MULTIMODAL_REGISTRY.create_processor(runner.model_config)
    prompt = processor.dummy_inputs.get_dummy_text({"image": 1})
    for picture in {id(one): one for one in pictures}.values():  # one that comes again is encoded once
        inputs = processor(prompt, processor.info.parse_mm_data({"image": [picture]}))
        items = [("image", item) for item in inputs["mm_kwargs"]["image"]]
        ((_, _, arguments),) = group_and_batch_mm_kwargs(items, device=worker.device)
        found[id(picture)] = runner.get_model().task_weights(**arguments)
    weights, fits = zip(*(found[id(picture)] for picture in pictures))
    return torch.cat(weights), None if fits[0] is None else torch.cat(fits)


def _by_words(worker: Any, merge: ServedMerge, ids: list[int]) -> Tensor:
    """How well each task explains a prompt, `(tasks,)`."""
    known = vars(worker)
    if "router_of_words" not in known:
        known["router_of_words"] = router_of_words(merge, worker.device)
    images = placeholders(worker.model_runner.model_config.hf_config)
    words = [one for one in ids if one not in images]
    return scores_of_words(known["router_of_words"], words, _embedding(worker.model_runner.get_model()))


def _token_ids(worker: Any, pictures: list[Image.Image], prompt: str | list[int] | None) -> list[int]:
    if not isinstance(prompt, str):
        return prompt or []
    config = worker.model_runner.model_config
    if not config.is_multimodal_model:
        return list(cached_tokenizer_from_config(config).encode(prompt))
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    shown = processor.info.parse_mm_data({"image": pictures} if pictures else {})
    return list(processor(prompt, shown)["prompt_token_ids"])


def _embedding(model: Any) -> VocabParallelEmbedding:
    """The base model's own token embedding, without what a LoRA may add to it."""
    within = model.get_language_model() if hasattr(model, "get_language_model") else model
    return next(
        module
        for module in within.modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    )


class Gate:
    """Chooses the LoRA of a request, as a merge with `gate_lora=True` does: by images, by words or both (`gate_by`).

    Args:
        llm ([`~vllm.LLM`]):
            With `additional_config={"peft_many": merge}`, `enable_lora=True` and
            `worker_extension_cls="peft_many.serving.gate.RoutingWorker"`. With `max_loras` one more than there are
            tasks, requests of all tasks run together.
        loras (`str`): What `export_lora(merge, loras, with_tasks=True)` wrote.

    Raises:
        ValueError:
            The server routes by no merge or lacks the worker extension, or `loras` lacks the LoRA of a task or was
            exported from another merge.

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
        prompt = "USER: <image>\\nWhat is it? ASSISTANT:"
        request = {"prompt": prompt, "multi_modal_data": {"image": image}}
        llm.generate([request], lora_request=[gate.lora_for([image], prompt)])
        ```
    """

    def __init__(self, llm: LLM, loras: str | Path) -> None:
        self.loras = LoRAs(merge_to_gate_by(llm.llm_engine.vllm_config), Path(loras))
        self._llm = llm

    def lora_for(self, images: Sequence[Image.Image], prompt: str | list[int] | None = None) -> LoRARequest | None:
        """The LoRA for a request: the merged one if nothing tells its task, none if it is like no task's.

        A merge whose gates go by instructions needs its prompt, as `generate` gets it, or as token ids in which each
        image has all of its placeholders.
        """
        by = self.loras.merge.record.options.gate_by
        if prompt is None and self.loras.merge.record.options.gates_by_instructions:
            raise ValueError(
                f"The gates of '{self.loras.merge.folder}' go by instructions (`gate_by='{by}'`): pass the `prompt`."
            )
        contents = [as_file(image) for image in images]
        return self.loras.chosen(self._llm.collective_rpc("route_request", args=(contents, prompt))[0])


def merge_to_gate_by(config: VllmConfig) -> ServedMerge:
    """The merge that a server was told; a `ValueError` says what it has to be told for a gate."""
    extension = config.parallel_config.worker_extension_cls
    if not extension or not issubclass(pkgutil.resolve_name(extension), RoutingWorker):
        raise ValueError(
            f"A gate asks the server's workers, which need `worker_extension_cls="
            f'"{RoutingWorker.__module__}.{RoutingWorker.__name__}"` (`--worker-extension-cls` of `vllm serve`).'
        )
    return served_merge(told_merge(config))


class LoRAs:
    """The merged LoRA and those of the tasks, as requests; a `ValueError` says why these are not the merge's."""

    def __init__(self, merge: ServedMerge, folder: Path) -> None:
        self.merge = merge
        names = merge.record.names
        missing = next((t for t in range(len(names)) if not (folder / f"task_{t}").is_dir()), None)
        if missing is not None:
            raise ValueError(
                f"'{folder}' lacks the LoRA of the task '{names[missing]}': export it again, with `with_tasks=True` "
                "(`peft-many export --format lora --with-tasks`)."
            )
        found = folder / TASKS_NAME
        if not found.is_file() or json.loads(found.read_text(encoding="utf-8")) != merge.record.identities:
            raise ValueError(
                f"The LoRAs in '{folder}' are not those of the tasks of the merge in '{merge.folder}': export them "
                "again from that merge, or name the other one in `additional_config`."
            )
        self.merged = LoRARequest("merged", 1, str(folder))
        self.of_tasks = [LoRARequest(name, 2 + t, str(folder / f"task_{t}")) for t, name in enumerate(names)]

    def chosen(self, weights: list[float] | None) -> LoRARequest | None:
        """By what each task counts for a request; `None` is the base model."""
        if weights is None:
            return self.merged
        if not any(weights):
            return None
        row = torch.tensor([weights])
        return self.of_tasks[int(row.argmax())] if confidence(row).item() else self.merged


def as_file(image: Image.Image) -> bytes:
    """The bytes of an image file, without loss."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", compress_level=0)
    return file.getvalue()
