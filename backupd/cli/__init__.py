"""The commands; the only place that prints for people."""

import sys


def main() -> None:
    """Run the command line; what goes wrong is told in words, with the exit code that belongs to it."""
    from backupd.core.errors import BackupdError  # noqa: PLC0415 -- what a command needs is imported by it

    try:
        from backupd.cli.app import app  # noqa: PLC0415

        app()
    except BackupdError as error:
        sys.stderr.write(f"backupd: {error}\n")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has seen enough
        sys.exit(0)
