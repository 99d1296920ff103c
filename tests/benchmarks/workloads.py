"""What the models are asked in `generate.py`: to copy, and to write freely. Not a benchmark itself."""

from __future__ import annotations

from typing import Any

LETTER = (
    "Dear Ms Hartmann,\n\n"
    "thank you for your order of 14 March. We are sorry to tell you that the oak table will be delivered two weeks later "
    "than planned, because the workshop in Bremen was flooded in the last days of February. The six chairs are ready and "
    "can be delivered on the agreed day. If you would rather receive everything together, please call us on 0421 555 0187 "
    "before Friday. As a small apology we will not charge you for the delivery, and we add a bottle of the oil that we "
    "recommend for the care of oiled surfaces.\n\n"
    "With kind regards,\nJonas Petersen"
)
NOTES = """Meeting notes, 3 June. Present: Alice Moreau (chair), Bob Tanaka, Carla Jimenez, David Okafor.
1. Budget: the board has approved 48,500 euros for the second phase. Carla Jimenez keeps the accounts.
2. Website: the new booking page goes online on 17 June. Bob Tanaka writes the text, David Okafor the pictures.
3. Summer party: Saturday 12 July, in the garden behind the library. Alice Moreau asks the neighbours for tables.
Next meeting: 1 July at 18:30 in room 204."""
FIELDS = """name: Katharina Lindqvist
street: 27 Harbour Road
city: Gothenburg
postal_code: 41118
country: Sweden
email: katharina.lindqvist@example.com
phone: +46 31 555 0142
customer_number: 8834-1129
member_since: 2019-04-23"""
FIELDS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {line.split(":")[0]: {"type": "string"} for line in FIELDS.splitlines()},
    "required": [line.split(":")[0] for line in FIELDS.splitlines()],
    "additionalProperties": False,
}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}
FULL_SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.02,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.2,
}

COPY_HEAVY = {
    "edit": "Correct the spelling mistakes in this letter and change nothing else. Answer with the whole letter.\n\n"
    + LETTER.replace("apology", "appology").replace("receive", "recieve"),
    "quote": f"Repeat the following text word for word:\n\n{LETTER}",
    "extract": f"{NOTES}\n\nCopy the numbered items of these notes word for word, one on a line.",
    "JSON": f"Write these fields as a JSON object. Keep every value exactly.\n\n{FIELDS}",
    "JSON, schema": f"Write these fields as a JSON object. Keep every value exactly.\n\n{FIELDS}",
}
FREE_TEXT = {
    "story": "Write a short story about a lighthouse keeper who finds a letter.",
    "explain": "Why is the sky blue? Explain it to a child.",
    "opinion": "What are the advantages and disadvantages of living in a small town?",
    "story, sampled": "Write a short story about a lighthouse keeper who finds a letter.",
    "plan, sampled": "Plan a three-day trip to the mountains for a family with two children.",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "JSON, schema": {"schema": FIELDS_SCHEMA},
    "story, sampled": SAMPLED,
    "plan, sampled": SAMPLED,
}
"""Options of EdgeKit's `generate` that go with a workload; peers run those that have none."""
QUESTIONS = ("Which of them did you like best, and why?", "Say it again in one sentence.")
