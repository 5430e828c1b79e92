"""Rows of the callers' own models whose files are in a bucket: owner, name and version.

`heads` serves the models. Models in a folder have no rows: the name of the folder is their record.
"""

from __future__ import annotations

from service.jobs.database import Database

HEADS = "heads"
"""Name of the folder of the callers' own models, and key of those in a bucket."""


class HeadRows:
    """The records of models in a bucket. Thread-safe.

    Args:
        database: of the job store.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, owner: str) -> dict[str, str]:
        """A caller's models: their versions by name."""
        with self._db.read() as db:
            rows = db.execute("SELECT name, version FROM heads WHERE owner = ?", (owner,))
            return {row["name"]: row["version"] for row in rows.fetchall()}

    def owners(self) -> list[str]:
        """Callers that have models."""
        with self._db.read() as db:
            rows = db.execute("SELECT DISTINCT owner FROM heads ORDER BY owner").fetchall()
        return [owner for (owner,) in rows]

    def add(self, owner: str, name: str, version: str, *, most: int) -> bool:
        """Record a caller's model, whose files are in the storage.

        Args:
            owner: the caller.
            name: of the model.
            version: key of its files below `heads`.
            most: largest number of models of one caller.

        Returns:
            Whether it was recorded: not if the caller has as many already.

        Raises:
            DuplicateRow: the caller has a model of that name.
        """
        with self._db.transaction(serial=True) as db:
            (owned,) = db.execute("SELECT count(*) FROM heads WHERE owner = ?", (owner,)).fetchone()
            db.execute("INSERT INTO heads VALUES (?, ?, ?)", (owner, name, version))
            if owned >= most:
                db.execute("DELETE FROM heads WHERE owner = ? AND name = ?", (owner, name))
        return bool(owned < most)

    def remove(self, owner: str, name: str) -> str | None:
        """Remove the record of a caller's model; returns its version, None if there is none."""
        with self._db.transaction() as db:
            row = db.execute(
                "DELETE FROM heads WHERE owner = ? AND name = ? RETURNING version", (owner, name)
            ).fetchone()
        return row["version"] if row else None

    def adopt(self, former: str, owner: str) -> list[str]:
        """Move the records of a former owner's models to a new owner.

        Returns:
            Names of the models that stay, because the new owner has one of the same name.
        """
        with self._db.transaction(serial=True) as db:
            db.execute(
                "UPDATE heads SET owner = ? WHERE owner = ? "
                "AND name NOT IN (SELECT name FROM heads WHERE owner = ?)",
                (owner, former, owner),
            )
            rows = db.execute("SELECT name FROM heads WHERE owner = ?", (former,)).fetchall()
        return [name for (name,) in rows]
