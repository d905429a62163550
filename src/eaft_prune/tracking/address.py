"""What a tracking URI means, and whether it answers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy
from filelock import FileLock

# nothing public makes the schema alone: a client adds a default experiment, with its own paths
from mlflow.store.db.utils import _initialize_tables
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request

from eaft_prune.core.provenance import redact
from eaft_prune.core.types import UserError

_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")
_ALLOWED = "sqlite:///FILE, http(s)://HOST:PORT, postgresql://..., mysql://..., file:DIR"


def scheme(uri: str) -> str:
    """`postgresql` for postgresql+psycopg2://..., empty for a plain path."""
    return urlsplit(uri).scheme.split("+")[0]


def resolve(uri: str) -> tuple[str, str | None]:
    """The URI with its path absolute, and where artifacts go (None: the server decides)."""
    kind = scheme(uri)
    if not uri:
        raise UserError(f"tracking.uri = '' is empty; it takes {_ALLOWED}")
    if kind == "sqlite":
        url = sqlalchemy.make_url(uri)
        if not url.database or url.database == ":memory:":
            raise UserError(f"tracking.uri = {uri!r} names no file; it takes sqlite:///FILE")
        database = Path(url.database).expanduser().resolve()
        database.parent.mkdir(parents=True, exist_ok=True)
        return _absolute(url, database), (database.parent / "artifacts").as_uri()
    if kind in _DATABASES:
        return uri, Path("mlruns/artifacts").resolve().as_uri()
    if kind == "file" or (kind == "" and uri != "databricks"):
        # MLflow wants this word from whoever still chooses its file store
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        path = local_file_uri_to_path(uri) if kind else uri  # a plain path has no escapes
        return Path(path).expanduser().resolve().as_uri(), None
    if kind in ("http", "https") and not urlsplit(uri).hostname:
        raise UserError(f"tracking.uri = {redact(uri)!r} names no host; it takes http://HOST:PORT")
    return uri, None


def _absolute(url: sqlalchemy.URL, database: Path) -> str:
    """The URI of a database file, with whatever its path holds escaped."""
    absolute = url.set(database=str(database)).render_as_string(hide_password=False)
    if "%" not in absolute:
        return absolute
    # MLflow makes the directory that it reads behind sqlite:///, where it takes escapes for names
    return absolute.replace("sqlite:", "sqlite+pysqlite:", 1)


def root(error: BaseException) -> BaseException:
    """The first OSError of a chain (`Connection refused` under layers of clients), or error."""
    first, link = error, error.__cause__ or error.__context__
    while link is not None:
        first = link if isinstance(link, OSError) else first
        link = link.__cause__ or link.__context__
    return first


@contextmanager
def one_creator(uri: str) -> Iterator[None]:
    """Processes of this host take turns: MLflow's schema creation breaks when run twice at once."""
    if scheme(uri) not in _DATABASES:
        yield
        return
    if scheme(uri) == "sqlite":
        lock = Path(f"{sqlalchemy.make_url(uri).database}.lock")
    else:
        key = hashlib.sha256(f"{Path.home()} {uri}".encode()).hexdigest()[:16]
        lock = Path(tempfile.gettempdir()) / f"eaft_prune-mlflow-{key}.lock"
    with FileLock(lock):
        yield


def create_sqlite(uri: str) -> None:
    """Put MLflow's schema in place by one rename: half of it would never be completed.

    An empty file is none: SQLite takes it for a database, and MLflow fills it in place. Call it
    within `one_creator`: a draft that is there already is a dead process's.
    """
    database = Path(str(sqlalchemy.make_url(uri).database)) if scheme(uri) == "sqlite" else None
    if database is None or (database.exists() and database.stat().st_size):
        return
    draft = database.with_name(f".{database.name}.draft")
    draft.unlink(missing_ok=True)
    address = sqlalchemy.URL.create("sqlite", database=str(draft))
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    try:
        _initialize_tables(engine)
        engine.dispose()
        draft.rename(database)
    finally:
        for rest in draft.parent.glob(f"{draft.name}*"):  # and its journal
            rest.unlink()


def probe(uri: str) -> None:
    """Touch the server once: MLflow's own clients retry for a minute and more before they fail."""
    if scheme(uri) in ("http", "https"):
        credentials = get_default_host_creds(uri)
        http_request(credentials, "/health", "GET", max_retries=0, timeout=10)
    elif scheme(uri) in _DATABASES:
        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        sqlalchemy.inspect(engine).get_table_names()
        engine.dispose()
