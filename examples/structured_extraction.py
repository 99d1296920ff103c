"""Turn text into data: the reply is JSON that a schema admits, whatever the model.

python examples/structured_extraction.py smollm2.edgekit "Anna Meier ordered 3 lamps on 5 May; deliver to Zürich."
"""

import argparse
import json
import sys

import edgekit
from edgekit import JsonSchema

ORDER = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 40},
        "article": {"type": "string", "maxLength": 40},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 1000},
        "city": {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}]},
        "urgent": {"type": "boolean"},
    },
    "required": ["customer", "article", "quantity", "city", "urgent"],
    "additionalProperties": False,
}
TASK = "Extract the order from the text as JSON with the keys customer, article, quantity, city and urgent."


def main() -> int:
    """Extract, one JSON object a line; 1 if a reply was cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="made with `edgekit convert`")
    parser.add_argument("text", nargs="+", help="each is one order")
    parser.add_argument("--max-tokens", type=int, default=400, help="of a reply (%(default)s)")
    given = parser.parse_args()
    with edgekit.load(given.bundle) as model:
        session = model.session()  # the task is computed once, for all texts
        for text in given.text:
            messages = [{"role": "system", "content": TASK}, {"role": "user", "content": text}]
            reply = session.generate(messages, structure=JsonSchema(ORDER), max_tokens=given.max_tokens)
            if reply.finish_reason == "length":  # the one way in which JSON can be incomplete
                print(f"error: cut after {given.max_tokens} tokens: {reply.text}", file=sys.stderr)
                return 1
            print(json.dumps(json.loads(reply.text), ensure_ascii=False), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except edgekit.EdgeKitError as error:
        sys.exit(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
