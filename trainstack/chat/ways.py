"""The ways to hand over a conversation: templates do not agree on the shape that they read."""

import json
import re
from collections.abc import Iterator

READS_THOUGHTS = re.compile(r"reasoning|\bthinking\b")


def variants(
    messages: list[dict], tools: list | None, template: str
) -> Iterator[tuple[list[dict], list | None]]:
    """The messages and tools of each way, in the order in which they are tried."""
    ways = [messages]
    if any(message.get("role") == "developer" for message in messages):
        ways.append([*map(system_for_developer, messages)])
    if any(message.get("tool_calls") for message in messages):
        ways += [[*map(arguments_as_text, way)] for way in ways]
    has_thoughts = any("reasoning_content" in message for message in messages)
    if has_thoughts and "</think>" in template and not READS_THOUGHTS.search(template):
        ways += [[*map(thoughts_in_tags, way)] for way in ways]
    yield from ((way, tools) for way in ways)
    if not tools:
        yield from ((way, []) for way in ways)
    yield [*map(content_as_parts, messages)], tools


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
    parts = [{"type": "text", "text": content}]
    return {**message, "content": parts} if isinstance(content, str) else message
