"""`backupd check --dry-run`: which files in the drop folders would be sent now, which not, and why."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial

import typer
from rich.progress import MofNCompleteColumn, SpinnerColumn, TimeElapsedColumn

from backupd.cli.output import print_json, print_line, print_table, progress_bar
from backupd.config.files import folder_errors
from backupd.config.models import Config
from backupd.config.time_limit import filesystem_hint
from backupd.core.drop_problem import FOLDER_FAILED
from backupd.core.errors import BAD_CONFIG, LedgerError
from backupd.core.model import Archive, DeliveryState
from backupd.core.names import as_text
from backupd.core.units import human_size
from backupd.dropfolder.drop import Drop
from backupd.dropfolder.folder import DropFolder
from backupd.intake.preview import Preview, PreviewedFile, Verdict
from backupd.ledger.factory import open_history
from backupd.ledger.history import History

_MAX_PROBLEMS = 1_000_000


def print_dry_run(config: Config, *, as_json: bool) -> None:
    """Print what the daemon would do with each file; raise `typer.Exit` if a drop folder can't be used."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a lease is broken, see dropfolder.filesystem
    errors = folder_errors(config, list(config.drop))
    found: list[PreviewedFile] = []
    columns = (SpinnerColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ExitStack() as stack:
        history = _open_history(config, stack)
        progress = stack.enter_context(progress_bar(*columns, hidden=as_json))
        advance = partial(progress.advance, progress.add_task("files", total=None))
        for name in config.drop:
            try:
                if name in errors:
                    raise errors[name]
                found += _preview(config, name, history, advance)
            except OSError as error:
                errors[name] = error
                found.append(_unusable(config, name, error))
    if as_json:
        print_json({"files": found, "counts": Counter(file.verdict for file in found)})
    else:
        _print(config, found)
    if errors:
        raise typer.Exit(BAD_CONFIG)


def _open_history(config: Config, stack: ExitStack) -> History | None:
    """Return the ledger, None if there is none or it can't be read: all files count as new then."""
    try:
        return stack.enter_context(closing(open_history(config)))
    except LedgerError:
        return None


def _preview(
    config: Config, name: str, history: History | None, advance: Callable[[], None]
) -> list[PreviewedFile]:
    known: Mapping[bytes, tuple[Archive, DeliveryState]] = {}
    problems = []
    if history is not None:
        known = {archive.relpath: (archive, state) for archive, state in history.files(name)}
        problems = history.problems(name, _MAX_PROBLEMS)
    with closing(DropFolder(str(config.drop[name].path))) as folder:
        drop = Drop.of(name, config.drop[name], folder, ())
        return list(Preview(drop, known, problems, advance).files())


def _unusable(config: Config, name: str, error: OSError) -> PreviewedFile:
    path = config.drop[name].path
    text = f"{path}: {error.strerror or error}"
    hint = filesystem_hint(path, error)
    return PreviewedFile(name, b"", None, Verdict.NOT_SENT, FOLDER_FAILED, text, hint)


def _print(config: Config, files: Sequence[PreviewedFile]) -> None:
    for name in config.drop:
        of_drop = [file for file in files if file.drop == name]
        counts = Counter(file.verdict for file in of_drop)
        numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])
        print_line(f"{name}: {config.drop[name].path}: {numbers or 'no files'}", "bold")
        if of_drop:
            _print_files(of_drop)


def _print_files(files: Sequence[PreviewedFile]) -> None:
    rows = [
        (file.verdict, as_text(file.relpath) or ".", _size(file.size_bytes), file.reason) for file in files
    ]
    print_table(("verdict", "file", "size", "reason"), rows, shortened="file")
    explained = dict.fromkeys((file.reason, file.error, file.hint) for file in files if file.reason)
    typer.echo()
    for reason, error, hint in explained:
        print_line(f"{reason}: {error}")
        if hint:
            print_line(f"  hint: {hint}")


def _size(size_bytes: int | None) -> str:
    return "" if size_bytes is None else human_size(size_bytes)
