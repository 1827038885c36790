"""Holds a conversation of two turns, printing the second answer as it is generated.

Run: python examples/chat.py
"""

from jaxengine import LLM, RequestOutputKind, SamplingParams
from jaxengine.engine.chat import render_chat
from jaxengine.engine.inputs import Prompt

with LLM() as llm:
    messages = [
        {"role": "system", "content": "You are a helpful assistant. You answer briefly."},
        {"role": "user", "content": "Name a planet."},
    ]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32))
    print(output.outputs[0].text)

    messages += [
        {"role": "assistant", "content": output.outputs[0].text},
        {"role": "user", "content": "Tell me more about it."},
    ]
    # `LLM.chat` returns when all is done. Whoever wants to see the tokens as they come steps the engine.
    engine = llm.llm_engine
    prompt = Prompt(text=render_chat(llm.get_tokenizer(), messages), add_special_tokens=False)
    params = SamplingParams(temperature=0, max_tokens=48, output_kind=RequestOutputKind.DELTA)
    engine.add_request("second turn", prompt, params)
    while engine.has_unfinished_requests():
        for delta in engine.step():
            print(delta.outputs[0].text, end="", flush=True)
    print()
