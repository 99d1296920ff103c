"""Talk with a model: each line is a message, the end of the input ends it.

python examples/chat.py smollm2.edgekit --system "You answer in one sentence."
"""

import argparse
import sys

import edgekit
from edgekit.session import Message


def main() -> None:
    """Read lines, stream answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="made with `edgekit convert`")
    parser.add_argument("--system", help="how the model shall behave")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the most probable token (%(default)s)"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same answers")
    given = parser.parse_args()
    options = {"max_tokens": given.max_tokens, "temperature": given.temperature, "top_p": 0.9, "seed": given.seed}
    messages: list[Message] = [{"role": "system", "content": given.system}] if given.system else []
    with edgekit.load(given.bundle) as model:
        session = model.session()  # keeps its cache: each turn computes only what is new
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = ""
            # what no longer fits the context is left out from the oldest turn on, and the result says so
            for chunk in session.stream(messages, context_policy="drop-oldest-turns", **options):
                print(chunk.text, end="", flush=True)
                answer += chunk.text
            messages.append({"role": "assistant", "content": answer})
            print()
            if chunk.stats is not None and chunk.stats.dropped_messages:
                print(f"[{len(chunk.stats.dropped_messages)} old messages left out]", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except edgekit.EdgeKitError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
