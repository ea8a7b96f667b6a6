"""The ways to hand over a conversation: templates do not agree on the shape that they read."""

import json
import re
from collections.abc import Iterator

READS_THOUGHTS = re.compile(r"reasoning|\bthinking\b")


def variants(
    messages: list[dict], tools: list | None, template: str
) -> Iterator[tuple[list[dict], list | None]]:
    """The ways to hand over the same conversation; templates do not agree on what they read."""
    ways = [messages]
    if any(message.get("role") == "developer" for message in messages):
        ways.append([system_for_developer(message) for message in messages])
    if any(message.get("tool_calls") for message in messages):
        ways += [[arguments_as_text(message) for message in way] for way in ways]
    has_thoughts = any("reasoning_content" in message for message in messages)
    if has_thoughts and "</think>" in template and not READS_THOUGHTS.search(template):
        ways += [[thoughts_in_tags(message) for message in way] for way in ways]
    for way in ways:
        yield way, tools
    if not tools:
        for way in ways:
            yield way, []
    yield [content_as_parts(message) for message in messages], tools


def system_for_developer(message: dict) -> dict:
    """OpenAI's developer is what others call system."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def thoughts_in_tags(message: dict) -> dict:
    """Thoughts as templates expect them that look for tags in the content."""
    thoughts, content = message.get("reasoning_content"), message.get("content")
    if not thoughts or not isinstance(content, str | None):
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": f"<think>\n{thoughts}\n</think>\n\n{content or ''}"}


def arguments_as_text(message: dict) -> dict:
    """Arguments of tool calls as JSON, which is how they come from OpenAI's interface."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        if not isinstance(function.get("arguments"), str | None):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def content_as_parts(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}
