"""A folder that was published here, brought to a repository on the Hub and compared there.

One commit has all of it, so others see the old files or the new ones. Contents are sent before
that under their hashes: what has arrived is not sent again after an interruption.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants, errors

from trainstack.errors import ConfigError, Failed, first_words
from trainstack.hub.choose import CARD, is_edited
from trainstack.hub.commit import FAULTS, brief, is_of_disk, status_of, verified_entry
from trainstack.storage import manifest
from trainstack.units import bytes_text, counted

GIVEN = (".gitattributes", CARD, "LICENSE")  # what a new repository may begin with


def check_token() -> None:
    """ConfigError if there is none to push with."""
    if not hub.get_token():
        raise ConfigError(
            "there is no token to push with; set HF_TOKEN to one that may write, or run: "
            "hf auth login"
        )


def push(folder: Path, name: str, is_private: bool, say: Callable[[str], None]) -> str:
    """Make the repository if need be, and leave the folder's files in it; returns its page.

    ConfigError if it is another one than is asked for, Failed if the Hub does not take all.
    """
    api, page = hub.HfApi(), f"{constants.ENDPOINT}/{name}"
    own = manifest.read_manifest(folder)
    names = [*own["files"], CARD, manifest.MANIFEST]
    try:
        api.create_repo(name, private=is_private or None, exist_ok=True)
        if is_private and not api.repo_info(name).private:
            fix = f"make it private at {page}/settings, or leave out --private"
            raise ConfigError(f"{page} is there already and public; {fix}")
        there = files_of(api, name)
        before = earlier(api, name, there, own["kind"], page)
        stale = [n for n in there if n in before.get("files", ()) and n not in names]
        for other in stale:
            say(f"{page}: {other} of an earlier export is removed")
        is_other = CARD in there and not verified_entry(folder / CARD, there[CARD])
        if before and is_other and is_edited(Path(api.hf_hub_download(name, CARD)), before):
            names.remove(CARD)
            say(f"{page}: its {CARD} was edited and stays; remove it there for that of {folder}")
        size = bytes_text(sum(entry["size"] for entry in own["files"].values()))
        say(f"pushing {counted(len(names), 'file')}, {size}, to {page}")
        commit = api.create_commit(
            name,
            [
                *(hub.CommitOperationAdd(path, folder / path) for path in names),
                *(hub.CommitOperationDelete(path) for path in stale),
            ],
            commit_message="Export of trainstack",
        )
        there = files_of(api, name, commit.oid)
    except FAULTS as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        raise explained(cause or error, name, page) from None
    if wrong := [n for n in names if n not in there or not verified_entry(folder / n, there[n])]:
        raise Failed(f"{page} has other bytes than {folder} of {wrong[0]}; run this again")
    say(f"{page}, commit {commit.oid[:7]}: its {len(names)} files have the hashes of {folder}")
    return page


def files_of(api: hub.HfApi, name: str, commit: str | None = None) -> dict[str, hub.RepoFile]:
    tree = api.list_repo_tree(name, recursive=True, revision=commit)
    return {file.path: file for file in tree if isinstance(file, hub.RepoFile)}


def earlier(
    api: hub.HfApi, name: str, there: dict[str, hub.RepoFile], kind: str, page: str
) -> dict[str, Any]:
    """The manifest of an earlier export in the repository; empty if it is new.

    ConfigError if it has files and no such manifest: it is for something else.
    """
    known: dict[str, Any] = {}
    if manifest.MANIFEST in there:
        path = Path(api.hf_hub_download(name, manifest.MANIFEST))
        with contextlib.suppress(ValueError):
            known = manifest.read_manifest(path.parent)
    if known.get("kind") == kind:
        return known
    if others := {*there} - {*GIVEN}:
        raise ConfigError(
            f"{page} has files that are no export, such as {min(others)}; name another repository, "
            "or remove them there"
        )
    return {}


def explained(error: Exception, name: str, page: str) -> Exception:
    """What went wrong with a push, as one line."""
    status, owner = status_of(error), name.partition("/")[0]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConfigError("HF_HUB_OFFLINE forbids to push; unset it for this command")
    if isinstance(error, UnicodeEncodeError):  # of a header
        return ConfigError("your token has a character that none has; set HF_TOKEN again")
    if isinstance(error, ValueError) and CARD in str(error):
        return ConfigError(f"{page} does not take {CARD} ({first_words(error)}); correct it")
    if status in (401, 403):
        refuses = f"{page} refuses your token (HTTP {status})"
        return ConfigError(f"{refuses}; set HF_TOKEN to one that may write for {owner}")
    if status == 404:
        return ConfigError(f"{page}: the Hub knows no {owner}, or not to your token; check --push")
    if status is None and is_of_disk(error):
        return error
    return Failed(
        f"the Hub at {constants.ENDPOINT} did not take all of it ({brief(error)}); what has arrived"
        " is not sent again: run the same command again"
    )
