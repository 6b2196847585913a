"""What somebody decided about a run after it was created: that it runs, that it stopped, which settings changed.

states/0001.json    running | stopped | failed | completed, written by the flow; workers elsewhere read it
changes/0001.json   settings that a resume changed; the configuration in force is run.json with these applied
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from storage.layout import RunLayout
from storage.numbered import NumberedRecords
from storage.objects import ObjectStore
from storage.records import RunChange, RunState, RunStateName


class RunStateLog:
    """States and changes of one run."""

    store: ObjectStore
    layout: RunLayout

    @property
    def record(self) -> Mapping[str, Any]:
        """What `create_run` stored; `StoredRunLog` has it."""
        raise NotImplementedError

    def __init__(self) -> None:
        self._states = NumberedRecords(self.store, self.layout.state)
        self._changes = NumberedRecords(self.store, self.layout.change)

    def run_state(self) -> RunState | None:
        """The latest state; None while nobody recorded one. One request when nothing changed, so it can be polled."""
        states = self.run_states()
        return states[-1] if states else None

    def run_states(self) -> list[RunState]:
        """Every state recorded, oldest first."""
        return [
            RunState(number=number, state=r["state"], reason=r["reason"], by=r["by"], recorded=r["recorded"])
            for number, r in enumerate(self._states.read(), start=1)
        ]

    def record_state(self, state: RunStateName, *, by: str, reason: str = "") -> int:
        """Append a state. `by` names the flow run, so that a flow ends only what it began itself."""
        return self._states.append({"state": state, "reason": reason, "by": by, "recorded": time.time()})

    def config(self) -> dict[str, Any]:
        """The configuration in force: the recorded one, with every change since, in the root it is read from."""
        config = with_changes(self.record["config"], (change.settings for change in self.changes()))
        # A run that was copied elsewhere goes on there.
        config.setdefault("storage", {})["root"] = self.store.url
        return config

    def changes(self) -> list[RunChange]:
        """Every change of settings, oldest first."""
        return [
            RunChange(settings={key: (old, new) for key, (old, new) in r["settings"].items()}, recorded=r["recorded"])
            for r in self._changes.read()
        ]

    def record_change(self, settings: Mapping[str, tuple[Any, Any]]) -> int:
        """Append a change: dotted key -> (old value, new value). In force for every process started afterwards."""
        return self._changes.append({"settings": settings, "recorded": time.time()})


def with_changes(config: Mapping[str, Any], changes: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, Any]:
    """`config` after `changes`, oldest first, each dotted key -> (old value, new value)."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    for settings in changes:
        for dotted, (_, new) in settings.items():
            *sections, name = dotted.split(".")
            section = changed
            for part in sections:
                section = section[part]
            section[name] = new
    return changed
