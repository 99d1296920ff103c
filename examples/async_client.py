"""Several questions at once, streamed from one server, with OpenAI's asynchronous client.

edgekit serve smollm2.edgekit &
python examples/async_client.py "Why is the sky blue?" "What is a prime number?"
"""

import argparse
import asyncio
import time

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, question: str, max_tokens: int) -> str:
    """The answer, and when its first text and its last came."""
    started, first, answer = time.perf_counter(), 0.0, ""
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=max_tokens,
        stream=True,
    )
    async for chunk in stream:
        first = first or time.perf_counter() - started
        answer += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    return f"{question}\n{answer.strip()}\n[first text after {first:.2f} s, all after {time.perf_counter() - started:.2f} s]\n"


async def main() -> None:
    """Ask all, print each answer when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="+", help="all are asked at once")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="of the server (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer (%(default)s)")
    given = parser.parse_args()
    async with AsyncOpenAI(base_url=given.url, api_key="none") as client:
        model = (await client.models.list()).data[0].id
        for answer in asyncio.as_completed([ask(client, model, text, given.max_tokens) for text in given.question]):
            print(await answer, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
