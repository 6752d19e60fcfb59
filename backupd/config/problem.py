"""What is wrong around a configuration: with the folders and files that it names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """Something to see to: the key, what is wrong, what to do, and whether nothing works before that."""

    where: str
    message: str
    hint: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"\n  hint: {self.hint}" if self.hint else "")
