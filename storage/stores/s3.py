"""The object store of an S3 bucket, through s3fs. Relies on the portable subset only: single PUT with
`If-None-Match: *` and user metadata, multipart without conditions, GET, HEAD, DELETE and LIST v2.

    put_if_absent   PUT, If-None-Match: *, x-amz-meta-attempt: <random>   200: ours
                                                                          412: HEAD; the attempt stored says whose

A 412 may come from our own first try, whose answer was lost: we try again, and so may aiohttp (it repeats a PUT on a
connection that broke) and any proxy on the way, unseen. Hence the attempt id, which only its writer can recognise.

An error means one of three things: another writer was first, try again, or stop and tell the user what to do. s3fs
turns botocore's errors into Python's and keeps the server's answer as their cause.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import s3fs
import s3fs.core

from asyncopd.errors import StorageError, StoreUnusableError
from storage.stores.base import MIN_FREE_BYTES, Entries, Entry, Folder, ObjectStore, check_key

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
"""Doubled after every try."""
MAX_SINGLE_BYTES = 50 * 2**20
"""Larger bodies are sent in parts. Conditional bodies must fit one PUT: conditional multipart is not portable."""
PART_BYTES = 16 * 2**20
"""S3 wants at least 5 MiB and at most 10,000 parts; small parts are cheap to send again."""
PARTS_AT_ONCE = 4
PAGE_KEYS = 1000
"""Keys per LIST answer; 1000 is what S3 gives at most."""
REQUEST_TIMEOUT_S = 120.0
"""For one request but GET, sending its body included: 16 MiB at 140 kB/s. A GET only has to go on arriving."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_RETRYABLE_CODES = re.compile(
    "ConditionalRequestConflict|OperationAborted|InternalError|ServiceUnavailable|SlowDown|Throttling|RequestTimeout"
    "|408|409|429|500|502|503|504"
)
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"}
_BROKEN_OFF = {"ClientOSError", "ConnectionClosedError", "ConnectionError", "ReadTimeoutError"}
_RETRYABLE_NAMES = {*_UNREACHABLE, *_BROKEN_OFF, "HTTPClientError", "ServerDisconnectedError"}
_NO_TOKEN = {"TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"}
_NO_CREDENTIALS = {*_NO_TOKEN, "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Patience:
    """How long to go on with a server that does not answer well."""

    num_tries: int
    connect_timeout_s: float
    read_timeout_s: float
    """Longest silence while an answer is due."""


WORKING = Patience(num_tries=7, connect_timeout_s=3.0, read_timeout_s=20.0)
"""With the pauses about five seconds: longer than a throttle or a reconnect, shorter than a lease."""
PROBING = Patience(num_tries=3, connect_timeout_s=2.0, read_timeout_s=5.0)
"""At start, when a wrong address is likelier than a passing fault."""


class S3Store(ObjectStore):
    """Objects of one bucket, below an optional prefix: `s3://bucket/prefix`.

    Endpoint, region and credentials come from the AWS_* environment variables or the AWS configuration files.
    """

    def __init__(self, url: str, patience: Patience = WORKING) -> None:
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if "@" in bucket or "?" in url:
            # Roots end up in run records, logs and Prefect's database. Not repeated here for the same reason.
            raise StoreUnusableError(
                "the storage root holds credentials or options; expected s3://bucket/prefix alone. Give credentials "
                "by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (docs/s3.md)."
            )
        if not _BUCKET.fullmatch(bucket):
            raise StoreUnusableError(f"{url} names no bucket. Use s3://bucket or s3://bucket/prefix.")
        super().__init__(url)
        self._patience = patience
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._fs: Any = None
        self._inherited: Any = None
        self._pid = 0

    def put_if_absent(self, key: str, body: bytes, *, durable: bool = True) -> bool:
        if len(body) > MAX_SINGLE_BYTES:
            raise StorageError(
                f"{key}: {len(body)} bytes are too many for one conditional PUT, at most {MAX_SINGLE_BYTES}. "
                "Write large bodies under a unique key with `put` and make them visible with a manifest."
            )
        name, attempt = self._object_name(key), _new_attempt()

        def put(fs: Any) -> bool:
            try:
                self._call(fs, "put_object", Key=name, Body=body, Metadata=attempt, IfNoneMatch="*")
            except Exception as exc:
                if not key_exists(exc):
                    raise
                return False
            return True

        return self._retried("write", key, put) or self._is_stored(key, attempt)

    def put(self, key: str, body: bytes, *, durable: bool = True) -> None:
        if len(body) > MAX_SINGLE_BYTES:
            self._put_parts(key, body)
        else:
            self._request("write", key, "put_object", Key=self._object_name(key), Body=body)

    def find(self, key: str) -> bytes | None:
        # One connection: with more, s3fs asks for the size first, which doubles the requests of a small read.
        path = f"{self._bucket}/{self._object_name(key)}"
        return self._retried("read", key, lambda fs: _or_none(lambda: bytes(fs.cat_file(path, max_concurrency=1))))

    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    def entries(self, prefix: str) -> Entries:
        found = (
            Entry(self._key(entry), int(entry["Size"]), entry["LastModified"].timestamp())
            for page in self._pages(prefix)
            for entry in page.get("Contents", [])
        )
        return sorted(found, key=lambda entry: entry.key)

    def folder(self, prefix: str) -> Folder:
        pages = [*self._pages(prefix, Delimiter="/")]
        keys = sorted(self._key(entry) for page in pages for entry in page.get("Contents", []))
        folders = [entry["Prefix"].rstrip("/") for page in pages for entry in page.get("CommonPrefixes", [])]
        return Folder(keys, sorted(folder.rsplit("/", 1)[-1] for folder in folders))

    def delete(self, key: str) -> None:
        self._request("delete", key, "delete_object", Key=self._object_name(key))

    def probe(self, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        if self._patience is PROBING:
            super().probe(min_free_bytes)
        else:
            S3Store(self.url, PROBING).probe(min_free_bytes)

    # -- requests -------------------------------------------------------------------------------------------------
    def _head(self, key: str) -> Mapping[str, Any] | None:
        name = self._object_name(key)
        return self._retried("read", key, lambda fs: _or_none(lambda: self._call(fs, "head_object", Key=name)))

    def _is_stored(self, key: str, attempt: Mapping[str, str]) -> bool:
        """Is what lies under `key` the work of this attempt?"""
        head = self._head(key)
        return head is not None and head.get("Metadata", {}).items() >= attempt.items()

    def _pages(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        """All answers of a listing. Not through s3fs, which looks elsewhere too when a folder is empty."""
        folder = self._object_name(prefix.rstrip("/")) + "/"
        more: dict[str, str] = {}
        while True:
            page = self._request("list", prefix, "list_objects_v2", Prefix=folder, MaxKeys=PAGE_KEYS, **options, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _put_parts(self, key: str, body: bytes) -> None:
        """One object from several PUTs, each tried again alone. Until the last request nobody sees anything."""
        name, attempt = self._object_name(key), _new_attempt()
        begun = self._request("write", key, "create_multipart_upload", Key=name, Metadata=attempt)
        upload = {"Key": name, "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            part = body[number * PART_BYTES : (number + 1) * PART_BYTES]
            sent = self._request("write", key, "upload_part", **upload, PartNumber=number + 1, Body=part)
            return {"PartNumber": number + 1, "ETag": sent["ETag"]}

        def complete(fs: Any) -> bool:
            try:
                self._call(fs, "complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError as exc:
                if code_of(exc) != "NoSuchUpload" or not self._is_stored(key, attempt):
                    raise
                # It was completed by our own earlier try, whose answer was lost.
            return True

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
                parts = [*threads.map(send, range(-(-len(body) // PART_BYTES)))]
            self._retried("write", key, complete)
        except BaseException:
            with contextlib.suppress(StorageError):  # the reason for giving up matters more than what is left over
                self._request("delete", key, "abort_multipart_upload", **upload)
            raise

    def _request(self, action: str, key: str, method: str, **arguments: Any) -> Mapping[str, Any]:
        return self._retried(action, key, lambda fs: self._call(fs, method, **arguments))

    def _call(self, fs: Any, method: str, **arguments: Any) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = fs.call_s3(method, Bucket=self._bucket, timeout=REQUEST_TIMEOUT_S, **arguments)
        return answer

    def _object_name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _key(self, entry: Mapping[str, Any]) -> str:
        return str(entry["Key"]).removeprefix(self._prefix)

    def _filesystem(self) -> Any:
        """The s3fs instance of this process: its event loop does not survive a fork."""
        with self._lock:
            if self._fs is None or self._pid != os.getpid():
                # After a fork the old one is kept: closing it would unregister the parent's sockets from the epoll
                # instance that both share, and the parent would wait for answers until its read timeout.
                self._inherited = self._fs
                self._fs = s3fs.S3FileSystem(
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    config_kwargs={
                        "retries": {"total_max_attempts": 1},
                        "max_pool_connections": 32,
                        "connect_timeout": self._patience.connect_timeout_s,
                        "read_timeout": self._patience.read_timeout_s,
                    },
                )
                self._fs.retries = 1  # all retries are counted here
                self._pid = os.getpid()
            return self._fs

    def _retried(self, action: str, key: str, request: Callable[[Any], T]) -> T:
        """The request's answer. Raises StorageError when its error is final or the tries are used up."""
        for number in range(1, self._patience.num_tries + 1):
            try:
                return request(self._filesystem())
            except StorageError:
                raise
            except Exception as exc:
                if not transient(exc) or number == self._patience.num_tries:
                    tries = f" after {number} tries" if number > 1 else ""
                    reason = explain(exc, bucket=self._bucket, endpoint=self._endpoint())
                    raise StorageError(f"could not {action} {key} in {self.url}{tries}: {reason}") from exc
            # Not the global generator: its state may belong to an experiment.
            time.sleep(FIRST_PAUSE_S * 2 ** (number - 1) * _jitter.uniform(0.5, 1.0))
        raise AssertionError("the last try returned or raised")

    def _endpoint(self) -> str:
        """Where requests go, for messages."""
        client = getattr(self._fs, "_s3", None)
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return without_secrets(str(client.meta.endpoint_url if client else named))


def _new_attempt() -> dict[str, str]:
    """User metadata that no other write of this or any process carries."""
    return {"attempt": uuid.uuid4().hex}


def _or_none(request: Callable[[], T]) -> T | None:
    """The request's answer, or None when the key does not exist; a missing bucket stays an error."""
    try:
        return request()
    except FileNotFoundError as exc:
        if code_of(exc) == "NoSuchBucket":
            raise
        return None


def code_of(exc: BaseException) -> str:
    """The S3 error code behind an s3fs exception; empty when the server did not answer."""
    response = getattr(exc.__cause__, "response", None) or getattr(exc, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def key_exists(exc: BaseException) -> bool:
    """Was the PUT refused because the key exists? Ceph answers without the detail s3fs looks for, hence the code."""
    return isinstance(exc, FileExistsError) or code_of(exc) in ("PreconditionFailed", "412")


def transient(exc: BaseException) -> bool:
    """May the same request succeed a moment later?"""
    if code_of(exc):
        return _RETRYABLE_CODES.fullmatch(code_of(exc)) is not None
    return (
        isinstance(exc, (*s3fs.core.S3_RETRYABLE_ERRORS, ConnectionError, TimeoutError))
        or (isinstance(exc, OSError) and exc.errno in (errno.EBUSY, errno.ECONNRESET, errno.EPIPE))
        or bool(_RETRYABLE_NAMES & _names(exc))
    )


def explain(exc: BaseException, *, bucket: str, endpoint: str) -> str:
    """Found, expected and what to do, for an error that ends the tries. Holds no secret."""
    code, names = code_of(exc), _names(exc)
    if names & _NO_CREDENTIALS:
        return (
            "no AWS credentials were found. Expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile named by "
            "AWS_PROFILE, or a role of this machine; set one of them where `asyncopd up` and this command run."
        )
    if "ProfileNotFound" in names:
        return (
            f"AWS_PROFILE names {os.environ.get('AWS_PROFILE')!r}, which is no profile of the AWS configuration "
            "(~/.aws/config, ~/.aws/credentials). Correct AWS_PROFILE, or make the profile."
        )
    if code == "NoSuchBucket":
        return f"the server at {endpoint} has no bucket {bucket!r}. Create the bucket, or correct the storage root."
    if code in _WRONG_KEYS:
        return (
            f"the server at {endpoint} does not accept these credentials ({code}). Check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile in AWS_PROFILE; they may have expired."
        )
    if code in _WRONG_REGION:
        return (
            f"the bucket {bucket!r} is not in the region that was asked ({code}: {without_secrets(str(exc))}). "
            "Set AWS_DEFAULT_REGION to the bucket's region."
        )
    if isinstance(exc, PermissionError):
        return (
            f"the server at {endpoint} refuses access to bucket {bucket!r} ({code or 'AccessDenied'}). Expected "
            "permission to list the bucket and to put, get and delete its objects; check the credentials' policy."
        )
    if names & _UNREACHABLE:
        return (
            f"no S3 server answers at {endpoint} ({type(exc).__name__}). Start it, or correct AWS_ENDPOINT_URL "
            "(or endpoint_url of the profile); nothing stored is lost."
        )
    return (
        f"{type(exc).__name__}: {without_secrets(str(exc))}. Check the server at {endpoint} (AWS_ENDPOINT_URL), then "
        "start again; nothing stored is lost."
    )


def without_secrets(text: str) -> str:
    """`text` without the user and password of a URL, and without the secrets of the environment."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text


def _names(exc: BaseException) -> set[str]:
    """Names of the error's classes: botocore, aiohttp and httpx have several errors of one meaning."""
    return {base.__name__ for base in type(exc).__mro__}
