"""A real server on a real socket, with tiny seeded models, and the `openai` package as its client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Running:
    """A server that listens."""

    url: str
    port: int
    server: Server

    def client(self, **options: Any) -> openai.OpenAI:
        """A client that does not try again."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def health(self) -> dict[str, Any]:
        """What /health says."""
        import json
        from urllib.request import urlopen

        with urlopen(f"{self.url}/health") as response:
            body: dict[str, Any] = json.load(response)
            return body


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a long context. Not to be changed."""
    out = tmp_path_factory.mktemp("bundles") / "tiny.edgekit"
    source = tiny_model("llama", max_position_embeddings=LONG_CONTEXT)
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
