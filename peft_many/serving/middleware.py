"""The gate in vLLM's OpenAI server: who asks for the merge gets the LoRA of the task that images or words are like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.request import LoRARequest
from vllm.multimodal.media import MediaConnector

from .gate import LoRAs, as_file
from .merge import served_merge


class GateMiddleware:
    """Rewrites `model` in chat completions: `--middleware peft_many.serving.middleware.GateMiddleware`.

    Gated is whoever asks for a LoRA in whose folder those of the tasks lie (`export_lora(..., with_tasks=True)`). All
    of them have to be served, under any names. Other requests pass as they are. An image by its address is fetched
    twice, as the server does it, and once more where gates go by instructions; videos do not count. Whoever lacks the
    server's key gets no further than to be told so.

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
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            await self.app(scope, receive, send)
            return
        # The server asks for its key only inside of what it was told to put around itself.
        tokens = [key for key in (scope["app"].state.args.api_key or [envs.VLLM_API_KEY]) if key]
        await (AuthenticationMiddleware(self._gate, tokens) if tokens else self._gate)(scope, receive, send)

    async def _gate(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        body = await _gated(body, scope["app"].state)
        lengths = (b"content-length", str(len(body)).encode())
        headers = [lengths if name == b"content-length" else (name, value) for name, value in scope["headers"]]
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


async def _gated(body: bytes, state: Any) -> bytes:
    """A request's body, with the model that its images and words choose."""
    try:
        asked = json.loads(body)
        urls = _image_urls(asked["messages"])
        lora = state.openai_serving_models.lora_requests.get(asked["model"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return body  # the server says what is wrong with it
    if lora is None or not Path(lora.lora_path, "task_0").is_dir():
        return body
    config = state.engine_client.vllm_config
    merge = served_merge(config.additional_config.get("peft_many"))
    by_words = merge.record.options.gates_by_instructions
    if not urls and not by_words:
        return body
    media = MediaConnector(
        allowed_local_media_path=config.model_config.allowed_local_media_path,
        allowed_media_domains=config.model_config.allowed_media_domains,
    )
    try:
        images = [as_file(await media.fetch_image_async(url)) for url in urls]
        prompt = await _token_ids(body, state) if by_words else None
    except Exception:  # whatever it is, the server meets it too, and answers
        return body
    weights = (await state.engine_client.collective_rpc("route_request", args=(images, prompt)))[0]
    chosen = LoRAs(merge, Path(lora.lora_path)).chosen(weights)
    return json.dumps({**asked, "model": _name_of(chosen, state.openai_serving_models)}).encode()


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
    here = Path(chosen.lora_path).resolve()
    served = models.lora_requests.items()
    found = next((name for name, one in served if Path(one.lora_path).resolve() == here), None)
    if found is None:
        raise ValueError(f"The LoRA in '{here}' is not served: name it among `--lora-modules`.")
    return str(found)
