"""From a storage root's URL to its store: the only place that knows which schemes there are."""

from __future__ import annotations

from asyncopd.errors import StoreUnusableError
from storage.stores.base import MemoryStore, ObjectStore
from storage.stores.local import LocalStore
from storage.stores.s3 import S3Store


def open_store(url: str) -> ObjectStore:
    """The store at `url`: a path or `file://path`, `s3://bucket/prefix`, or `memory://name`. Writes nothing.

    Call `probe()` on it once before a run relies on it.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    stores: dict[str, type[ObjectStore]] = {"file": LocalStore, "s3": S3Store, "memory": MemoryStore}
    if scheme not in stores:
        raise StoreUnusableError(
            f"{url} cannot be used as storage root: {scheme}:// is not supported. "
            f"Use a path, file://, s3:// or memory://."
        )
    return stores[scheme](url)
