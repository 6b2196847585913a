"""From a store to the Place of its objects; for S3 that takes the credentials this process would use itself."""

from __future__ import annotations

import os
from pathlib import Path

import botocore.session

from asyncopd.errors import StorageError
from storage.catalog.files import Place
from storage.objects import ObjectStore


def place_of(store: ObjectStore) -> Place:
    """Where the objects of `store` are. Raises StorageError when S3 credentials cannot be found."""
    scheme, _, rest = store.url.rpartition("://")
    if scheme == "s3":
        return Place("s3", rest.strip("/"), _s3_arguments(store.url))
    if scheme == "memory":
        return Place("memory", f"/{rest}".rstrip("/"), {})
    return Place("file", str(Path(rest).expanduser().absolute()), {})


def _s3_arguments(url: str) -> dict[str, str]:
    # The usual chain (environment, profile, instance role), asked here so that the reader needs none of it.
    session = botocore.session.get_session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StorageError(f"{url}: no S3 credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    frozen = credentials.get_frozen_credentials()
    arguments = {
        "access_key": frozen.access_key,
        "secret_key": frozen.secret_key,
        "session_token": frozen.token,
        "region": session.get_config_variable("region") or "us-east-1",
        # pyarrow reads AWS_ENDPOINT_URL itself, but then puts the bucket into the host name.
        "endpoint_override": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
    }
    return {name: value for name, value in arguments.items() if value}
