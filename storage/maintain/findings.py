"""What an audit says: findings with the command that mends each, and the report they make up."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    problem: str
    """`corrupt`, `missing`, `mismatch`, `overlap`, `ledger`, `orphan` or `temporary`."""
    key: str
    """The object it is about; of something missing, the key it should have."""
    expected: str
    found: str
    mend: str
    """The exact command, or what to do when there is none."""


@dataclass(frozen=True)
class AuditReport:
    """The result of auditing one run."""

    run_id: str
    root: str
    num_objects: int
    num_bytes: int
    """Of all objects of the run."""
    num_verified: int
    """Data objects whose sha256 was computed."""
    seconds: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    """What is not wrong but worth knowing: data removed on purpose, keys the layout does not know."""

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"clean": self.is_clean, **asdict(self)}


@dataclass(frozen=True)
class Mend:
    """The commands that mend a run, spelled out for its storage root."""

    root: str
    run_id: str

    def finding(self, problem: str, key: str, expected: str, found: str) -> Finding:
        """A finding that setting `key` aside mends."""
        return Finding(problem, key, expected, found, self.quarantine(key))

    def quarantine(self, key: str) -> str:
        return self._command("asyncopd maintain quarantine", key)

    def collect(self) -> str:
        return self._command("asyncopd maintain collect", self.run_id)

    def deployment(self, name: str) -> str:
        """Start one more role process, which does what is missing."""
        return f"prefect deployment run {name}/worker -p run_id={self.run_id} -p root={shlex.quote(self.root)}"

    def resume(self) -> str:
        return self._command("asyncopd train --run-id", self.run_id)

    def _command(self, command: str, argument: str) -> str:
        option = "" if self.root == "runs" else f" --root {shlex.quote(self.root)}"
        return f"{command} {shlex.quote(argument)}{option}"


def to_text(report: AuditReport) -> str:
    """The report for people: one paragraph a finding."""
    size = f"{report.num_objects} objects, {report.num_bytes / 1e6:.1f} MB, {report.num_verified} data objects verified"
    lines = [f"{report.run_id}: {size} in {report.seconds:.1f} s"]
    lines += [
        f"\n{finding.problem}: {finding.key}\n  expected  {finding.expected}\n  found     {finding.found}\n"
        f"  to mend   {finding.mend}"
        for finding in report.findings
    ]
    lines += ["", *(f"note: {note}" for note in report.notes)] if report.notes else []
    counts = Counter(finding.problem for finding in report.findings)
    counted = ", ".join(f"{count} {problem}" for problem, count in counts.items())
    lines.append(f"\n{len(report.findings)} findings: {counted}" if counts else "clean")
    return "\n".join(lines)
