"""Who passes the gate of the OpenAI server, and what it asks the engine: with an app and an engine that stand in."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make serve-test")

import httpx
from fastapi import FastAPI
from PIL import Image
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.request import LoRARequest

from peft_many import export_lora
from peft_many.serving.gate import as_file
from peft_many.serving.middleware import GateMiddleware, check_gate
from tests.serving.worlds import Served

MOST = 3
EXTENSION = "peft_many.serving.gate.RoutingWorker"
URL = f"data:image/png;base64,{base64.b64encode(as_file(Image.new('RGB', (8, 8)))).decode()}"
OTHER = f"data:image/png;base64,{base64.b64encode(as_file(Image.new('RGB', (9, 8)))).decode()}"
KEY = {"Authorization": "Bearer secret"}


class Engine:
    """Counts the images that its workers are asked to encode, and finds them like the second task's."""

    def __init__(self, merged, extension=EXTENSION):
        multimodal = SimpleNamespace(get_limit_per_prompt=lambda modality: MOST, media_io_kwargs={})
        model = SimpleNamespace(multimodal_config=multimodal, allowed_local_media_path="", allowed_media_domains=None)
        self.vllm_config = SimpleNamespace(
            additional_config={"peft_many": str(merged)},
            parallel_config=SimpleNamespace(worker_extension_cls=extension),
            model_config=model,
        )
        self.asked, self.fails = [], False

    async def collective_rpc(self, name, args):
        self.asked.append(len(args[0]))
        if self.fails:
            raise RuntimeError("cannot be processed")
        return [[0.0, 1.0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A merge and its exported LoRAs."""
    root = tmp_path_factory.mktemp("middleware")
    merged = Served(root / "llava", "llava", tasks="ab").merge("ab", root / "merged", gate_lora=True)
    return merged, export_lora(merged, root / "loras", with_tasks=True).folder


def state_of(merged, loras, extension=EXTENSION, tasks=("task_0", "task_1")):
    folders = {"merged": loras, **{f"my {task}": loras / task for task in tasks}}
    served = {name: LoRARequest(name, n + 1, str(folder)) for n, (name, folder) in enumerate(folders.items())}
    return SimpleNamespace(
        args=SimpleNamespace(api_key=["secret"]),
        engine_client=Engine(merged, extension),
        openai_serving_models=SimpleNamespace(lora_requests=served, base_model_paths=[SimpleNamespace(name="base")]),
    )


def app_of(state) -> FastAPI:
    """As vLLM builds it: what was named as `--middleware` is outside of the one that asks for the key."""
    app = FastAPI()
    for name, value in vars(state).items():
        setattr(app.state, name, value)

    @app.post("/v1/chat/completions")
    async def chat(request: dict) -> str:
        return request["model"]

    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    app.add_middleware(GateMiddleware)
    return app


def ask(state, urls, method="POST", path="/v1/chat/completions", headers=KEY, model="merged"):
    """The status, the model that was asked in the end, and how many images the gate had encoded."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = {"model": model, "messages": [{"role": "user", "content": parts}]}

    async def request():
        transport = httpx.ASGITransport(app=app_of(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, json=content, headers=headers)

    answer = asyncio.run(request())
    return answer.status_code, answer.json() if answer.status_code == 200 else None, state.engine_client.asked


def test_a_chat_gets_the_lora_of_its_task(made):
    assert ask(state_of(*made), [URL, OTHER, URL]) == (200, "my task_1", [3])
    assert ask(state_of(*made), []) == (200, "merged", [])
    assert ask(state_of(*made), [URL], model="my task_0") == (200, "my task_0", [])


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/chat/completions", {}, 401),
        ("POST", "/x/chat/completions", {}, 404),
        ("POST", "/x/chat/completions", KEY, 404),
        ("OPTIONS", "/v1/chat/completions", {}, 405),
    ],
)
def test_nobody_has_images_encoded_without_the_key(made, method, path, headers, status):
    assert ask(state_of(*made), [URL], method, path, headers) == (status, None, [])


def test_more_images_than_the_server_takes_are_not_fetched(made):
    nowhere = [f"http://localhost:1/{n}.png" for n in range(MOST + 1)]
    assert ask(state_of(*made), nowhere) == (200, "merged", [])  # the real server refuses it


def test_what_the_gate_cannot_read_is_left_to_the_server(made):
    state = state_of(*made)
    state.engine_client.fails = True
    assert ask(state, [URL]) == (200, "merged", [1])
    assert ask(state_of(*made), ["data:image/png;base64,AAAA"]) == (200, "merged", [])


def test_a_body_comes_in_pieces(made):
    pieces = [b'{"model": "none", "messages": [', b" " * 65536, b"]}"]
    waiting, seen = iter(pieces), []

    async def app(scope, receive, send):
        seen.append(await receive())

    async def receive():
        piece = next(waiting)
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    scope = {"headers": [], "app": SimpleNamespace(state=state_of(*made))}
    asyncio.run(GateMiddleware(app)._gate(scope, receive, None))
    assert seen == [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]


def test_a_server_that_could_not_gate_does_not_start(made, tmp_path):
    check_gate(state_of(*made))
    with pytest.raises(ValueError, match=r'need `worker_extension_cls="peft_many\.serving\.gate\.RoutingWorker"`'):
        check_gate(state_of(*made, extension=""))
    with pytest.raises(
        ValueError, match=r"may choose the LoRA of the task 'b', which is not served: add `NAME=.*task_1`"
    ):
        check_gate(state_of(*made, tasks=("task_0",)))
    merged, loras = made
    with pytest.raises(
        ValueError, match=r"none of `--lora-modules` is the folder of a merge's LoRA with those of its"
    ):
        check_gate(state_of(merged, tmp_path))
    other = json.loads((loras / "tasks.json").read_text())[::-1]
    (tmp_path / "task_0").mkdir()
    (tmp_path / "task_1").mkdir()
    (tmp_path / "tasks.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"are not those of the tasks of the merge in .*: export them again"):
        check_gate(state_of(merged, tmp_path))
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "lifespan", "app": SimpleNamespace(state=state_of(merged, tmp_path))}
    asyncio.run(GateMiddleware(None)(scope, None, send))
    assert sent[0]["type"] == "lifespan.startup.failed"
    assert "are not those of the tasks of the merge" in sent[0]["message"]
