"""`s3://bucket/prefix`: Amazon S3 and object stores with its protocol (AWS_ENDPOINT_URL).

obstore finds the credentials as Amazon's tools do (environment, web identity, container, instance) and signs the URLs;
this needs the extra `loraplex[s3]`.
"""

import os
import re
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from adapters.errors import SourceNotAllowed, SourceNotFound
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.sources.download import Digest, Download
from adapters.sources.urls import check_under, parts

if TYPE_CHECKING:
    from obstore.store import S3Store

_VALID_FOR = timedelta(minutes=15)  # validity of a signed URL: a download only has to begin within this time
_MD5 = re.compile(r'"([0-9a-f]{32})"')
_TRUE = ("1", "true", "yes", "on")


def roots(allowed: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the components of the `s3://bucket` and `s3://bucket/prefix` entries. Raises `SourceNotAllowed`."""
    found = [_parts(entry) for entry in allowed if entry.startswith("s3:")]
    if found:
        try:
            import obstore  # noqa: F401
        except ImportError:
            raise SourceNotAllowed("S3 sources need the extra loraplex[s3], which is not installed.") from None
    return found


def check_source(source: str, allowed: Sequence[str]) -> None:
    """Raise `SourceNotAllowed` unless `source` lies below one of the `allowed` prefixes."""
    check_under(source, _parts(source), roots(allowed))


def _parts(source: str) -> tuple[str, ...]:
    if "%" in source:
        raise SourceNotAllowed("An S3 source must be the plain key, without %.")
    return parts(source, "s3")


def copy(source: str, allowed: Sequence[str], into: Path, max_bytes: int, stop: threading.Event) -> str:
    """Fetch the adapter's files and return `source`."""
    bucket, *prefix = _parts(source)
    with Download(source, max_bytes, stop) as download:
        for name in (*FILES, *TOKENIZER_FILES):
            try:
                url = _signed(download, bucket, "/".join((*prefix, name)))
                download.save(url, into / name, _digest, max_bytes=TOKENIZER_FILES.get(name))
            except SourceNotFound:
                if name in FILES:
                    raise
    return source


def _signed(download: Download, bucket: str, key: str) -> str:
    import obstore
    from obstore.exceptions import BaseError

    try:
        url: str = obstore.sign(_store(bucket), "GET", key, _VALID_FOR)
    except BaseError as error:  # the error's text may reveal the credentials
        raise download.unavailable("cannot be fetched: the server finds no credentials for it") from error
    return url.partition("?")[0] if _anonymous() else url


def _store(bucket: str) -> "S3Store":
    from obstore.store import S3Store

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return S3Store(
        bucket,
        client_options={"allow_http": endpoint.startswith("http://")},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)},  # for requests of credentials
        **({"endpoint": endpoint} if endpoint else {}),
        **({"access_key_id": "none", "secret_access_key": "none"} if _anonymous() else {}),
    )


def _anonymous() -> bool:
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE


def _digest(headers: httpx.Headers) -> Digest | None:
    """Return the content's MD5 from the ETag. None for multipart uploads, which the ETag shows, and for objects
    encrypted with a key that is not S3's own: there the ETag is no MD5 of the content."""
    found = _MD5.fullmatch(headers.get("etag", ""))
    own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    if found is None or own_key or headers.get("x-amz-server-side-encryption", "AES256") != "AES256":
        return None
    return Digest("md5", found[1])
