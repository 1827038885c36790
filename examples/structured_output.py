"""Outputs of a given form: a JSON schema, a regular expression, a choice, a grammar.

Run: python examples/structured_output.py
"""

import json

from jaxengine import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 30},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
SUM = """
start: NUMBER (" + " NUMBER){1,3}
NUMBER: /[1-9][0-9]?/
"""


def ask(llm: LLM, question: str, form: StructuredOutputsParams) -> str:
    """Returns the answer to a question, in a given form."""
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=form)
    return llm.chat([{"role": "user", "content": question}], params)[0].outputs[0].text


with LLM() as llm:
    # Without spaces between its parts, JSON is shorter, and a small model cannot lose itself in them.
    pet = json.loads(ask(llm, "Describe a pet.", StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)))
    print(f"a {pet['kind']} called {pet['name']!r}, {pet['age']} years old")

    print(
        "a date:",
        ask(llm, "When did the war end?", StructuredOutputsParams(regex=r"[12][0-9]{3}-[01][0-9]-[0-3][0-9]")),
    )
    print("a choice:", ask(llm, "I love this film!", StructuredOutputsParams(choice=["positive", "negative"])))
    print("a sum:", ask(llm, "Write a sum.", StructuredOutputsParams(grammar=SUM)))
