"""The errors that end a command or the daemon, each with a hint for the operator, and the exit codes."""

REJECTED = 3
UNAVAILABLE = 69
PENDING = 75
BAD_CONFIG = 78
"""Exit codes: an archive was rejected, a destination is unavailable, deliveries are still pending, and the
configuration can't be used. The last three are those of sysexits.h."""


class BackupdError(Exception):
    """An error that the operator has to act on; only the command line catches it.

    `message` is the problem and where it is, `hint` the command or edit that fixes it (may be empty), and
    `exit_code` the exit code of the command.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(BackupdError):
    """The arguments of a command are not valid."""

    exit_code = 2


class UnavailableError(BackupdError):
    """A destination can't be reached, or it refuses uploads."""

    exit_code = UNAVAILABLE


class ConfigError(BackupdError):
    """The configuration, or a file that it names, can't be used."""

    exit_code = BAD_CONFIG


class LedgerError(BackupdError):
    """The ledger can't be opened, read or written."""

    exit_code = BAD_CONFIG


class LedgerHeldError(LedgerError):
    """Another process held the ledger's write lock for longer than the lock timeout."""


class LedgerFullError(LedgerError):
    """The disk of the ledger has no room for the change; what is stored already can be read."""


class LedgerUnreachableError(LedgerError):
    """The ledger can't be reached at the moment, as after an I/O error; a later attempt may succeed."""

    exit_code = UNAVAILABLE


class LedgerDamagedError(BackupdError):
    """The content of the ledger is damaged.

    It is not a `LedgerError`, because a retry can't succeed: the ledger has to be recreated.
    """


class LedgerUnreadableError(LedgerDamagedError):
    """The ledger contains a value that can't be read.

    SQLite's integrity check does not necessarily find it, and a failing disk is not the cause.
    """
