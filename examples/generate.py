"""The Python API: an answer, then a conversation as it is written. The bundle comes from examples/quickstart.py."""

import io
import sys

import edgekit

if isinstance(sys.stdout, io.TextIOWrapper):  # Windows' code pages lack much of what models write
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
with edgekit.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2.edgekit") as model:
    reply = model.generate("What is the capital of France? Answer in one sentence.", max_tokens=48)
    print(f"{reply.text} [{reply.finish_reason}, {reply.stats.decode_tokens_per_s:.0f} tokens/s]")

    session = model.session()  # its cache stays: each turn computes only what is new
    messages = [{"role": "system", "content": "You answer in one sentence."}]
    for question in ("Why is the sky blue?", "And why is it red in the evening?"):
        messages.append({"role": "user", "content": question})
        answer = ""
        for chunk in session.stream(messages, max_tokens=64, temperature=0.7, top_p=0.9, seed=1):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
        messages.append({"role": "assistant", "content": answer})
        print()
