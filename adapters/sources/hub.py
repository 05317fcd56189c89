"""`hf://org/repo@revision[/subfolder]`: repositories of the Hugging Face hub, or of the hub at HF_ENDPOINT.

The token is the server's own, found by huggingface_hub (HF_TOKEN, or its login).
"""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, unquote

import httpx
import msgspec

from adapters.errors import SourceNotAllowed, SourceNotFound
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.peft.foreign_files import foreign_weights, weights_instead
from adapters.sources.download import Digest, Download
from adapters.sources.redirects import Redirects
from adapters.sources.urls import check_under, parts

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # an organisation, a repository, or one component of a revision


_PULL_REQUEST = re.compile(r"(refs/)?pr/[0-9]+", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class _LargeFile(msgspec.Struct):
    sha256: str


class _File(msgspec.Struct, rename={"name": "rfilename", "blob": "blobId"}):
    name: str
    size: int | None = None
    blob: str | None = None  # git's SHA-1; for a large file, that of its pointer
    lfs: _LargeFile | None = None

    def digest(self, _: httpx.Headers) -> Digest | None:
        if self.lfs is not None:
            return Digest("sha256", self.lfs.sha256)
        return Digest("sha1", self.blob, b"blob %d\0" % self.size) if self.blob and self.size is not None else None


class _Revision(msgspec.Struct):
    """The hub's description of a revision, limited to the fields that are used."""

    sha: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40,64}$")]
    siblings: list[_File]


@dataclass(frozen=True, slots=True)
class _Place:
    repo: str
    revision: str
    subfolder: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> "_Place":
        org, *rest = parts(source, "hf")
        repo, _, revision = (rest[0] if rest else "").partition("@")
        revision = unquote(revision) or "main"
        if not all(_NAME.fullmatch(name) for name in (org, repo, *revision.split("/"))):
            raise SourceNotAllowed("A hub's source must be hf://org/repo@revision or hf://org/repo@revision/folder.")
        return cls(f"{org}/{repo}", revision, tuple(rest[1:]))

    @property
    def number(self) -> str:
        """The number of a pull request."""
        return self.revision.rpartition("/")[2]

    def at(self, commit: str) -> str:
        return "/".join((f"hf://{self.repo}@{commit}", *self.subfolder))

    def path(self, file: str) -> str:
        return "/".join((*self.subfolder, file))

    def beside(self, paths: Iterable[str]) -> list[str]:
        """Return the names of the files that lie in this place itself."""
        below = (path.removeprefix(self.path("")) for path in paths if path.startswith(self.path("")))
        return [name for name in below if "/" not in name]


def roots(allowed: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the components of the hub's entries, `hf://org` or `hf://org/repo`. Raises `SourceNotAllowed` for any
    other form."""
    found = [parts(entry, "hf") for entry in _repositories(allowed)]
    if any(len(root) > 2 for root in found):
        raise SourceNotAllowed("An --allow-source entry for a hub must be hf://org or hf://org/repo.")
    return found


def _repositories(allowed: Sequence[str]) -> list[str]:
    """Return the hub's entries without those for a pull request, `hf://org/repo@refs%2Fpr%2F1`."""
    found = []
    for entry in allowed:
        if entry.startswith("hf:") and "@" not in entry:
            found.append(entry)
        elif entry.startswith("hf:") and not _is_of_anyone(_Place.parse(entry).revision):
            raise SourceNotAllowed(
                "An --allow-source entry may name a revision only if it is refs%2Fpr%2F and a number."
            )
    return found


def _is_of_anyone(revision: str) -> bool:
    """Return whether a revision is a pull request, whose content anyone may write."""
    return _PULL_REQUEST.fullmatch(revision) is not None


def redirect_hosts(allowed: Sequence[str]) -> list[str]:
    """Return the hosts of the `https://host` entries. Raises `SourceNotAllowed` for any other form."""
    hosts = [entry.removeprefix("https://") for entry in allowed if entry.startswith("https:")]
    if not all(_HOST.fullmatch(host) for host in hosts):
        raise SourceNotAllowed("An --allow-source entry for redirects must be https://host.")
    return hosts


def check_source(source: str, allowed: Sequence[str]) -> None:
    """Raise `SourceNotAllowed` unless the repository of `source` is one of `allowed`; a pull request needs an entry of
    its own."""
    place = _Place.parse(source)
    if not _is_of_anyone(place.revision):
        return check_under(source, tuple(place.repo.split("/")), roots(allowed))
    requests = [_Place.parse(entry) for entry in allowed if entry.startswith("hf:") and "@" in entry]
    if not any((place.repo, place.number) == (known.repo, known.number) for known in requests):
        raise SourceNotAllowed(
            f"The source {source[:200]!r} is a pull request, which anyone may write; an --allow-source must name it."
        )


def copy(source: str, allowed: Sequence[str], into: Path, max_bytes: int, stop: threading.Event) -> str:
    """Fetch the files of one commit, even if the branch moves meanwhile; returns the source with that commit."""
    from huggingface_hub import constants, get_token, hf_hub_url

    place, token = _Place.parse(source), get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with Download(source, max_bytes, stop, Redirects(constants.ENDPOINT, redirect_hosts(allowed))) as download:
        if constants.HF_HUB_OFFLINE:
            raise download.unavailable("cannot be fetched: this server has HF_HUB_OFFLINE set")
        revision = quote(place.revision, safe="")
        about = f"{constants.ENDPOINT}/api/models/{quote(place.repo)}/revision/{revision}?blobs=true"
        try:
            known = msgspec.json.decode(download.read(about, headers), type=_Revision)
        except msgspec.MsgspecError:  # not a hub, or one with an unknown response format
            raise download.unavailable("cannot be fetched: its hub sent a description that cannot be parsed") from None
        files = {file.name: file for file in known.siblings}
        if any(place.path(name) not in files for name in FILES):
            other = foreign_weights(place.beside(files))
            raise SourceNotFound(weights_instead(source, other)) if other else download.not_found()
        wanted = {name: files[path] for name in (*FILES, *TOKENIZER_FILES) if (path := place.path(name)) in files}
        download.check_size(sum(file.size or 0 for file in wanted.values()))
        for name, file in wanted.items():
            url = hf_hub_url(place.repo, file.name, revision=known.sha)
            download.save(url, into / name, file.digest, headers, max_bytes=TOKENIZER_FILES.get(name))
    return place.at(known.sha)
