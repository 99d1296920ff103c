"""The whole loop over a real backend: structures, tools, reasoning, log-probabilities, drafts, several replies."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import edgekit
from edgekit.runtimes.engine import LoadedModel

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }} answer in <tool_call></tool_call><|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING_TEMPLATE = TOOL_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}") + (
    "{# the reply goes on up to </think> #}"
)


@pytest.fixture(scope="module")
def with_template(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny llama with another chat template, converted."""
    made: dict[str, Path] = {}

    def make(template: str) -> Path:
        if template not in made:
            folder = tmp_path_factory.mktemp("template")
            source = tiny_model("llama", max_position_embeddings=1024)
            for path in source.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            made[template] = folder / "made.edgekit"
            edgekit.convert(folder, target="linux-x86-64", quant="fp32", out=made[template], verify=False)
        return made[template]

    return make


@pytest.fixture
def tools_model(with_template: Any) -> Iterator[LoadedModel]:
    with edgekit.load(with_template(TOOL_TEMPLATE), threads=1) as model:
        yield model


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.5}])
def test_random_model_writes_what_a_schema_admits(options: dict[str, Any], llama: LoadedModel) -> None:
    for prompt in ("hello", "other"):
        reply = llama.generate(prompt, structure=edgekit.JsonSchema(PERSON), max_tokens=200, **options)
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text), PERSON)


def test_every_kind_of_structure_holds(llama: LoadedModel) -> None:
    assert re.fullmatch(r"\d{4}-\d\d", llama.generate("hi", structure=edgekit.Regex(r"\d{4}-\d\d")).text)
    assert llama.generate("hi", structure=edgekit.Choice(("red", "green"))).text in {"red", "green"}
    assert re.fullmatch("(ab)+!", llama.generate("hi", structure=edgekit.Lark('start: "ab"+ "!"'), max_tokens=100).text)


def test_structure_that_is_cut_says_length(llama: LoadedModel) -> None:
    reply = llama.generate("hi", structure=edgekit.Regex("x{100}"), max_tokens=10)
    assert (reply.finish_reason, reply.text) == ("length", "x" * 10)


def test_structure_that_is_too_complex_to_follow_is_an_error_and_no_reply(llama: LoadedModel) -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(800)}}
    with pytest.raises(edgekit.GenerationError, match="the JSON schema is too complex to follow"):
        llama.generate("hi", structure=edgekit.JsonSchema(schema), max_tokens=20)


def test_wrong_structure_is_refused_before_the_first_chunk(llama: LoadedModel) -> None:
    with pytest.raises(edgekit.GenerationError, match="regular expression"):
        llama.stream("hi", structure=edgekit.Regex("("))
    with pytest.raises(edgekit.GenerationError, match="stop texts"):
        llama.stream("hi", structure=edgekit.Regex("a"), stop="b")
    with pytest.raises(edgekit.GenerationError, match="min_tokens can't be used with a structure"):
        llama.stream("hi", structure=edgekit.Choice(("x",)), min_tokens=20)


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_random_model_calls_a_tool_that_it_must_call(choice: str, tools_model: LoadedModel) -> None:
    options: dict[str, Any] = {"tools": [WEATHER, TIME], "tool_choice": choice, "max_tokens": 300, "temperature": 1.0}
    for seed in range(3):
        chunks = list(tools_model.stream("How warm is it?", seed=seed, **options))
        calls = [call for chunk in chunks for call in chunk.tool_calls]
        if chunks[-1].finish_reason == "length":
            continue
        assert chunks[-1].finish_reason == "tool_calls"
        assert calls
        for call in calls:
            tool = WEATHER if call.name == "get_weather" else TIME
            assert choice in {"required", call.name}
            assert call.name == tool["function"]["name"]  # type: ignore[index]
            schema = tool["function"].get("parameters", {})  # type: ignore[attr-defined]
            jsonschema.validate(dict(call.arguments), schema)
        assert not "".join(chunk.text for chunk in chunks).strip()


def test_tools_are_shown_to_the_template_unless_the_choice_is_none(tools_model: LoadedModel) -> None:
    def prompt_tokens(**options: Any) -> int:
        return tools_model.generate("hi", max_tokens=1, **options).stats.prompt_tokens

    assert prompt_tokens() == prompt_tokens(tools=[TIME], tool_choice="none") < prompt_tokens(tools=[TIME])


def test_raw_prompts_take_no_tools(tools_model: LoadedModel) -> None:
    with pytest.raises(edgekit.GenerationError, match="chat template"):
        tools_model.stream("hi", raw=True, tools=[TIME])


def test_reasoning_is_apart_from_the_answer(with_template: Any) -> None:
    with edgekit.load(with_template(THINKING_TEMPLATE), threads=1) as model:
        end = edgekit.Lark('start: "I think.</think>" "\\n"* "yes"')
        reply = model.generate("hi", structure=edgekit.Choice(("yes", "no")), max_tokens=60, temperature=1.0, seed=1)
        raw = model.generate("<think>", raw=True, structure=end, max_tokens=60)
    assert reply.reasoning
    assert reply.finish_reason == "length" or reply.text in {"yes", "no"}
    assert (raw.text.startswith("I think.</think>"), raw.reasoning) == (True, ""), "a raw prompt has no template"


def transformers_logprobs(directory: Path, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-probabilities [tokens, vocabulary] of the next token after each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        rows: Any = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1).numpy()
    return np.asarray(rows)


def test_logprobs_are_those_of_transformers(llama: LoadedModel, tiny_model: Any) -> None:
    prompt = llama.token_ids("hello there", add_special_tokens=True)
    options: dict[str, Any] = {"temperature": 1.0, "seed": 2, "top_k": 5, "repetition_penalty": 1.5}
    reply = llama.generate("hello there", raw=True, max_tokens=20, logprobs=4, prompt_logprobs=2, **options)
    tokens = [*prompt, *reply.tokens]
    expected = transformers_logprobs(tiny_model("llama"), tokens)
    scores = (*reply.prompt_logprobs, *reply.logprobs)
    assert [score.token for score in scores] == tokens[1:]
    for row, score in zip(expected, scores, strict=False):
        assert score.logprob == pytest.approx(row[score.token], abs=1e-3)
        best = np.argsort(-row)[: len(score.alternatives)]
        assert [token for token, _ in score.alternatives] == list(best)
        assert [value for _, value in score.alternatives] == pytest.approx(list(row[best]), abs=1e-3)
    assert {len(score.alternatives) for score in reply.logprobs} == {4}
    assert {len(score.alternatives) for score in reply.prompt_logprobs} == {2}


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_perplexity_does_not_depend_on_chunks(
    chunk: int, llama: LoadedModel, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.runtimes.sequence.ROWS_CHUNK", chunk)
    text = "The lighthouse stands on a rock."
    tokens = llama.token_ids(text, add_special_tokens=True)
    rows = transformers_logprobs(tiny_model("llama"), tokens)
    mean = sum(row[token] for row, token in zip(rows, tokens[1:], strict=False)) / (len(tokens) - 1)
    assert llama.perplexity(text) == pytest.approx(math.exp(-mean), rel=1e-3)
    with pytest.raises(edgekit.GenerationError, match="one token"):
        llama.perplexity("x")


def test_logprobs_come_with_their_tokens(llama: LoadedModel) -> None:
    for chunk in llama.stream("hello", max_tokens=30, logprobs=0):
        assert tuple(score.token for score in chunk.logprobs) == chunk.tokens


def test_min_tokens_and_stop_tokens(llama: LoadedModel) -> None:
    tokens = llama.generate("hello", max_tokens=20).tokens
    end = tokens[3]
    ended = llama.generate("hello", max_tokens=20, stop_tokens=[end])
    assert (ended.finish_reason, ended.tokens) == ("stop", tokens[: tokens.index(end)])
    longer = llama.generate("hello", max_tokens=20, stop_tokens=[end], min_tokens=10)
    assert len(longer.tokens) >= 10
    with pytest.raises(edgekit.GenerationError, match="min_tokens is 21, expected at most max_tokens, 20"):
        llama.stream("hello", max_tokens=20, min_tokens=21)


@pytest.mark.parametrize("options", [{"logit_bias": {10**6: 1.0}}, {"stop_tokens": (10**6,)}])
def test_unknown_tokens_are_refused_before_the_first_chunk(options: dict[str, Any], llama: LoadedModel) -> None:
    with pytest.raises(edgekit.GenerationError, match=f"{next(iter(options))} holds the token 1000000"):
        llama.stream("hello", **options)


COPIES = ("ab" * 30, "one two three one two three one two three one two", "hello there")


@pytest.mark.parametrize("prompt", COPIES)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_drafts_change_no_token(prompt: str, model_type: str, converted: Any) -> None:
    config = {"head_dim": 32} if model_type != "llama" else {}
    with edgekit.load(converted(model_type, **config), threads=1, session_cache_bytes=0) as model:
        model.end_tokens = frozenset()
        plain = model.generate(prompt, max_tokens=150, speculate=False, logprobs=0)
        drafted = model.generate(prompt, max_tokens=150, logprobs=0)
    assert (drafted.tokens, drafted.text, drafted.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    assert [score.logprob for score in drafted.logprobs] == pytest.approx(
        [score.logprob for score in plain.logprobs], abs=1e-3
    )
    assert plain.stats.drafted_tokens == 0
    assert drafted.stats.decode_passes + drafted.stats.accepted_tokens >= plain.stats.decode_passes


@pytest.fixture
def eager_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if forwards of many rows cost nothing: then every match is drafted from."""
    monkeypatch.setattr("edgekit.runtimes.speculation.ForwardCosts.ratio", lambda self, rows: 1.0)
    monkeypatch.setattr("edgekit.runtimes.speculation.ForwardCosts.is_measured", True)


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("prompt", COPIES)
def test_rejected_drafts_leave_no_trace(prompt: str, llama: LoadedModel) -> None:
    llama.end_tokens = frozenset()
    session, plain_session = llama.session(), llama.session()
    drafted = session.generate(prompt, max_tokens=100)
    plain = plain_session.generate(prompt, max_tokens=100, speculate=False)
    assert drafted.stats.drafted_tokens > drafted.stats.accepted_tokens > 0
    assert drafted.stats.decode_passes == 99 - drafted.stats.accepted_tokens
    assert drafted.tokens == plain.tokens
    assert session.tokens == plain_session.tokens
    follow_ups = [one.generate("and now something else", max_tokens=20) for one in (session, plain_session)]
    assert follow_ups[0].tokens == follow_ups[1].tokens


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_drafts_keep_to_the_limits(max_tokens: int, converted: Any) -> None:
    with edgekit.load(converted("llama", context=64), threads=1, session_cache_bytes=0) as model:
        model.end_tokens = frozenset()
        for prompt in ("ab" * 20, "x" * (62 - max_tokens)):
            reply = model.generate(prompt, raw=True, max_tokens=max_tokens)
            assert (reply.finish_reason, len(reply.tokens)) == ("length", max_tokens)
            whole = model.generate(prompt, raw=True)
            assert len(whole.tokens) == 64 - len(prompt)
            assert whole.tokens == model.generate(prompt, raw=True, speculate=False).tokens


@pytest.mark.usefixtures("eager_drafts")
def test_drafts_within_a_structure(llama: LoadedModel) -> None:
    structure = edgekit.Regex("(one two three ){4}end")
    reply = llama.generate("one two three one two three", structure=structure, max_tokens=100)
    assert reply.text == "one two three " * 4 + "end"
    assert reply.stats.accepted_tokens > 0
    stopped = llama.generate("hello", max_tokens=60)
    stop = stopped.text[10:13]
    assert llama.generate("hello", max_tokens=60, stop=stop).text == stopped.text[: stopped.text.index(stop)]


@pytest.mark.usefixtures("eager_drafts")
def test_seed_gives_the_same_tokens_each_time(llama: LoadedModel) -> None:
    """Drafting depends on measured times, and rounding on what is computed together: with a seed, nothing is drafted."""
    options: dict[str, Any] = {"temperature": 0.7, "max_tokens": 60}
    first, second = (llama.generate("ab" * 20, seed=3, **options) for _ in range(2))
    assert first.tokens == second.tokens
    assert first.stats.drafted_tokens == 0
    assert llama.generate("ab" * 20, **options).stats.drafted_tokens > 0


def test_many_replies_to_one_prompt(llama: LoadedModel) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 12, "logprobs": 1}
    replies = llama.generate_many("hello there", 4, **options)
    assert replies == llama.generate_many("hello there", 4, **options) or [r.tokens for r in replies] == [
        r.tokens for r in llama.generate_many("hello there", 4, **options)
    ]
    assert len({reply.tokens for reply in replies}) > 1
    assert [reply.stats.cached_tokens for reply in replies] == [0] + [replies[0].stats.prompt_tokens] * 3
    assert llama.generate_many("hello there", 2, **options)[1].tokens == replies[1].tokens
    greedy = llama.generate_many("hello there", 3, max_tokens=12)
    assert {reply.tokens for reply in greedy} == {llama.generate("hello there", max_tokens=12).tokens}
    with pytest.raises(edgekit.GenerationError, match="n is 0"):
        llama.generate_many("hello", 0)


def test_times_of_many_replies_are_their_own(llama: LoadedModel) -> None:
    started = time.perf_counter()
    replies = llama.generate_many("hello there", 6, max_tokens=12)
    assert sum(reply.stats.ttft_s for reply in replies) <= time.perf_counter() - started


def test_many_replies_repeat_the_prompts_logprobs(llama: LoadedModel) -> None:
    replies = llama.generate_many("hello", 2, max_tokens=2, prompt_logprobs=1)
    assert replies[0].prompt_logprobs == replies[1].prompt_logprobs
    assert len(replies[0].prompt_logprobs) == replies[0].stats.prompt_tokens - 1


def test_many_replies_across_the_rotary_switch(long_rope_bundle: Path) -> None:
    with edgekit.load(long_rope_bundle, threads=1, session_cache_bytes=0) as model:
        one = model.generate("ab" * 12, raw=True, max_tokens=30)
        assert all(reply.tokens == one.tokens for reply in model.generate_many("ab" * 12, 3, raw=True, max_tokens=30))


@pytest.mark.usefixtures("eager_drafts")
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_text_that_a_structure_demands_is_drafted(options: dict[str, Any], llama: LoadedModel) -> None:
    names = [f"a_rather_long_name_{number}" for number in range(3)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    drafted = llama.generate("hi", structure=edgekit.JsonSchema(schema), max_tokens=200, **options)
    assert drafted.finish_reason == "stop"
    jsonschema.validate(json.loads(drafted.text), schema)
    assert drafted.stats.decode_passes < drafted.stats.new_tokens / 4, "a token is a byte, and most are demanded"
    if not options:
        plain = llama.generate("hi", structure=edgekit.JsonSchema(schema), max_tokens=200, speculate=False)
        assert drafted.tokens == plain.tokens
