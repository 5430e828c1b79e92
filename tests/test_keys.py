"""API keys in a file: names, expiry, replacement without a restart, refusals. Over sockets."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio import to_thread
from starlette.datastructures import Headers

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle, write_zoo
from models.registry import Registry
from service.api import auth
from service.api.auth import ApiKeys, Delays, address_of, read_keys, share_of
from service.errors import Unauthorized
from service.infer.engine import Engine
from service.jobs.heads import HeadStore
from tests.kits.jobs import ASYNC, SERIES, Backend, waited
from tests.kits.patience import PATIENCE, soon

OLD, NEW = {"X-API-Key": "the-old-key"}, {"X-API-Key": "the-new-key"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("anna the-old-key\n")
    return path


def replace(path: Path, text: str) -> None:
    """As an administrator or a mounted secret does: a whole file takes the place of another."""
    fresh = path.with_name("keys.new")
    fresh.write_text(text)
    fresh.rename(path)


def hash_of(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


# The file -----------------------------------------------------------------------------------


def test_a_file_has_a_key_a_line_with_name_and_expiry() -> None:
    text = f"""
    # name  key
    anna    the-old-key      # to be replaced
    anna    {hash_of("the-new-key")}  expires=2027-01-31

    ben@example.org  x  expires=2027-01-31T12:00:00+02:00
    """
    anna, replaced, ben = read_keys(text)
    assert (anna.owner, replaced.owner, ben.owner) == ("anna", "anna", "ben@example.org")
    assert anna.digest == hashlib.sha256(b"the-old-key").digest()
    assert replaced.digest == hashlib.sha256(b"the-new-key").digest()
    assert anna.expires is None
    assert replaced.expires == datetime(2027, 2, 1, tzinfo=UTC)  # valid on that day
    assert ben.expires == datetime(2027, 1, 31, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("anna", "NAME KEY"),
        ("anna swordfish soon", "NAME KEY"),
        ("anna swordfish expires=2027-01-31 more", "NAME KEY"),
        ("anna swordfish jobs=1 jobs=2", "each once"),
        ("anna swordfish seats=1", "NAME KEY"),
        ("anna swordfish jobs=0", "jobs=0 is not a positive number"),
        ("anna swordfish pixels=1e9", "pixels=1e9 is not a positive number"),
        ("anna swordfish pixels=9223372036854775808", "not a positive number"),
        ("anna swordfish storage=-1GiB", "such as storage=50GiB, or storage=unlimited"),
        ("anna swordfish requests=", "requests= is not a positive number"),
        (
            "anna swordfish jobs=3\nanna x jobs=4",
            "line 3: an earlier line of 'anna' states another",
        ),
        ("anna swordfish expires=soon", "not a date"),
        ("anna swordfish expires=2027-02-30", "not a date"),
        ("anna swordfish expires=9999-12-31", "not a date"),
        ("anna swordfish expires=2027-01-31T12:00:00", "time zone"),
        ("-anna swordfish", "name must be"),
        ("Anna swordfish", "name must be"),  # one folder with `anna` on some file systems
        ("0123456789abcdef swordfish", "name must be"),  # as the id of a key without a name
        ("anna sha256:c0ffee", "64 hex digits"),
        ("anna swordfish\nben swordfish", "line 3: an earlier line holds the same key"),
        (f"anna swordfish\nben {hash_of('swordfish')}", "line 3"),
    ],
)
def test_a_line_that_is_not_valid_is_named_without_its_key(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"line [23]: ") as caught:
        read_keys(f"# comment\n{line}\n")
    assert message in str(caught.value)
    assert "swordfish" not in str(caught.value)


def test_a_quota_of_one_line_holds_for_all_lines_of_its_caller() -> None:
    text = """
    anna  the-old-key  jobs=3  storage=10GiB
    anna  the-new-key  pixels=unlimited expires=2027-01-31 jobs=3
    ben   x
    """
    old, new, ben = read_keys(text)
    assert old.quotas == new.quotas == {"jobs": 3, "storage": 10 * 2**30, "pixels": None}
    assert not ben.quotas


@pytest.mark.slow
def test_quotas_of_a_key_replace_those_of_the_settings_without_a_restart(
    zoo: Path, keys: Path
) -> None:
    def quotas(headers: dict[str, str]) -> dict[str, str]:
        """Each quota that a response states, by name."""
        response = api.post("/embed", json=SERIES, headers=headers)
        assert response.status_code == 200, response.text
        return dict(re.findall(r'"(\w+)";q=(\d+)', response.headers["RateLimit-Policy"]))

    ben = {"X-API-Key": "of-ben"}
    replace(keys, "anna the-old-key requests=3 jobs=7 pixels=unlimited storage=1MiB\nben of-ben\n")
    with served(
        model_dir=zoo, api_keys_file=keys, max_requests_per_caller=5, max_pixels_per_day=100,
        max_jobs=20,
    ) as api:  # fmt: skip
        assert quotas(OLD) == {"requests": "3", "jobs": "7", "storage": "1048576"}
        assert quotas(ben) == {"requests": "5", "jobs": "10", "pixels": "100"}
        replace(keys, "anna the-old-key pixels=2\nben of-ben pixels=1\n")
        assert soon(lambda: "pixels" in quotas(OLD))  # the series before do not count
        refused = api.post("/embed", json=SERIES, headers=ben)
        assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["pixels"])
        assert "`pixels` of its key" in refused.json()["detail"]


def test_an_expired_key_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("anna swordfish expires=2020-01-01\nben x expires=2999-01-01\n")
    keys = ApiKeys(file=path)
    keys.load()
    assert keys.valid() == 1
    assert keys.check(Headers({"x-api-key": "x"})) == "ben"
    with pytest.raises(Unauthorized, match="'anna' expired at 2020-01-02"):
        keys.check(Headers({"x-api-key": "swordfish"}))


def test_a_file_without_keys_rejects_everyone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    keys = ApiKeys(file=path)
    keys.load()
    for headers in ({}, {"x-api-key": "x"}):
        with pytest.raises(Unauthorized):
            keys.check(Headers(headers))


def test_the_example_of_the_documentation_is_read() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "deploy.md").read_text()
    (example,) = re.findall(r"```\n(# name   key.*?)```", page, re.DOTALL)
    keys = read_keys(example)
    assert [key.owner for key in keys] == ["anna", "anna", "sensors"]
    assert keys[0].expires == datetime(2027, 2, 1, tzinfo=UTC)


# A service that reads it --------------------------------------------------------------------


@pytest.mark.slow
def test_keys_are_replaced_without_a_restart_and_keep_their_jobs(
    zoo: Path, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(model_dir=zoo, api_keys_file=keys) as api:
        api.headers.update(OLD)
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        assert waited(api, job)["status"] == "successful"
        api.headers.pop("X-API-Key")
        replace(keys, f"anna the-old-key\nanna {hash_of('the-new-key')}\nben of-ben\n")
        assert soon(lambda: api.get("/jobs", headers=NEW).status_code == 200)
        for key in (OLD, NEW):
            assert api.get(f"/jobs/{job}/result", headers=key).status_code == 200
        assert api.get(f"/jobs/{job}", headers={"X-API-Key": "of-ben"}).status_code == 404
        replace(keys, "anna the-new-key\n")
        assert soon(lambda: api.get("/jobs", headers=OLD).status_code == 401)
        assert [j["jobID"] for j in api.get("/jobs", headers=NEW).json()["jobs"]] == [job]
        # A mistake in the file shuts nobody out, and is logged once.
        replace(keys, "anna the-new-key expires=tomorrow\n")
        assert soon(lambda: bool(api.get("/jobs", headers=NEW)) and refusals_logged(caplog) == 1)
        keys.unlink()
        assert soon(lambda: bool(api.get("/jobs", headers=NEW)) and refusals_logged(caplog) == 2)
        assert api.get("/jobs", headers=NEW).status_code == 200
        replace(keys, "anna the-old-key\n")
        assert soon(lambda: api.get("/jobs", headers=OLD).status_code == 200)
    assert not any("-key" in record.getMessage() for record in caplog.records)


def refusals_logged(caplog: pytest.LogCaptureFixture) -> int:
    return sum(
        "PIMC_API_KEYS_FILE has changed but is not valid" in r.getMessage() for r in caplog.records
    )


@pytest.mark.slow
def test_a_key_that_comes_into_the_file_brings_its_jobs(
    zoo: Path, keys: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    repeat = {"Idempotency-Key": "1", **OLD, **ASYNC}
    with served(model_dir=zoo, state_dir=state, api_keys=("the-old-key",)) as api:
        job = api.post("/embed", json=SERIES, headers=repeat).json()["jobID"]
    with served(
        model_dir=zoo, state_dir=state, api_keys=("the-old-key",), api_keys_file=keys
    ) as api:
        assert api.post("/embed", json=SERIES, headers=repeat).json()["jobID"] == job
        replace(keys, "anna the-new-key\n")
        assert soon(lambda: api.get(f"/jobs/{job}", headers=NEW).status_code == 200)
        # Without its line it is the key of the environment again, which is another caller.
        assert api.get(f"/jobs/{job}", headers=OLD).status_code == 404


def test_jobs_of_one_owner_meet_those_of_another(backend: Backend) -> None:
    with backend.opened() as store:
        for number, (owner, key) in enumerate([("old", "1"), ("old", "2"), ("anna", "1")]):
            backend.rows(
                "INSERT INTO jobs (id, owner, idempotency_key, task, model, sha256, created, "
                "updated) VALUES (?, ?, ?, 'embed', 'm@1', 'x', 1, 1)",
                *(str(number), owner, key),
            )
        store.adopt({"old": "anna", "nobody": "ben"})
        assert [job.id for job in store.latest("anna", 9)] == ["2", "1", "0"]
        assert store.latest("old", 9) == []
        kept = backend.rows("SELECT id, idempotency_key FROM jobs ORDER BY id")
        assert kept == [("0", None), ("1", "2"), ("2", "1")]


def test_models_of_one_owner_meet_those_of_another(zoo: Path, tmp_path: Path) -> None:
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        for owner, name in (("old", "crops"), ("old", "trees"), ("anna", "trees")):
            write_bundle(
                tmp_path / "heads" / owner, name, "classify-pixels", "pixel", default=False
            )
        heads = HeadStore(tmp_path, engine, most=9)
        kept = engine.own("anna")["trees"]
        heads.adopt({"old": "anna", "nobody": "ben"})
        assert set(engine.own("anna")) == {"crops", "trees"}
        assert engine.own("anna")["trees"] is kept
        assert set(engine.own("old")) == {"trees"}  # it stays where it is
        assert engine.own("ben") == {}
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        HeadStore(tmp_path, engine, most=9)
        assert set(engine.own("anna")) == {"crops", "trees"}


# Refused keys -------------------------------------------------------------------------------


def test_rejections_of_one_address_wait_longer_and_longer() -> None:
    delays = Delays()
    pauses = [delays.pause("192.0.2.1", 0.0) for _ in range(20)]
    assert pauses[:10] == [(0.0, number) for number in range(1, 11)]
    assert [pause for pause, _ in pauses[10:13]] == [0.1, 0.2, 0.4]
    assert pauses[-1] == (5.0, 20)
    assert delays.pause("192.0.2.2", 0.0) == (0.0, 1)
    assert delays.pause("192.0.2.1", 200.0) == (5.0, 21)
    assert delays.pause("192.0.2.1", 600.0) == (0.0, 1)


def test_the_table_of_rejections_is_bounded() -> None:
    delays = Delays()
    for number in range(10_000):
        delays.pause(str(number), 0.0)
    assert len(delays._by_address) <= 4096


@pytest.mark.parametrize(
    ("address", "share"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_a_caller_without_a_key_is_its_address(address: str, share: str) -> None:
    scope = {"client": (address, 1)}
    assert share_of(None, scope) == address_of(scope) == share
    assert share_of("anna", scope) == "anna"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the responses to refused keys that wait."""
    opened = threading.Event()

    async def wait(seconds: float) -> None:
        assert seconds > 0
        await to_thread.run_sync(opened.wait, limiter=anyio.CapacityLimiter(99))

    monkeypatch.setattr(auth, "sleep", wait)
    yield opened
    opened.set()


def test_refused_keys_are_logged_and_slowed_and_others_of_the_address_are_not(
    zoo: Path, keys: Path, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "service.api.auth")
    wrong = {"X-API-Key": "guess"}
    with served(model_dir=zoo, api_keys_file=keys) as api:
        for _ in range(10):
            assert api.get("/models", headers=wrong).status_code == 401
        responses: list[int] = []
        slow = threading.Thread(
            target=lambda: responses.append(
                httpx.get(f"{api.base_url}/models", headers=wrong, timeout=PATIENCE).status_code
            )
        )
        slow.start()
        assert soon(lambda: refused(api) == 11)
        assert api.get("/models", headers=OLD).status_code == 200
        assert api.get("/models").status_code == 401  # a missing key does not count
        assert responses == []
        gate.set()
        slow.join(PATIENCE)
        assert responses == [401]
        assert "pimc_api_keys 1.0" in api.get("/metrics").text
    records: list[Any] = [r for r in caplog.records if r.getMessage() == "API key refused"]
    assert [(r.client, r.refused, r.pause) for r in records[-2:]] == [
        ("127.0.0.1", 10, 0.0),
        ("127.0.0.1", 11, 0.1),
    ]


def refused(api: httpx.Client) -> float:
    lines = api.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("pimc_api_keys_refused_total ")]
    return float(line.split()[1])
