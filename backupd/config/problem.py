"""What is wrong around a configuration: with the folders and files that it names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to see to: the key, what is wrong, what to do, and whether something fails before that.

    `stops` tells whether the daemon is not to run with it. It runs with what whoever may write in one drop
    folder can have made, as the others have to go on.
    """

    where: str
    message: str
    hint: str
    fatal: bool
    stops: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")
