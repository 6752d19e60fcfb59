"""The errors that a person has to act on."""


class BackupdError(Exception):
    """Something an operator must see to; caught in `cli` only.

    `message` says what and where, `hint` what to do about it (may be empty), `exit_code` what the
    command ends with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(BackupdError):
    """The command was called in a way that can't work."""

    exit_code = 2


class UnavailableError(BackupdError):
    """A destination can't be reached or refuses us."""

    exit_code = 69


class ConfigError(BackupdError):
    """The configuration, or a file it names, can't be used."""

    exit_code = 78


class LedgerError(BackupdError):
    """The ledger can't be opened, read or written."""

    exit_code = 78


class LedgerHeldError(LedgerError):
    """Another process writes to the ledger, for longer than we wait."""


class LedgerDamagedError(BackupdError):
    """The ledger's content can't be believed any more; no `LedgerError`, as trying again mends nothing."""


class LedgerUnreadableError(LedgerDamagedError):
    """The ledger holds what can't be read: SQLite's check may not find it, and no failing disk looks so."""
