"""What an error of an S3 request means: somebody was first, try again, or stop and tell the user what to do.

Relies on s3fs, which turns botocore's errors into Python's and keeps the server's answer as their cause.
"""

from __future__ import annotations

import errno
import os
import re

import s3fs.core

_RETRYABLE_CODES = {
    "ConditionalRequestConflict", "OperationAborted", "InternalError", "ServiceUnavailable", "SlowDown", "Throttling",
    "RequestTimeout", "408", "409", "429", "500", "502", "503", "504",
}  # fmt: skip
_RETRYABLE_NAMES = {
    "ClientConnectorError", "ClientOSError", "ConnectTimeoutError", "ConnectionClosedError", "ConnectionError",
    "EndpointConnectionError", "HTTPClientError", "ReadTimeoutError", "ServerDisconnectedError",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError",
}  # fmt: skip
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


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
        return code_of(exc) in _RETRYABLE_CODES
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
