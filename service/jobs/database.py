"""Databases of the job store: SQLite in the state directory, or PostgreSQL for several replicas.

Statements are written once, in SQL that both databases accept, with these placeholders:

    ?            a value
    {now}        the database's clock, seconds since 1970
    {expired}    whether a job's lease has ended; always false in SQLite, which one service uses
    {rests}      whether a waiting job is not to be started yet; always false in SQLite
    {number}     type of an auto-increment column

All other differences are in the two dialects: connecting, beginning a transaction, storing the
version of the schema, and translating errors.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from service.errors import InsufficientStorage, Overloaded, no_descriptors
from service.settings import Settings, SettingsError

if TYPE_CHECKING:
    import psycopg

_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 5.0
"""Longest wait, in seconds, for a lock of another process or thread."""
_IDLE_SECONDS = 10.0
"""Seconds after which PostgreSQL ends the transaction of a replica that has stalled in it."""
_WAL_BYTES = 16 * 2**20
"""Size to which SQLite's write-ahead log is cut after a checkpoint."""
_WRITERS = 0x70696D63
"""Key of the advisory lock of serial transactions: the bytes of `pimc`."""


def database_of(settings: Settings) -> str | None:
    """URL of the PostgreSQL database of the jobs; None for SQLite in the state directory.

    Raises:
        SettingsError: the files of the jobs are in a bucket, and no database is named.
    """
    url = settings.database_url
    if url is None and settings.storage_url is not None:
        raise SettingsError(
            "PIMC_DATABASE_URL: PIMC_STORAGE_URL is set, and jobs with files in a bucket need a "
            "PostgreSQL database: give its URL, such as postgresql://user:password@host/name"
        )
    return None if url is None else url.get_secret_value()


class DuplicateRow(Exception):
    """A row with the same unique columns exists."""


class UnusableDatabase(Exception):
    """The database cannot be used; the message states the reason, and contains no password."""


class Cursor(Protocol):
    """Result of a statement; rows are read by column name or position."""

    @property
    def rowcount(self) -> int:
        """Number of rows that the statement changed."""
        ...

    def fetchone(self) -> Any:  # noqa: ANN401 - columns of any type
        """The next row; None if there is none."""
        ...

    def fetchall(self) -> list[Any]:
        """The remaining rows."""
        ...


class Connection(Protocol):
    """Methods that the connections of both libraries have."""

    def execute(self, statement: Any, values: Any = ..., /) -> Cursor:  # noqa: ANN401 - theirs
        """Execute one statement."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Dialect(Protocol):
    """The differences between databases."""

    name: str
    """For messages."""
    shared: bool
    """Whether several services use the database at once."""

    def connect(self) -> Connection:
        """Open a connection in autocommit mode."""
        ...

    def usable(self, connection: Any) -> bool:  # noqa: ANN401 - the library's
        """Whether a connection is still open."""
        ...

    def sql(self, statement: str) -> str:
        """A statement with its placeholders replaced."""
        ...

    def begin(self, *, serial: bool) -> Sequence[str]:
        """Statements that begin a transaction; a serial one excludes other serial ones."""
        ...

    def version(self, session: Session) -> int:
        """Version of the schema; 0 if there is none."""
        ...

    def set_version(self, session: Session, version: int) -> None:
        """Record the version of the schema."""
        ...

    def translated(self) -> AbstractContextManager[None]:
        """Translate the library's errors.

        Raises:
            DuplicateRow: unique columns exist already.
            InsufficientStorage: the disk is full or failing.
            Overloaded: the database is in use or cannot be reached; or no file descriptor is free.
            UnusableDatabase: any other error of the database.
        """
        ...


class Session:
    """An open connection that executes statements with placeholders.

    Args:
        connection: open.
        dialect: of its database.
    """

    def __init__(self, connection: Connection, dialect: Dialect) -> None:
        self._connection = connection
        self._dialect = dialect

    def execute(self, statement: str, values: Sequence[object] = ()) -> Cursor:
        """Execute a statement."""
        return self._connection.execute(self._dialect.sql(statement), tuple(values))


class Database:
    """One connection, for one thread at a time; opened again if it breaks. Thread-safe.

    Args:
        dialect: of the database.

    Raises:
        UnusableDatabase: it cannot be opened.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._mutex = threading.Lock()
        with dialect.translated():
            self._connection = dialect.connect()

    @property
    def shared(self) -> bool:
        """Whether several services use it at once."""
        return self.dialect.shared

    def close(self) -> None:
        """Close the connection."""
        with self._alone():
            self._connection.close()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session whose statements are committed one by one."""
        with self._alone(), self.dialect.translated():
            yield self._session()

    @contextmanager
    def transaction(self, *, serial: bool = False) -> Iterator[Session]:
        """A transaction: committed at the end of the context, rolled back on an exception.

        Args:
            serial: whether its result depends on rows that other transactions may add or change,
                such as a count; a change to rows of one job, guarded by their lease, does not.
        """
        with self._alone(), self.dialect.translated():
            session = self._session()
            for statement in self.dialect.begin(serial=serial):
                session.execute(statement)
            try:
                yield session
            except BaseException:
                # A full disk or a broken connection has ended the transaction already.
                with suppress(Exception):
                    session.execute("ROLLBACK")
                raise
            self._commit(session)

    def _commit(self, session: Session) -> None:
        try:
            session.execute("COMMIT")
        except BaseException as error:
            with suppress(Exception):
                session.execute("ROLLBACK")
            if self.dialect.shared and not self.dialect.usable(self._connection):
                raise Overloaded(
                    "the connection to the job store's database broke while a change was stored: "
                    "look for the job with GET /jobs, or repeat the request with the same "
                    "Idempotency-Key",
                    retry_after=10,
                    uncertain=True,
                ) from error
            raise

    def _session(self) -> Session:
        if not self.dialect.usable(self._connection):
            try:
                self._connection = self.dialect.connect()
            except UnusableDatabase as error:
                _LOG.error("database cannot be used", extra={"reason": str(error)})
                raise unreachable() from error
        return Session(self._connection, self.dialect)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the connection for this thread.

        Raises:
            Overloaded: other threads hold it, usually because another process locks the database.
        """
        if not self._mutex.acquire(timeout=2 * _BUSY_SECONDS):
            raise in_use(self.dialect.name)
        try:
            yield
        finally:
            self._mutex.release()


def in_use(name: str) -> Overloaded:
    """The error for a database that another process locks."""
    return Overloaded(
        f"the job store ({name}) has been in use by another process for more than "
        f"{_BUSY_SECONDS:g} s; retry later",
        retry_after=10,
    )


def unreachable() -> Overloaded:
    """The error for a database server that does not respond; only the log contains its address."""
    return Overloaded(
        "the job store's database cannot be reached; nothing was started, retry later",
        retry_after=10,
    )


# SQLite --------------------------------------------------------------------------------------


class Sqlite:
    """A file that one service uses.

    Args:
        path: created if missing.
    """

    shared = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = path.name

    def connect(self) -> sqlite3.Connection:
        """See `Dialect`."""
        db = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS
        )
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        # A client that was sent a job's address relies on its row.
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        return db

    def usable(self, connection: Any) -> bool:  # noqa: ANN401, ARG002 - a file stays open
        """See `Dialect`."""
        return True

    def sql(self, statement: str) -> str:
        """See `Dialect`."""
        return _sqlite(statement)

    def begin(self, *, serial: bool) -> Sequence[str]:  # noqa: ARG002 - there is one writer
        """See `Dialect`."""
        return ("BEGIN IMMEDIATE",)

    def version(self, session: Session) -> int:
        """See `Dialect`."""
        return int(session.execute("PRAGMA user_version").fetchone()[0])

    def set_version(self, session: Session, version: int) -> None:
        """See `Dialect`."""
        session.execute(f"PRAGMA user_version = {version}")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """See `Dialect`."""
        try:
            yield
        except sqlite3.IntegrityError as error:
            raise DuplicateRow(str(error)) from error
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
                raise in_use(self.name) from error
            if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}:
                busy = no_descriptors(error)
                if busy is not None:
                    raise busy from error
            if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
                raise _full() from error
            raise UnusableDatabase(str(error)) from error
        except sqlite3.Error as error:
            raise UnusableDatabase(str(error)) from error


@lru_cache(maxsize=256)
def _sqlite(statement: str) -> str:
    return (
        statement.replace("{now}", "((julianday('now') - 2440587.5) * 86400.0)")
        .replace("{expired}", "FALSE")
        .replace("{rests}", "FALSE")
        .replace("{number}", "INTEGER PRIMARY KEY AUTOINCREMENT")
    )


# PostgreSQL ----------------------------------------------------------------------------------


class Postgres:
    """A server's database, which replicas share.

    Args:
        url: `postgresql://…`, as libpq reads it.

    Raises:
        SettingsError: psycopg is not installed.
    """

    shared = True
    name = "PostgreSQL"

    def __init__(self, url: str) -> None:
        try:
            import psycopg  # noqa: F401 - only checks that it is installed
        except ImportError as error:
            raise SettingsError(
                "PIMC_DATABASE_URL needs psycopg, which is not installed: "
                "pip install --editable '.[service,cluster]'"
            ) from error
        self._url = url

    def connect(self) -> psycopg.Connection[Any]:
        """See `Dialect`."""
        import psycopg

        # A lost server or network is detected after 10 s, unless the URL sets other values.
        patience: dict[str, Any] = {
            "connect_timeout": "5",
            "keepalives_idle": "5",
            "keepalives_interval": "2",
            "keepalives_count": "3",
            "tcp_user_timeout": "10000",
            "application_name": "pimc",
        }
        try:
            options = patience | psycopg.conninfo.conninfo_to_dict(self._url)
        except psycopg.ProgrammingError:
            # Its message contains the URL, and with it the password.
            raise UnusableDatabase("its URL is not valid") from None
        try:
            db: psycopg.Connection[Any] = psycopg.connect(
                psycopg.conninfo.make_conninfo(**options), autocommit=True, row_factory=_rows
            )
            # No prepared statements: a pooler may use another connection for each transaction.
            db.prepare_threshold = None
            # A client that was sent a job's address relies on its row. A replica that stalls must
            # not block the others.
            db.execute(
                "SET synchronous_commit = on; SET default_transaction_isolation = 'read committed';"
                f" SET lock_timeout = '{_BUSY_SECONDS:g}s';"
                f" SET idle_in_transaction_session_timeout = '{_IDLE_SECONDS:g}s'"
            )
        except psycopg.Error as error:
            raise UnusableDatabase(" ".join(str(error).split())) from error
        return db

    def usable(self, connection: Any) -> bool:  # noqa: ANN401 - psycopg's
        """See `Dialect`."""
        return not connection.closed

    def sql(self, statement: str) -> str:
        """See `Dialect`."""
        return _postgres(statement)

    def begin(self, *, serial: bool) -> Sequence[str]:
        """See `Dialect`."""
        lock = f"SELECT pg_advisory_xact_lock({_WRITERS})"
        return ("BEGIN", lock) if serial else ("BEGIN",)

    def version(self, session: Session) -> int:
        """See `Dialect`."""
        # Not to_regclass(): it may use a cached lookup from before another replica created the
        # table.
        found = session.execute(
            "SELECT 1 FROM pg_class WHERE relname = 'store' AND pg_table_is_visible(oid)"
        )
        if found.fetchone() is None:
            return 0
        return int(session.execute("SELECT version FROM store").fetchone()[0])

    def set_version(self, session: Session, version: int) -> None:
        """See `Dialect`."""
        if self.version(session) == 0:
            session.execute("CREATE TABLE store (version INTEGER NOT NULL, id TEXT NOT NULL)")
            session.execute("INSERT INTO store VALUES (?, ?)", (version, str(uuid.uuid4())))
        session.execute("UPDATE store SET version = ?", (version,))

    @contextmanager
    def translated(self) -> Iterator[None]:
        """See `Dialect`."""
        import psycopg

        try:
            yield
        except psycopg.errors.UniqueViolation as error:
            raise DuplicateRow(str(error)) from error
        except psycopg.errors.LockNotAvailable as error:
            raise in_use(self.name) from error
        except psycopg.errors.DiskFull as error:
            raise _full() from error
        except psycopg.OperationalError as error:
            raise unreachable() from error
        except psycopg.Error as error:
            raise UnusableDatabase(" ".join(str(error).split())) from error


@lru_cache(maxsize=256)
def _postgres(statement: str) -> str:
    now = "extract(epoch FROM clock_timestamp())::float8"
    return (
        statement.replace("?", "%s")
        .replace("{now}", now)
        .replace("{expired}", f"expires < {now}")
        .replace("{rests}", f"coalesce(expires > {now}, FALSE)")
        .replace("{number}", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY")
    )


class _Row(tuple[Any, ...]):
    """A row by name and by position, as `sqlite3.Row`."""

    names: Sequence[str]

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401 - of any type
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> list[str]:
        """Names of the columns."""
        return list(self.names)


def _rows(cursor: psycopg.Cursor[Any]) -> Any:  # noqa: ANN401 - a row factory
    names = [column.name for column in cursor.description or ()]

    def made(values: Sequence[Any]) -> _Row:
        row = _Row(values)
        row.names = names
        return row

    return made


def _full() -> InsufficientStorage:
    return InsufficientStorage(
        "the job store cannot be written (PIMC_STATE_DIR): the server's disk is full or failing; "
        "the administrator must free space"
    )
