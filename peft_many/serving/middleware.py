"""The gate in vLLM's OpenAI server: who asks for the merge gets the LoRA of the task that images or words are like."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from .asked import told_merge
from .gate import LoRAs, as_file, merge_to_gate_by
from .merge import served_merge

logger = init_logger(f"vllm.{__name__}")

ADDRESS = "/v1/chat/completions"


class GateMiddleware:
    """Rewrites `model` in chat completions: `--middleware peft_many.serving.middleware.GateMiddleware`.

    Gated is whoever asks for a LoRA in whose folder those of the tasks lie (`export_lora(..., with_tasks=True)`). All
    of them have to be served, under any names: a server that lacks one, or anything else that gating needs, does not
    start. Other requests pass as they are. An image by its address is fetched twice, as the server does it, and once
    more where gates go by instructions; videos do not count. Whoever lacks the server's key gets no further than to be
    told so.

    Example:

        ```bash
        peft-many export merged --format lora --with-tasks --output loras
        vllm serve base --enable-lora --max-loras 3 \
            --additional-config '{"peft_many": "merged"}' \
            --lora-modules merged=loras clevr=loras/task_0 iconqa=loras/task_1 \
            --worker-extension-cls peft_many.serving.gate.RoutingWorker \
            --middleware peft_many.serving.middleware.GateMiddleware
        ```
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] == "lifespan":
            try:
                check_gate(scope["app"].state)
            except ValueError as error:
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        # No others: the server asks for its key there, and only inside of what it was told to put around itself.
        is_chat = scope["type"] == "http" and scope["method"] == "POST"
        if not is_chat or scope["path"].removeprefix(scope.get("root_path", "")) != ADDRESS:
            await self.app(scope, receive, send)
            return
        tokens = [key for key in (scope["app"].state.args.api_key or [envs.VLLM_API_KEY]) if key]
        await (AuthenticationMiddleware(self._gate, tokens) if tokens else self._gate)(scope, receive, send)

    async def _gate(self, scope: Any, receive: Any, send: Any) -> None:
        pieces, more = [], True
        while more:
            message = await receive()
            pieces.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = await _gated(b"".join(pieces), scope["app"].state)
        lengths = (b"content-length", str(len(body)).encode())
        headers = [lengths if name == b"content-length" else (name, value) for name, value in scope["headers"]]
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


def check_gate(state: Any) -> None:
    """A `ValueError` says what a server lacks that is to gate, before it serves anything."""
    config = state.engine_client.vllm_config
    merge_to_gate_by(config)
    served = _names_by_folder(state.openai_serving_models)
    gated = [folder for folder in served if _has_tasks(folder)]
    if not gated:
        raise ValueError(
            "The gate has nothing to choose from: none of `--lora-modules` is the folder of a merge's LoRA with those "
            "of its tasks within, as `peft-many export --format lora --with-tasks` writes it."
        )
    for folder in gated:
        for lora in _loras_in(folder, told_merge(config)).of_tasks:
            if _folder_of(lora) not in served:
                raise ValueError(
                    f"The gate of '{served[folder]}' may choose the LoRA of the task '{lora.lora_name}', which is not "
                    f"served: add `NAME={lora.lora_path}` to `--lora-modules`."
                )


async def _gated(body: bytes, state: Any) -> bytes:
    """A request's body, with the model that its images and words choose."""
    try:
        asked = json.loads(body)
        urls = _image_urls(asked["messages"])
        lora = state.openai_serving_models.lora_requests.get(asked["model"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return body  # the server says what is wrong with it
    if lora is None or not _has_tasks(_folder_of(lora)):
        return body
    config = state.engine_client.vllm_config
    loras = _loras_in(_folder_of(lora), told_merge(config))
    by_words = loras.merge.record.options.gates_by_instructions
    if not urls and not by_words:
        return body
    multimodal = config.model_config.multimodal_config
    if urls and (multimodal is None or len(urls) > multimodal.get_limit_per_prompt("image")):
        return body  # which the server refuses
    try:
        images = await _images(urls, asked, config.model_config)
        prompt = await _token_ids(body, state) if by_words else None
        weights = (await state.engine_client.collective_rpc("route_request", args=(images, prompt)))[0]
    except Exception as error:  # whatever is wrong with an image or the chat, the server meets it too, and answers
        logger.warning("A request for '%s' passes the gate as it is, which cannot read it: %s", asked["model"], error)
        return body
    return json.dumps({**asked, "model": _name_of(loras.chosen(weights), state.openai_serving_models)}).encode()


async def _images(urls: list[str], asked: dict[str, Any], model: Any) -> list[bytes]:
    """The images of a request, fetched as the server does it."""
    if not urls:
        return []
    media = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=asked.get("media_io_kwargs") or model.multimodal_config.media_io_kwargs,
        allowed_local_media_path=model.allowed_local_media_path,
        allowed_media_domains=model.allowed_media_domains,
    )
    once = list(dict.fromkeys(urls))
    fetched = await asyncio.gather(*map(media.fetch_image_async, once))
    files = dict(zip(once, map(as_file, fetched)))
    return [files[url] for url in urls]


@functools.cache
def _loras_in(folder: Path, told: str) -> LoRAs:
    """A merge's LoRAs; what is served does not change, so that they are looked at once."""
    return LoRAs(served_merge(told), folder)


def _names_by_folder(models: Any) -> dict[Path, str]:
    """What the server calls its LoRAs; of two names for one, the first."""
    return {_folder_of(lora): str(name) for name, lora in reversed(models.lora_requests.items())}


def _folder_of(lora: LoRARequest) -> Path:
    return Path(lora.lora_path).expanduser().resolve()


def _has_tasks(folder: Path) -> bool:
    return (folder / "task_0").is_dir()


def _image_urls(messages: list[dict[str, Any]]) -> list[str]:
    """Of all images in a chat, in the forms that vLLM takes."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    parts = [part for part in parts if part.get("type", "image_url") in ("image_url", "input_image")]
    told = [part["image_url"] for part in parts if "image_url" in part]  # a text may come without a type, too
    return [one if isinstance(one, str) else one["url"] for one in told]


async def _token_ids(body: bytes, state: Any) -> list[int]:
    """Those of a request, as the server will give them to the model."""
    request = ChatCompletionRequest.model_validate_json(body)
    # A cache would take it for told that the engine has these images now.
    _, inputs = await state.online_renderer.render_chat(request, skip_mm_cache=True)
    return list(inputs[0]["prompt_token_ids"])


def _name_of(chosen: LoRARequest | None, models: Any) -> str:
    """What the server calls a LoRA; `None` is the base model."""
    if chosen is None:
        return str(models.base_model_paths[0].name)
    found = _names_by_folder(models).get(_folder_of(chosen))
    if found is None:
        raise ValueError(f"The LoRA of the task '{chosen.lora_name}' is not served any more.")
    return found
