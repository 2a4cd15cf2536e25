"""One LMDB environment, opened late and closed safely: the layer below the text and image databases."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from cacr_uniter.errors import UserError
from cacr_uniter.files import parse_json

COMMIT_EVERY = 1000
COMMIT_BYTES = 1 << 26
FIRST_MAP_SIZE = 1 << 30

_environments: dict[str, lmdb.Environment] = {}
_environments_lock = threading.Lock()


def _close_inherited() -> None:
    """In a forked child: an LMDB environment must not be used across a fork, and blocks opening its folder anew."""
    global _environments_lock
    _environments_lock = threading.Lock()
    while _environments:
        _environments.popitem()[1].close()


os.register_at_fork(after_in_child=_close_inherited)


def read_json(path: Path, what: str) -> Any:
    """Parses a JSON file that belongs to a database.

    Raises:
        UserError: missing, unreadable or damaged; the message names `what`.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what}: {path} is missing; is this a whole database folder?") from error
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error}); copy or create the database again") from error


class Reader:
    """Read-only access to the records of one LMDB folder.

    The environment opens at the first read of each process, so a reader can be pickled and survives a fork; readers of
    the same folder share one environment, which LMDB allows only once a process. No lock file is needed.

    Args:
        folder: holds data.mdb.

    Raises:
        UserError: the folder has no data.mdb.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = str(folder.resolve())
        if not (folder / "data.mdb").is_file():
            raise UserError(f"database {folder}: no data.mdb there; give the folder of an LMDB database")

    def environment(self) -> lmdb.Environment:
        """The environment of this process and folder, opened if it is not yet."""
        with _environments_lock:
            if self._key not in _environments:
                _environments[self._key] = self._open()
            return _environments[self._key]

    def _open(self) -> lmdb.Environment:
        try:
            environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False, max_readers=1)
        except lmdb.MemoryError as error:
            raise MemoryError(f"database {self.folder}: {error}") from error
        except lmdb.Error as error:
            raise UserError(f"database {self.folder}: not a readable LMDB file ({error}); copy it again") from error
        size = (self.folder / "data.mdb").stat().st_size
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if size < expected:
            environment.close()
            raise UserError(
                f"database {self.folder}: data.mdb is truncated ({size} of at least {expected} bytes); copy it again"
            )
        return environment

    @contextmanager
    def _reading(self, what: str) -> Iterator[lmdb.Transaction]:
        try:
            with self.environment().begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise UserError(f"database {self.folder}: {what} cannot be read ({error}); copy it again") from error

    def get(self, key: str) -> bytes:
        """The stored bytes.

        Raises:
            UserError: no such record, or LMDB reports damage.
        """
        with self._reading(f"record {key!r}") as transaction:
            value = transaction.get(key.encode("utf-8"))
        if value is None:
            raise UserError(f"database {self.folder}: no record {key!r}; do text and image database belong together?")
        return bytes(value)

    def __contains__(self, key: str) -> bool:
        with self._reading(f"record {key!r}") as transaction:
            return bool(transaction.cursor().set_key(key.encode("utf-8")))

    def all_keys(self) -> Iterator[str]:
        """All keys in LMDB's order."""
        with self._reading("list of records") as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                yield bytes(key).decode("utf-8")

    def close(self) -> None:
        """Closes this process's environment; a later read opens it again."""
        with _environments_lock:
            environment = _environments.pop(self._key, None)
        if environment is not None:
            environment.close()


class Writer:
    """Writes an LMDB folder that appears under its name only when it is complete.

    Records go to `<folder>.partial`, at most a thousand or 64 MiB to a transaction; the map grows as needed. `finish`
    renames the folder.

    Args:
        folder: the final folder; must not exist.
        resume: continue an existing partial folder instead of starting again.

    Raises:
        UserError: the final folder exists already, or the disk cannot be written.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        if folder.exists():
            raise UserError(f"database {folder}: exists already; remove it or choose another output folder")
        try:
            if self.partial.exists() and not resume:
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(str(self.partial), map_size=self._initial_size(), readahead=False)
        except (OSError, lmdb.Error) as error:
            raise UserError(f"database {folder}: cannot be written ({error})") from error
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._empty = self._environment.stat()["entries"] == 0

    def _initial_size(self) -> int:
        data = self.partial / "data.mdb"
        return max(FIRST_MAP_SIZE, 2 * data.stat().st_size if data.exists() else 0)

    def put(self, key: str, value: bytes) -> None:
        """Queues one record; a full queue is committed."""
        self._pending.append((key.encode("utf-8"), value))
        self._pending_bytes += len(value)
        if len(self._pending) >= COMMIT_EVERY or self._pending_bytes >= COMMIT_BYTES:
            self.commit()

    def get(self, key: str) -> bytes | None:
        """A committed record, or None."""
        with self._environment.begin() as transaction:
            return transaction.get(key.encode("utf-8"))

    def commit(self) -> None:
        """Writes the queued records in one transaction.

        Raises:
            UserError: the disk is full or cannot be written; earlier commits stay.
        """
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
                break
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])
            except lmdb.Error as error:
                raise UserError(f"database {self.folder}: cannot be written ({error}); is the disk full?") from error
        self._empty = self._empty and not self._pending
        self._pending.clear()
        self._pending_bytes = 0

    def finish(self) -> None:
        """Commits, closes, and gives the folder its final name."""
        self.commit()
        self._environment.sync(True)
        self._environment.close()
        self.partial.rename(self.folder)

    def abandon(self, keep: bool = True) -> None:
        """Closes without finishing; committed records stay in the partial folder if they are to be kept."""
        self._environment.close()
        if self._empty or not keep:
            shutil.rmtree(self.partial, ignore_errors=True)
