"""The text output of `backupd audit`."""

from __future__ import annotations

from collections import Counter

import pytest

from backupd.cli import audit
from backupd.cli.audit import AuditFinding, AuditVerdict


def test_prints_the_first_thousand_findings_and_counts_all(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        AuditFinding(None, "switches", f"sw-{n}.cfg", AuditVerdict.MISSING)
        for n in range(1, audit._MAX_ROWS + 8)
    ]
    audit._print({"kept": Counter({AuditVerdict.MISSING: len(wrong), AuditVerdict.OK: 5})}, wrong)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.split()[:1] == ["missing"]]) == audit._MAX_ROWS
    assert "  and 7 more: `backupd audit --json` lists all of them" in lines
    assert "kept in sent_dir: 5 ok, 1007 missing, 0 changed, 0 unreadable, 0 unknown" in lines
