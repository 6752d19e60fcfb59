"""The hints of `backupd push`."""

from __future__ import annotations

import pytest

from backupd.cli.push import _hint
from backupd.core.policy import Reason, rule_of


@pytest.mark.parametrize("reason", Reason)
def test_names_no_command_that_needs_a_delivery_in_the_ledger(reason: Reason) -> None:
    hint = _hint(reason)

    assert hint
    assert "backupd retry" not in hint
    assert "backupd show" not in hint


def test_replaces_the_retry_command_by_another_push() -> None:
    assert rule_of(Reason.TOO_LARGE).hint.endswith(", then `backupd retry`")
    assert _hint(Reason.TOO_LARGE).endswith(", then push it again")
