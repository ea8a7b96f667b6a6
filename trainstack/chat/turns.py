"""Where a turn of the assistant begins and ends in the rendering of a whole conversation.

One full rendering is the truth. It need not begin with the rendering of a part of it: templates
write the last turn in another way, leave out earlier thoughts, move a system turn.
"""

import contextlib
import os
import re
from dataclasses import dataclass

from trainstack.chat.marks import QUESTION, TAG, Marked, Rendering
from trainstack.errors import DataError

UNFINISHED_TAG = re.compile(r"(<[^<>\s]*|\[[^\[\]\s]*)$")
HEAD_END = re.compile(f"{TAG.pattern}|\\n")  # of a part of a generation prompt


@dataclass(frozen=True)
class Turn:
    """What a message of the assistant adds to the generation prompt before it.

    ``first``, ``last``: its first character and the one after its last, in the whole rendering;
    ``more``: what has to be appended to the text for a last turn that nothing ends in it.
    ``prompt``: what the model is given before it; ``is_asked``: whether the whole rendering has
    all of that generation prompt; ``is_moved``: whether it has another text in front of that.
    """

    first: int
    last: int
    more: str
    prompt: Rendering
    is_asked: bool
    is_moved: bool


def find_turn(marked: Marked, whole: Rendering, number: int) -> Turn:
    """Message ``number`` in the rendering of all. DataError if the template does not show it."""
    own = [n for n, piece in enumerate(marked.pieces) if piece.message == number]
    prompt = prompt_before(marked, number)
    start_at, prompt_at = anchor(marked, whole, prompt, number)
    shown = [place for n in own for place in whole.places.get(n, ()) if place[0] >= start_at]
    shown_to = max([start_at, *(last for _, last in shown)])
    later = [first for first in firsts_behind(marked, whole, number) if first >= shown_to]
    bound = min([first for first, _ in shown] or later or [len(whole.text)])
    before = whole.text[start_at:bound]
    start = start_at + invited(marked, number, prompt, prompt_at, before)
    said = max([start, *(last for _, last in shown)])
    rest = whole.text[said : min(later, default=len(whole.text))]
    ending = end_of_turn(marked, number, own, whole.text[start:said], rest)
    if not ending.startswith(rest) and not rest.startswith(ending):
        ending = rest + ending
    more = "" if rest.startswith(ending) else ending[len(rest) :]
    is_asked = whole.text[:start].endswith(marked.invitation)
    if number == 0 and prompt.text == marked.invitation:
        prompt = Rendering(with_invitation(whole.text[:start], marked.invitation))
    asked, given = (
        "".join(text.split())  # white space between turns may differ
        for text in (prompt.text.removesuffix(marked.invitation), whole.text[:start])
    )
    is_moved = not given.startswith(asked)
    return Turn(start, said + len(ending), more, prompt, is_asked, is_moved)


def firsts_behind(marked: Marked, found: Rendering, number: int) -> list[int]:
    """Where the texts of later messages than ``number`` begin."""
    later = (places for n, places in found.places.items() if marked.pieces[n].message > number)
    return [first for places in later for first, _ in places]


def prompt_before(marked: Marked, number: int) -> Rendering:
    """What the model is given before message ``number``, with the invitation to answer."""
    try:
        return marked.render(number, invites=True)
    except DataError:
        if number == 0 and marked.invitation:  # templates look at the first message
            return Rendering(marked.invitation)
        raise


def with_invitation(head: str, invitation: str) -> str:
    """What stands before a first turn, such as a system turn of the template, and the invitation.

    ``head`` ends with as much of the invitation as the template writes in front of an answer.
    """
    lengths = range(len(invitation), 0, -1)
    shared = next((n for n in lengths if head.endswith(invitation[:n])), len(head))
    return head[: len(head) - shared] + invitation


def anchor(marked: Marked, whole: Rendering, part: Rendering, number: int) -> tuple[int, int]:
    """The end of the last text before message ``number``, in both renderings; 0, 0 if none is."""
    for n in reversed(range(len(marked.pieces))):
        if marked.pieces[n].message < number and n in whole.places and n in part.places:
            return whole.places[n][-1][1], part.places[n][-1][1]
    return 0, 0


def invited(marked: Marked, number: int, prompt: Rendering, prompt_at: int, found: str) -> int:
    """How many characters of ``found``, in front of the turn's first text, are its prompt."""
    given = prompt.text[prompt_at:]
    is_shown = number or prompt.text != marked.invitation
    known = len(alike(given, found)) if is_shown else 0
    added = ""
    if known < len(given):
        before = marked.render(number).text if number else ""
        added = prompt.text[len(os.path.commonprefix([before, prompt.text])) :]
        if added.strip() and added in found:
            known = found.rindex(added) + len(added)
        elif known and known >= len(given) - len(added):
            added = ""  # they part within it: it opens a thought that is not there, say
    # A template that invites nobody after an answer, or in front of a first message of the
    # assistant, writes the head of its turn all the same.
    heads = [added] if marked.invitation in given else [added, marked.invitation]
    for head in filter(str.strip, heads):
        for cut in [len(head), *(m.end() for m in [*HEAD_END.finditer(head)][::-1])]:
            if head[:cut].strip() and head[:cut] in found[known:]:
                return known + found[known:].rindex(head[:cut]) + cut
    return known


def end_of_turn(marked: Marked, number: int, own: list[int], said: str, rest: str) -> str:
    """What ends the turn: it follows its last text, whether or not somebody speaks after it.

    ``said``: the turn up to that text; ``rest``: what follows in the whole one up to the next.
    """
    is_last = number == len(marked.messages) - 1
    other = elsewhere(marked, number, own, is_last)
    found = common_end(rest, other, is_last)
    if not is_last and not (other or "").startswith(found) or not rest.startswith(other or ""):
        found = rest[: -len(header)] if (header := header_after(marked, number, rest)) else found
    begins = TAG.search(marked.invitation)
    if begins and begins[0] in found and begins[0] not in said:  # it ends no turn
        found = found[: found.index(begins[0])]
    found = found.rstrip()
    if is_ended(said, found):
        return found
    # Nothing of its own ends it: the first token of the next turn does.
    following = (other if is_last and other is not None else rest)[len(found) :]
    tag = TAG.search(following)
    if tag and not following[: tag.start()].strip():
        return found + following[: tag.end()]
    if found and other is not None and not rest.startswith(other) and not other.startswith(rest):
        return ""  # it differs in the two places, and neither shows why
    return found or following.rstrip()


def elsewhere(marked: Marked, number: int, own: list[int], is_last: bool) -> str | None:
    """What follows the turn's last text in the other place; None if the template does not tell.

    The other place of a last turn is one before an answer to it; of any other turn, the last.
    """
    if not is_last:
        found = marked.render(number + 1)
        return after(found, own, len(found.text))
    answers = [{"role": "user", "content": QUESTION}]
    if calls := marked.messages[number].get("tool_calls"):
        name, key = calls[0].get("function", {}).get("name"), calls[0].get("id")
        result = {"role": "tool", "name": name, "tool_call_id": key, "content": QUESTION}
        answers.insert(0, result)
    for answer in answers:
        with contextlib.suppress(DataError):  # it does not take such a turn here
            found = marked.render(more=[answer])
            return after(found, own, found.text.rfind(QUESTION))
    return None


def after(found: Rendering, own: list[int], stop: int) -> str | None:
    """The text from the last of a turn's pieces up to ``stop``."""
    lasts = [place[1] for n in own for place in found.places.get(n, ())]
    return found.text[max(lasts) : stop] if lasts and max(lasts) <= stop else None


def common_end(rest: str, other: str | None, is_last: bool) -> str:
    """What ends a turn in both places; in a last one another text may, as an end-of-text token."""
    if other is None:
        return rest if is_last else ""
    same = alike(rest, other)
    return rest if is_last and not same.strip() else same


def header_after(marked: Marked, number: int, rest: str) -> str:
    """What begins the next turn, if ``rest`` ends with it: what follows a plain answer shows it."""
    answer = {"role": "assistant", "content": QUESTION}
    try:
        shown = marked.render(in_place={number: answer})
        last = marked.render(number + 1, in_place={number: answer})
    except DataError:
        return ""
    follows = shown.text[shown.text.rfind(QUESTION) + len(QUESTION) :]
    start = len(shown.text) - len(follows)
    firsts = [first - start for first in firsts_behind(marked, shown, number) if first >= start]
    follows = follows[: min(firsts, default=len(follows))]
    ends = alike(follows, last.text[last.text.rfind(QUESTION) + len(QUESTION) :]).rstrip()
    if not ends and (tag := TAG.search(follows)):
        ends = follows[: tag.end()]
    header = follows[len(ends) :]
    return header if ends and header.strip() and rest.endswith(header) else ""


def is_ended(said: str, found: str) -> bool:
    """Whether a text ends a turn: its last tag does not just close one of the turn's own."""
    tags = TAG.findall(found)
    closed = re.fullmatch(r"([<\[]\|?)/(.*?)[>\]]", tags[-1]) if tags else None
    return bool(tags) and not (closed and closed[1] + closed[2] in said + found)


def alike(one: str, other: str) -> str:
    """What both begin with, without a tag that is not whole in it."""
    common = os.path.commonprefix([one, other])
    if len(common) in (len(one), len(other)):
        return common
    return UNFINISHED_TAG.sub("", common)
