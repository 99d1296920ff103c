"""A real server on a real socket, with tiny seeded models, and the `openai` package as its client."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest

import edgekit
from edgekit.runtimes.engine import LoadedModel
from edgekit.runtimes.server.app import Service
from edgekit.runtimes.server.models import ServedModel
from edgekit.runtimes.server.serve import Server, base_url, listen
from edgekit.runtimes.server.settings import Settings

END_TOKEN = 257
NEVER_ENDS = {str(END_TOKEN): -100}  # as logit_bias
LONG_CONTEXT = 4096
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}\n<tool_call>\n{...}\n</tool_call><|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    url: str
    port: int
    server: Server

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that does not try again."""
        defaults: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return openai.OpenAI(**defaults | options)

    def health(self) -> dict[str, Any]:
        """What /health says."""
        with urlopen(f"{self.url}/health") as response:
            body: dict[str, Any] = json.load(response)
            return body


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a long context and a template that takes tools. Not to be changed."""
    directory = tmp_path_factory.mktemp("tiny")
    source = Path(shutil.copytree(tiny_model("llama", max_position_embeddings=LONG_CONTEXT), directory / "source"))
    settings = source / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) | {"chat_template": TEMPLATE}
    settings.write_text(json.dumps(content), encoding="utf-8")
    out = directory / "tiny.edgekit"
    edgekit.convert(source, target="linux-x86-64", quant="fp32", context=LONG_CONTEXT, out=out)
    return out


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> Iterator[LoadedModel]:
    """The same, loaded."""
    with edgekit.load(tiny_bundle, threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def start(model: LoadedModel) -> Start:
    """`with start(slots=2) as running`: a server of its own, with these settings."""

    @contextmanager
    def running(**settings: Any) -> Iterator[Running]:
        chosen = Settings(**settings)
        service = Service({"tiny": ServedModel("tiny", model, 0)}, chosen)
        server = Server(service, chosen)
        with listen("127.0.0.1", 0) as listener:
            url, port = base_url(listener), listener.getsockname()[1]
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield Running(url, port, server)
            finally:
                server.should_exit = True
                thread.join()
                service.close()

    return running


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Running]:
    """A server for all tests of a module that leave it as it was."""
    with start(grace_s=0) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    """Its client."""
    with running.client() as client:
        yield client


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for something that will come, however busy the machine is."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
