"""Files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = ".writing-"


@contextmanager
def written_whole(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """
    Write files under other names first and rename them when all are complete and on the disk.

    Whatever ends the writing, the old files stay and nothing half-written is left behind, unless the process is killed;
    :func:`remove_left_overs` is for that. Example::

        with written_whole(folder / "best.json") as (temporary,):
            temporary.write_text("{}")

    :param paths: files of one folder, renamed in this order
    :return: where to write each of them
    :raises OSError: of the kind that the system reports, with the name of the (last) file
    """
    temporaries = tuple(_temporary(path.parent, path.name) for path in paths)
    try:
        yield temporaries
        for temporary in temporaries:
            _sync(temporary, os.O_RDWR)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        if os.name != "nt":  # Windows opens no folders
            with suppress(OSError):  # some network file systems cannot do this
                _sync(paths[-1].parent, os.O_RDONLY)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"{error.strerror or error}: not saved", str(paths[-1])) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """
    Make a folder and write into it, so that a wrong one is found before hours of training.

    :param folder: where files will be saved
    :raises OSError: of the kind that the system reports, with the name of the folder
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = _temporary(folder, "trial")
        try:
            trial.write_bytes(bytes(4096))
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{error.strerror or error}: nothing can be saved there, write another folder"
        raise OSError(error.errno or errno.EIO, reason, str(folder)) from error


def remove_left_overs(folder: Path) -> None:
    """
    Remove files that :func:`written_whole` left when its process was killed; files of living processes stay.

    :param folder: where to look
    """
    for left_over in folder.glob(f"{_TEMPORARY}*"):
        writer = left_over.name.removeprefix(_TEMPORARY).split("-")[0]
        if not (writer.isdecimal() and _is_at_work(int(writer))):
            left_over.unlink(missing_ok=True)


def _temporary(folder: Path, name: str) -> Path:
    return folder / f"{_TEMPORARY}{os.getpid()}-{name}"


def _sync(path: Path, flags: int) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_at_work(pid: int) -> bool:
    """Whether a process other than this one lives, as far as the system tells."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end it; a file left over does no harm
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
