"""A commit of a Hub repository: fetched through faults that pass, every byte checked against it.

huggingface_hub gives up at once on a 5xx answer to a file, on a reset connection and on a busy
Hub's first answer; where it does wait, it says nothing, and waits for any time. It compares sizes,
not contents. These gaps are closed here. It reads the environment (HF_TOKEN, HF_ENDPOINT, the
caches) when this file is imported: set it before.
"""

import contextlib
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub as hub
from huggingface_hub import constants, errors, hf_hub_download
from huggingface_hub.utils import httpx, logging, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from trainstack.errors import ConfigError, first_words
from trainstack.hub.asset import Asset
from trainstack.storage import files, manifest

LIMITED = 429  # the HTTP status of too many requests
TRIES = 5  # of a request, the first one included
WORKERS = 8  # files that arrive at a time, as in snapshot_download
LONGEST_WAIT = 600  # seconds that the Hub may ask for; its own limits are per 300
ANSWER_SECONDS = 20  # for the Hub to say what a revision means now
FAULTS = (httpx.HTTPError, OSError, ValueError, RuntimeError)  # the last: from hf_xet

Answer = TypeVar("Answer")
logging.set_verbosity_error()  # its warnings are several lines each, and said better below
warnings.filterwarnings("ignore", message="Not enough free disk space")


def raise_if_limited(response: httpx.Response) -> None:
    """Raise on HTTP 429, before huggingface_hub waits by itself."""
    if response.status_code == LIMITED:
        raise errors.HfHubHTTPError("too many requests", response=response)


def make_client() -> httpx.Client:
    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "response": [raise_if_limited]}
    return client


hub.set_client_factory(make_client)


class HubCommit:
    """An origin: what an asset's revision means now, and which of its files are in ``folder``.

    ``sizes`` has the bytes of every file of the commit. ``folder`` is beside the asset's,
    ``.LAST_NAME.COMMIT.partial``: a call after an interrupted one finds the whole files.
    ``is_resumable`` says after a ConfigError whether that folder is worth keeping. An OSError of
    the disk is raised as it is.
    """

    doing, done = "fetching", "fetched"
    facts = {"source": "hub"}  # for the manifest

    def __init__(
        self, asset: Asset, retry_delay: float, say: Callable[[str], None], is_cache_used: bool
    ):
        self.asset, self._retry_delay, self._say = asset, retry_delay, say
        self.is_resumable = False
        self._limited_until = 0.0  # in the clock of time.monotonic
        repo, api = {"repo_id": asset.name, "repo_type": asset.kind}, hub.HfApi()
        self.commit: str = self._persist(
            f"the commit of {asset.revision}",
            lambda: api.repo_info(**repo, revision=asset.revision, timeout=ANSWER_SECONDS).sha,
        )
        entries = self._persist(
            "the list of files",
            lambda: list(api.list_repo_tree(**repo, revision=self.commit, recursive=True)),
        )
        self._files = {f.path: f for f in entries if isinstance(f, hub.RepoFile)}
        self.sizes = {name: file.size for name, file in self._files.items()}
        self.folder = asset.folder.with_name(f".{asset.folder.name}.{self.commit[:12]}.partial")
        self.listing = [*self._files]
        self.entries: dict[str, dict[str, Any]] = {}
        self._repo = {**repo, "revision": self.commit, "local_dir": self.folder}
        if not is_cache_used:  # files in the user's own cache of the Hub are taken, unless forced
            self._repo["cache_dir"] = self.folder / ".no-cache"

    def missing_bytes(self, names: Iterable[str]) -> int:
        """What must still arrive of these files."""
        return sum(self.sizes[name] for name in names if not (self.folder / name).exists())

    def collect(self, names: Iterable[str]) -> None:
        """Fetch, verify and sync these files; ``entries`` has their manifest entries then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(WORKERS)
        try:
            futures = {n: pool.submit(self._fetch, n) for n in names if n not in self.entries}
            for name, future in futures.items():
                self.entries[name] = future.result()
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt waits for no large file

    def _fetch(self, name: str) -> dict[str, Any]:
        """Bring one file; its manifest entry. A file with other bytes is fetched once more."""
        for is_second in (False, True):
            options = {**self._repo, "filename": name, "force_download": is_second}
            path = self._persist(name, partial(hf_hub_download, **options))
            if entry := verified_entry(Path(path), self._files[name]):
                return entry
            os.unlink(path)
            if not is_second:
                self._say(f"{name}: not the bytes of commit {self.commit[:7]}; fetching it again")
        raise ConfigError(
            f"{name} arrived twice with other bytes than commit {self.commit[:7]} has; a proxy on"
            f" the way to {constants.ENDPOINT} alters it: try another network or HF_ENDPOINT"
        )

    def _persist(self, what: str, call: Callable[[], Answer]) -> Answer:
        """The answer to a call, tried again after what may pass; ConfigError says what will not."""
        for attempt in range(1, TRIES + 1):
            try:
                return call()
            except FAULTS as error:
                is_local = isinstance(error, errors.LocalEntryNotFoundError)
                cause = (is_local and error.__cause__) or error  # its cause says why
            if not may_pass(cause):
                raise cause if is_of_disk(cause) else ConfigError(self._explain(cause))
            delay = max(self._retry_delay * 2 ** (attempt - 1), seconds_asked(cause))
            if attempt == TRIES or delay > LONGEST_WAIT:
                break
            until = time.monotonic() + delay
            is_limited = status_of(cause) == LIMITED
            if not (is_limited and until <= self._limited_until + 2):  # another file said it
                self._say(f"{what}: {brief(cause)}; try {attempt + 1} of {TRIES} in {delay:.3g} s")
            self._limited_until = until
            time.sleep(delay)
        self.is_resumable = True
        asks = f"and asks to wait {delay / 60:.0f} min"
        tries = asks if delay > LONGEST_WAIT else f"in {TRIES} tries"
        fix = "check the network and HF_ENDPOINT, then run this again"
        if status_of(cause) == LIMITED:
            fix = "set HF_TOKEN to your token, whose limit is higher, or run this again later"
        problem = f"did not serve {what} {tries} ({brief(cause)})"
        raise ConfigError(f"the Hub at {constants.ENDPOINT} {problem}; {fix}")

    def _explain(self, error: Exception) -> str:
        """One line on a fault that stays: what it is and what to do."""
        key, kind = ("data", "datasets/") if self.asset.kind == "dataset" else ("model", "")
        page = f"{constants.ENDPOINT}/{kind}{self.asset.name}"
        status = status_of(error)
        if isinstance(error, errors.GatedRepoError):
            how = "with the account of" if hub.get_token() else "then set HF_TOKEN to"
            return f"gated; accept its licence at {page}, {how} your token"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"does not exist at {constants.ENDPOINT}, or is private; check {key}.name (a path"
                " starts with ./ or /), or set HF_TOKEN to a token that may read it"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"has no revision {self.asset.revision}; set {key}.revision to one of {page}"
        if isinstance(error, errors.HFValidationError):
            return f"not a name on the Hub; set {key}.name to org/name, or to ./folder for a local"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "not here, and HF_HUB_OFFLINE forbids to fetch it; unset it for this command"
        if isinstance(error, UnicodeEncodeError):  # of a header
            return "your token has a character that none has; set HF_TOKEN again"
        if status in (401, 403):
            return f"{page} refuses your token (HTTP {status}); set HF_TOKEN to one that may read"
        return f"{brief(error)}; see {page}"


def verified_entry(path: Path, expected: hub.RepoFile) -> dict[str, Any] | None:
    """The manifest entry of a file that arrived, synced; None if it is not the commit's file.

    Git LFS names a content by its sha256; git by the sha1 of "blob SIZE\\0" and the content.
    """
    files.sync_file(path)
    entry = manifest.hash_file(path)
    if expected.lfs is not None:
        return entry if entry["sha256"] == expected.lfs.sha256 else None
    blob = hashlib.sha1(b"blob %d\0" % entry["size"], usedforsecurity=False)
    blob.update(path.read_bytes())  # git's own are small
    return entry if blob.hexdigest() == expected.blob_id else None


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed in a few seconds."""
    if status := status_of(error):
        return status in (408, LIMITED) or status >= 500
    if isinstance(error, errors.OfflineModeIsEnabled | ValueError):
        return False
    return not is_of_disk(error)


def is_of_disk(error: Exception) -> bool:
    """Whether the file system refused; a body that was cut short is an OSError too."""
    is_network = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError) and error.errno is not None and not is_network


def status_of(error: Exception) -> int | None:
    """The HTTP status that a fault is about, if it is about one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def seconds_asked(error: Exception) -> float:
    """Seconds that the Hub asks to wait, by its RateLimit header or Retry-After; 0.0 if neither."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers) if status_of(error) == LIMITED else None
    if limit and not limit.remaining:
        return limit.reset_in_seconds + 1.0  # they are whole seconds
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def brief(error: Exception) -> str:
    """A fault in a few words of one line."""
    status = status_of(error)
    more = " (too many requests)" if status == LIMITED else ""
    return f"HTTP {status}{more}" if status else first_words(error)
