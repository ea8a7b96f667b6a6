"""The messages of a record in one shape, whatever its roles and columns are called.

The shape is that of OpenAI's interface, which chat templates read: role, content, tool_calls with
a function's name and arguments, reasoning_content.
"""

import json
from typing import Any

from trainstack.errors import DataError, shown

ROLES = {  # of ShareGPT, LLaMA-Factory, OpenAssistant, older interfaces of OpenAI, Gemma, Llama
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "ai": "assistant", "model": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLES = ("function_call", "tool_call")  # their text is a call, as JSON
KNOWN_KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}
MARKS = (  # of a turn: whether it is learned
    "weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight",
)  # fmt: skip
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")


def messages_of(location: str, turns: Any, column: str) -> tuple[list[dict], list[bool]]:
    """The messages of a list of turns, and whether each may be learned. DataError with the turn.

    A turn has role and content, or from and value.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        found, fix = f"a {type(turns).__name__}", "[{role, content}]"
        if isinstance(turns, str):
            found, fix = f"a text that is no JSON ({shown(turns)})", "it as json.dumps does"
        elif isinstance(turns, dict):
            found = f"an object with {', '.join(map(str, turns)) or 'nothing'}"
        elif isinstance(turns, list):
            odd = next(turn for turn in turns if not isinstance(turn, dict))
            found = f"a list with {shown(odd)}"
        raise DataError(f"{location}: no list of messages in {column} but {found}; write {fix}")
    messages, marks = [], []
    for number, turn in enumerate(turns, start=1):
        try:
            message, is_learned = message_of(turn)
        except ValueError as error:
            raise DataError(f"{location}: message {number} of {column} {error}") from None
        if messages and is_call(turn) and messages[-1]["role"] == "assistant":  # of one turn
            earlier = messages[-1].get("tool_calls", [])
            messages[-1]["tool_calls"] = [*earlier, *message["tool_calls"]]
            marks[-1] = marks[-1] and is_learned
            continue
        messages.append(message)
        marks.append(is_learned)
    return messages, marks


def turns_in(value: Any) -> Any:
    """The turns of a conversation, which may be JSON, whole or each, as in a .csv.

    Or an object with a list for each key, as the library datasets makes of a list of objects.
    """
    value = decoded(value)
    lists = [*value.values()] if isinstance(value, dict) else []
    lengths = {len(found) if isinstance(found, list) else -1 for found in lists}
    if len(lists) > 1 and len(lengths) == 1 and -1 not in lengths:
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*lists, strict=True)]
    return [*map(decoded, value)] if isinstance(value, list) else value


def is_call(turn: dict) -> bool:
    """Whether a turn is one tool call, as LLaMA-Factory writes them."""
    who = turn.get("role") or turn.get("from")
    return isinstance(who, str) and who.lower() in CALL_ROLES


def message_of(turn: dict) -> tuple[dict, bool]:
    """A turn as a message, and whether it may be learned; ValueError says what is wrong with it."""
    message = {key: value for key, value in turn.items() if value is not None}
    who = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if not isinstance(who, str):
        has = ", ".join(map(str, turn))
        fix = "say which it is: data.columns.role=ITS_KEY"
        raise ValueError(f"has no role; the turn has: {has}; {fix}")
    role = ROLES.get(who.lower(), who.lower() if who.lower() in KNOWN_ROLES else who)
    is_learned = learned_mark(message)
    thoughts = [message.pop(key) for key in THOUGHTS if key in message]
    text, thought = text_of(content)
    calls = calls_of(message)
    if who.lower() in CALL_ROLES:
        own = {key: message.pop(key) for key in ("name", "arguments") if key in message}
        text, calls = "", [*calls, *calls_in(own if text is None else from_json(text, who))]
    if text is None and not calls and not (thoughts or thought):
        others = ", ".join(key for key in turn if key not in ("role", "from", "content", "value"))
        way = f", or say which of {others} it is: data.columns.content=ITS_KEY"
        raise ValueError(f"has no content; write a text{way if others else ''}")
    message = {"role": role, "content": text or "", **message}
    if calls:
        message["tool_calls"] = calls
    thoughts = {t.strip() if isinstance(t, str) else str(t or ""): t for t in (*thoughts, thought)}
    said = [thought for text, thought in thoughts.items() if text]
    if len(said) > 1 or not all(isinstance(thought, str) for thought in said):
        raise ValueError("has thoughts that are not one text; write them as reasoning_content")
    if said:
        message["reasoning_content"] = said[0]
    return message, is_learned


def learned_mark(message: dict) -> bool:
    """What a turn says of being learned; takes that out of it."""
    marks = {key: message.pop(key) for key in MARKS if key in message}
    for key, value in marks.items():
        if value not in (0, 1):
            raise ValueError(f"has {key}: {value!r}; write 0 or 1, false or true, without quotes")
    return all(marks.values())


def text_of(content: Any) -> tuple[str | None, str]:
    """The text and the thoughts of a content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise ValueError(f"has a content that is a {type(content).__name__}; write a text")
    texts, thoughts = [], []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            thoughts.append(part[kind])
        else:
            named = part if kind in TEXT_PARTS else kind
            fix = "this trains on texts: leave it out"
            if kind in ("tool_use", "tool_result"):
                fix = "write calls as tool_calls, results as messages of the role tool"
            raise ValueError(f"has a part that is no text ({shown(named)}); {fix}")
    return "".join(texts), "".join(thoughts)


def calls_of(message: dict) -> list[dict]:
    """The tool calls of a message, which are taken out of it."""
    calls = message.pop("tool_calls", None) or []
    older = message.pop("function_call", None)  # of OpenAI's interface before tools
    return [*calls_in(from_json(calls, "tool_calls")), *calls_in([older] if older else [])]


def calls_in(value: Any) -> list[dict]:
    """Each call with its function, and arguments as an object."""
    made = []
    for call in value if isinstance(value, list) else [value]:
        call = from_json(call, "a tool call")
        if not isinstance(call, dict):
            raise ValueError(f"has a tool call that is a {type(call).__name__}; write an object")
        function = decoded(call.get("function"))
        function = function if isinstance(function, dict) else call
        if not isinstance(function.get("name"), str):
            raise ValueError("has a tool call without a name; write {name, arguments}")
        given = function.get("arguments", function.get("parameters"))
        arguments = decoded(given or {})
        try:
            json.dumps(arguments, allow_nan=False, default=str)
        except ValueError:
            raise ValueError("has a call with NaN or Infinity, which is no JSON; fix it") from None
        own = {k: v for k, v in call.items() if k not in ("name", "arguments", "parameters")}
        function = {"name": function["name"], "arguments": arguments}
        made.append({"type": "function", **own, "function": function})
    return made


def tools_of(location: str, tools: Any) -> list[dict] | None:
    """The tools that the model may call, as functions; None if there are none."""
    try:
        tools = from_json(tools, "tools") if tools != "" else None
        made = []
        for tool in [tools] if isinstance(tools, dict) else tools or ():
            tool = from_json(tool, "tools")
            if not isinstance(tool, dict):
                raise ValueError(f"has a tool that is a {type(tool).__name__}; write an object")
            if not isinstance(tool.get("function"), dict | str) and "name" in tool:
                tool = {"type": "function", "function": tool}
            function = from_json(tool.get("function"), "tools")
            if not isinstance(function, dict | None):
                raise ValueError("has a tool whose function is no object; write {name, parameters}")
            if function and "parameters" in function:
                function = {**function, "parameters": decoded(function["parameters"])}
            made.append({**tool, "function": function} if function else tool)
    except ValueError as error:
        raise DataError(f"{location}: the record {error}") from None
    return made or None


def from_json(value: Any, what: str) -> Any:
    """What a text holds as JSON, ValueError if it is none; what is no text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"has {what} that is no JSON ({shown(str(error))}); fix it") from None


def decoded(value: Any) -> Any:
    """The object or list that a text holds as JSON, maybe encoded twice; else the value itself."""
    try:
        found = decoded(json.loads(value)) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, dict | list) else value
