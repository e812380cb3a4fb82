"""What was found, and what to think of it: one row of what `aerie doctor` says."""

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, and where it matters what to think of it."""

    what: str
    found: str
    verdict: str = ""
    advice: str = ""


def worst(findings: Iterable[Finding], *names: str) -> str:
    """The worst verdict, of all or of those named."""
    found = {one.verdict for one in findings if not names or one.what in names}
    return next((verdict for verdict in (PROBLEM, WARNING) if verdict in found), OK)
