"""`vllm serve` in processes of its own: whoever asks for the merge gets the LoRA that its images choose."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make serve-test")

from peft_many import export_lora
from peft_many.serving.gate import as_file
from peft_many.serving.middleware import _image_urls
from tests.serving.worlds import Served

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image> {% endif %}{% endfor %}{% endfor %}"
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Other tests of this process say otherwise of these two.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def serving(model, log, *options):
    """The address of a server, with the key "secret", while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--api-key", "secret", *map(str, options)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | ENVIRONMENT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-5000:]
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def answer(address, model, words, images, key="secret"):
    """The tokens, and the model that answered."""
    urls = [f"data:image/png;base64,{base64.b64encode(as_file(image)).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = {
        "model": model,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        said = json.load(response)
    return said["choices"][0]["token_ids"], said["model"]


@pytest.mark.parametrize("by", ["images", "both"])
def test_the_gate_in_the_server(tmp_path, by):
    served = Served(tmp_path / "llava", "llava")
    merged = served.merge("ab", tmp_path / "merged", gate_lora=True, gate_by=by)
    loras = export_lora(merged, tmp_path / "loras", with_tasks=True).folder
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
    options += ["--enable-lora", "--max-loras", "3", "--max-lora-rank", "8", "--chat-template", TEMPLATE]
    options += ["--lora-modules", f"merged={loras}", f"first={loras}/task_0", f"second={loras}/task_1"]
    options += ["--limit-mm-per-prompt", '{"image": 2}', "--additional-config", json.dumps({"peft_many": str(merged)})]
    options += ["--worker-extension-cls", "peft_many.serving.gate.RoutingWorker"]
    options += ["--middleware", "peft_many.serving.middleware.GateMiddleware"]
    with serving(served.base, tmp_path / "log", *options) as address:
        found = [answer(address, "merged", words, images) for words, images in served.prompts()]
        assert [tokens for tokens, _ in found] == served.expected(merged)
        assert {model for _, model in found} == {"first", "second", *(["merged"] if by == "images" else [])}
        words, images = served.prompts()[3]
        assert answer(address, "second", words, images)[1] == "second"  # nobody else is gated
        with pytest.raises(urllib.error.HTTPError, match="401"):
            answer(address, "merged", words, images, key="none")
    assert "Images are routed among the projectors of the tasks a, b" in (tmp_path / "log").read_text()


IMAGE = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"image_url": {"url": IMAGE}},
        {"image_url": IMAGE},
        {"type": "input_image", "image_url": IMAGE},
    ],
)
def test_images_are_seen_in_all_forms_that_vllm_takes(part):
    called = {"role": "assistant", "tool_calls": []}
    messages = [
        {"role": "user", "content": [part, "what is it?", {"type": "text", "text": "and?"}, {"text": "?"}]},
        called,
    ]
    assert _image_urls(messages) == [IMAGE]
