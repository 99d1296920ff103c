"""Saved, restored, forked and rewound sessions go on as if nothing had happened; files that are not ours are refused."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.runtimes.engine import LoadedModel

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.5 + 0.7 * index for index in range(8)],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 16}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}),
}
QUESTION = [{"role": "user", "content": "hello there"}]


@pytest.fixture(params=MODELS)
def any_model(request: pytest.FixtureRequest, converted: Any) -> Iterator[LoadedModel]:
    model_type, config = MODELS[request.param]
    with edgekit.load(converted(model_type, **config), threads=2, session_cache_bytes=0) as model:
        yield model


def go_on(session: Any, first: edgekit.Reply) -> edgekit.Reply:
    messages = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
    reply: edgekit.Reply = session.generate(messages, max_tokens=24)
    return reply


def test_copies_go_on_as_the_original(any_model: LoadedModel, tmp_path: Path) -> None:
    session = any_model.session()
    first = session.generate(QUESTION, max_tokens=12)
    session.save(tmp_path / "a.session")
    forked, restored = session.fork(), any_model.restore(tmp_path / "a.session")
    assert forked.tokens == restored.tokens == session.tokens
    expected = go_on(session, first)
    for other in (forked, restored):
        reply = go_on(other, first)
        assert (reply.tokens, reply.stats.cached_tokens) == (expected.tokens, expected.stats.cached_tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["a.session"]


def test_rewound_session_goes_on_from_there(any_model: LoadedModel) -> None:
    session = any_model.session()
    first = session.generate(QUESTION, max_tokens=12)
    go_on(session, first)
    session.rewind(first.stats.prompt_tokens)
    assert len(session.tokens) == first.stats.prompt_tokens
    assert session.generate(QUESTION, max_tokens=12).tokens == first.tokens
    session.rewind(3)
    assert session.generate("other", max_tokens=12).tokens == any_model.generate("other", max_tokens=12).tokens


def test_fork_shares_nothing(llama: LoadedModel) -> None:
    session = llama.session()
    first = session.generate(QUESTION, max_tokens=12)
    before, forked = session.tokens, session.fork()
    forked.generate("something else that is longer than the first", max_tokens=30)
    assert session.tokens == before
    session.close()
    assert go_on(forked, first).tokens == go_on(llama.session(), first).tokens


@pytest.mark.parametrize("length", [-1, 100])
def test_rewind_beyond_what_there_is_is_refused(length: int, llama: LoadedModel) -> None:
    session = llama.session()
    session.generate("hello", max_tokens=4)
    with pytest.raises(edgekit.GenerationError, match=f"can't rewind to {length} of"):
        session.rewind(length)


def test_empty_session_can_be_saved(llama: LoadedModel, tmp_path: Path) -> None:
    llama.session().save(tmp_path / "empty")
    restored = llama.restore(tmp_path / "empty")
    assert restored.tokens == ()
    assert restored.generate("hello", max_tokens=8).tokens == llama.generate("hello", max_tokens=8).tokens


@pytest.fixture
def saved(llama: LoadedModel, tmp_path: Path) -> Path:
    session = llama.session()
    session.generate(QUESTION, max_tokens=12)
    session.save(tmp_path / "a.session")
    return tmp_path / "a.session"


def test_state_of_another_bundle_is_refused(saved: Path, converted: Any) -> None:
    with (
        edgekit.load(converted("llama", quant="int8")) as other,
        pytest.raises(edgekit.GenerationError, match="of another bundle"),
    ):
        other.restore(saved)


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The file with another header, and the right hash: as somebody makes it who means it."""

    def edit(data: bytes) -> bytes:
        size = int.from_bytes(data[8:16], "little")
        header = json.loads(data[16 : 16 + size])
        header = change(header) or header
        text = json.dumps(header).encode()
        body = data[:8] + len(text).to_bytes(8, "little") + text + data[16 + size : -32]
        return body + hashlib.sha256(body).digest()

    return edit


def set_to(key: str, value: object) -> Callable[[bytes], bytes]:
    return edit_header(lambda header: header | {key: value})


def retoken(data: bytes) -> bytes:
    start = 16 + int.from_bytes(data[8:16], "little")
    body = data[:start] + (10**6).to_bytes(4, "little") + data[start + 4 : -32]
    return body + hashlib.sha256(body).digest()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "another file": lambda data: b"PK\x03\x04" + data,
    "cut in the header": lambda data: data[:40],
    "cut in the cache": lambda data: data[:-1000],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "one bit": lambda data: data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:],
    "header longer than the file": lambda data: data[:8] + (2**40).to_bytes(8, "little") + data[16:],
    "header that is no JSON": lambda data: data[:16] + b"\xff" + data[17:],
    "header nested too deep": lambda data: data[:8] + (60000).to_bytes(8, "little") + b"[" * 60000 + data,
    "header that is a list": edit_header(lambda header: [header]),
    "other version": set_to("format_version", 2),
    "more keys": set_to("more", 1),
    "text for a number": set_to("tokens", "16"),
    "truth for a number": set_to("forgotten", True),
    "no tokens": set_to("tokens", 0),
    "negative tokens": set_to("tokens", -1),
    "tokens beyond memory": set_to("tokens", 2**62),
    "more tokens than the context": set_to("tokens", 257),
    "forgotten without a window": set_to("forgotten", 4),
    "negative forgotten": set_to("forgotten", -4),
    "rotation that there is not": set_to("long_rope", True),
    "token beyond the vocabulary": retoken,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(case: str, saved: Path, llama: LoadedModel) -> None:
    saved.write_bytes(DAMAGE[case](saved.read_bytes()))
    with pytest.raises(edgekit.GenerationError, match=r"a\.session") as raised:
        llama.restore(saved)
    assert raised.value.hint
    assert "\n" not in raised.value.message


def test_no_damage_gets_through(saved: Path, llama: LoadedModel) -> None:
    whole, chance = saved.read_bytes(), random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if data != whole:
            saved.write_bytes(data)
            with pytest.raises(edgekit.GenerationError):
                llama.restore(saved)


def test_missing_file_and_directory_are_refused(llama: LoadedModel, tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(edgekit.GenerationError, match="can't be read"):
            llama.restore(path)
    with pytest.raises(edgekit.GenerationError, match="can't be saved"):
        llama.session().save(tmp_path / "no" / "such" / "directory")


def test_interrupted_save_leaves_the_old_file(saved: Path, llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgekit.runtimes.session_file.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llama.session().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.slow
def test_sample_goes_on_as_the_original(sample_gguf: Path, tmp_path: Path) -> None:
    edgekit.convert("sample", target="raspberry-pi-5", out=tmp_path / "sample.edgekit", verify=False)
    with edgekit.load(tmp_path / "sample.edgekit", session_cache_bytes=0) as model:
        session = model.session()
        first = session.generate(QUESTION, max_tokens=40, speculate=False)
        session.save(tmp_path / "a.session")
        others = [session.fork(), model.restore(tmp_path / "a.session"), session]
        messages = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "go on"}]
        replies = [other.generate(messages, max_tokens=40, speculate=False) for other in others]
    assert len({reply.tokens for reply in replies}) == 1
