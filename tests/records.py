"""Records of each format of data, and a chat template that says what of them is learned."""

import random

import tiny

TEMPLATE = (  # the end of the assistant's turn is learned, what a user says is not
    "{% for m in messages %}{{ m['role'] + ' ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' <|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ ' ' }}{% endfor %}"
)


def counting(generator: random.Random, longest: int) -> str:
    first = generator.randrange(10)
    words = range(first, first + generator.randrange(2, longest))
    return " ".join(tiny.WORDS[word % 10] for word in words)


def record(name: str, generator: random.Random) -> dict:
    """A record of a format: one counts, the other continues to count."""
    asked, said = counting(generator, 9), counting(generator, 15)
    if name == "text":
        return {"text": f"{asked} {said}"}
    if name == "prompt_completion":
        return {"prompt": asked, "completion": said}
    if name == "alpaca":
        return {"instruction": "count", "input": asked, "output": said}
    if name == "sharegpt":
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        return {"conversations": turns * generator.randrange(1, 3)}
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns * generator.randrange(1, 3)}
