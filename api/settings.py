"""What decides how the service runs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one service process."""

    root: str = "runs"
    """Storage root whose runs are shown; every run launched here lives in it."""
    configs: Path = Path("configs")
    """Folder whose `*.yaml` files may be launched by name."""
    tokens: Path = Path(".asyncopd/tokens.json")
    """Where hashed tokens are kept."""
    host: str = "127.0.0.1"
    port: int = 8321
    niceness: int = 5
    """Training goes first where both want a core."""
    max_body_bytes: int = 1_000_000
    """A configuration is a few kilobytes."""
    requests_per_s: float = 100.0
    """Sustained rate of one client; twice as many may come at once. A page asks for five things a second."""
    poll_s: float = 0.5
    """Between looks at a run that somebody watches; one look serves every watcher."""

    @cached_property
    def is_loopback(self) -> bool:
        """Can only this machine reach the service?"""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
