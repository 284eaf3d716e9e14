"""The disk tier's index: which page's record lies in which slot. SQLite, in WAL mode."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Index", "Row"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS page(
    key BLOB PRIMARY KEY, slot INTEGER UNIQUE NOT NULL, parent BLOB NOT NULL, tag BLOB NOT NULL,
    tokens BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
PRAGMA user_version=1;
"""
_NONCE = "nonce:"


class Row(NamedTuple):
    key: bytes
    slot: int
    parent: bytes
    tag: bytes
    tokens: bytes
    used: int


class Index:
    """Every change is one transaction. kill -9 loses none that was committed; loss of power may undo the last ones.

    Raises:
        sqlite3.DatabaseError: it is damaged, or cannot be written.
    """

    def __init__(self, path: Path, read_only: bool) -> None:
        self._lock = threading.Lock()
        mode = "ro" if read_only else "rwc"
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=1.0)
        if not read_only:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)
                if (found := self._db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise sqlite3.DatabaseError(found)
            except BaseException:
                self._db.close()
                raise

    def rows(self) -> Iterator[Row]:
        """All of them, those used last first."""
        with self._lock:
            found = self._db.execute("SELECT key, slot, parent, tag, tokens, used FROM page ORDER BY used DESC")
            return iter([Row(*row) for row in found])

    def slot(self, key: bytes) -> int | None:
        with self._lock:
            found = self._db.execute("SELECT slot FROM page WHERE key=?", (key,)).fetchone()
        return None if found is None else int(found[0])

    def change(self, removed: Iterable[bytes], added: Iterable[Row], used: Iterable[tuple[int, bytes]]) -> None:
        """One transaction: rows out, rows in, and when rows were used."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM page WHERE key=?", [(key,) for key in removed])
            self._db.executemany("INSERT OR REPLACE INTO page VALUES(?,?,?,?,?,?)", added)
            self._db.executemany("UPDATE page SET used=? WHERE key=?", used)

    def nonces(self) -> dict[bytes, bytes]:
        with self._lock:
            found = self._db.execute("SELECT name, value FROM meta WHERE name LIKE ?", (_NONCE + "%",)).fetchall()
        return {bytes.fromhex(name[len(_NONCE) :]): value for name, value in found}

    def set_nonce(self, name: bytes, nonce: bytes) -> None:
        """On the disk when this returns."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (_NONCE + name.hex(), nonce))
            self._db.execute("PRAGMA synchronous=NORMAL")

    def setting(self, name: str, default: int | None = None) -> int:
        """A number that the files were made with; the default is kept where there is none yet."""
        with self._lock:
            if default is not None:
                self._db.execute("INSERT OR IGNORE INTO meta VALUES(?,?)", (name, default))
            found = self._db.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        if found is None:
            raise sqlite3.DatabaseError(f"it does not say what {name} is")
        return int(found[0])

    def close(self) -> None:
        with self._lock:
            self._db.close()
