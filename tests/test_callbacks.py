"""Callbacks: over sockets, verified as receivers do, retried by the clock, across restarts."""

from __future__ import annotations

import base64
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from rasterio.windows import Window
from standardwebhooks import Webhook, WebhookVerificationError

from benchmarks.serving import served
from service.errors import ForbiddenReference, RasterError
from service.jobs import callbacks
from service.jobs.backup import back_up, restore
from service.jobs.callbacks import (
    PAUSES,
    CallbackSender,
    caller_secret,
    check_subscriber,
    secret_text,
    signed,
)
from service.jobs.job import Job
from service.jobs.store import JobStore, LeaseLost
from service.run.plan import Plan
from service.run.request import Subscriber
from service.run.windows import Step
from service.settings import Settings, SettingsError, read_settings
from service.telemetry import Metrics
from tests.kits.client import Received, Reply, serving
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import ASYNC, SERIES, series_plan, stack, waited
from tests.kits.metrics import metric
from tests.kits.patience import PATIENCE, soon

SECRET = secret_text(b"0123456789abcdef0123456789abcdef")
OTHER = secret_text(b"fedcba9876543210fedcba9876543210")
DELIVERED = 'pimc_callbacks_total{event="success",outcome="delivered"}'
STEP = Step(stage="predictions", number=0, window=Window(0, 0, 4, 2))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def plan(zoo: Path) -> Iterator[Plan]:
    with series_plan(zoo) as made:
        yield made


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt fails because the machine is busy: here receivers respond, if slowly."""
    monkeypatch.setattr(callbacks, "_RESPONSE_SECONDS", PATIENCE)


@dataclass
class Receiver:
    """A server that replies with the given statuses, one after the other, then with 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    got: list[Received] = field(default_factory=list)
    arrived: Queue[Received] = field(default_factory=Queue)

    def reply(self, request: Received) -> Reply:
        self.got.append(request)
        self.arrived.put(request)
        status = self.statuses.pop(0) if self.statuses else 200
        return Reply(status=status, headers=self.headers, drop=status == 0)

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    with serving(made.reply) as (url, _):
        made.url = url
        yield made


class Clock:
    """Begins ahead of the store's own clock, so that what is stored is due however long it takes.

    Receivers accept signatures of up to five minutes ahead.
    """

    def __init__(self) -> None:
        self.now = time.time() + 120.0

    def __call__(self) -> float:
        return self.now


def subscriber(receiver: Receiver, **how: Any) -> Subscriber:
    given = {
        "success": f"{receiver.url}/done", "failed": f"{receiver.url}/failed",
        "progress": f"{receiver.url}/progress",
    }  # fmt: skip
    return Subscriber(**given | how)


@contextmanager
def opened(folder: Path) -> Iterator[JobStore]:
    store = JobStore(folder, ttl=9e9, max_waiting=9)
    try:
        yield store
    finally:
        store.close()


def settings_for(receiver: Receiver, **how: Any) -> Settings:
    return Settings(
        **{"callback_hosts": receiver.host, "callback_secrets": SECRET, **how}  # type: ignore[arg-type]
    )


def sender(
    store: JobStore, receiver: Receiver, clock: Callable[[], float], *, closing: Any = None,
    metrics: Metrics | None = None, **how: Any,
) -> CallbackSender:  # fmt: skip
    return CallbackSender(
        store.outbox,
        settings_for(receiver, **how),
        document=lambda job, event: {"jobID": job.id, "status": job.status, "event": event},
        metrics=metrics or Metrics(),
        closing=closing or threading.Event(),
        clock=clock,
        jitter=lambda: 0.0,
    )


def accepted(store: JobStore, plan: Plan, whom: Subscriber | None, owner: str = "") -> Job:
    folder = store.requests
    request = replace(plan.request, subscriber=whom)
    store.accept(replace(plan, request=request), folder, owner=owner)
    job = store.take()
    assert job is not None
    return job


def verified(request: Received, owner: str = "", secret: str = SECRET) -> Any:
    """The body, if the library of Standard Webhooks accepts the signature."""
    whole = base64.b64decode(secret.removeprefix("whsec_"))
    return Webhook(caller_secret(whole, owner)).verify(request.body, request.headers)


# Delivery -------------------------------------------------------------------------------------


def test_a_receiver_that_fails_is_called_again_also_after_a_restart(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    receiver.statuses = [503, 0, 500]  # 0: the connection is dropped
    with opened(tmp_path) as store:
        job = accepted(store, plan, subscriber(receiver, progress=None))
        store.succeed(job)
        clock.now += 1
        assert sender(store, receiver, clock).send_due() == 1
        assert sender(store, receiver, clock).send_due() == 0  # not before its time
    for n, pause in enumerate(PAUSES[:3], start=1):
        with opened(tmp_path) as store:
            clock.now += pause - 0.5
            assert sender(store, receiver, clock).send_due() == 0
            clock.now += 0.5
            assert sender(store, receiver, clock).send_due() == 1
            assert len(receiver.got) == n + 1
    with opened(tmp_path) as store:
        assert store.outbox.next_due() is None
    ids = {request.headers["webhook-id"] for request in receiver.got}
    assert len(ids) == 1
    times = [int(request.headers["webhook-timestamp"]) for request in receiver.got]
    assert times == sorted(set(times))
    for request in receiver.got:
        assert (request.method, request.path) == ("POST", "/done")
        assert request.headers["host"] == receiver.host
        assert request.headers["content-type"] == "application/json"
    # The library also rejects times that are far from its own clock, so the first alone.
    assert verified(receiver.got[0]) == {
        "jobID": job.id, "status": "successful", "event": "success",
    }  # fmt: skip


@pytest.mark.slow
def test_a_callback_is_given_up_after_the_last_pause(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock, metrics = Clock(), Metrics()
    receiver.statuses = [500] * 50
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        for pause in (1, *PAUSES):
            clock.now += pause
            assert sender(store, receiver, clock, metrics=metrics).send_due() == 1
        assert store.outbox.next_due() is None
    assert len(receiver.got) == len(PAUSES) + 1
    text = metrics.text().decode()
    assert f'pimc_callbacks_total{{event="success",outcome="failed"}} {len(PAUSES)}.0' in text
    assert 'pimc_callbacks_total{event="success",outcome="given_up"} 1.0' in text
    assert "pimc_callbacks_waiting 0.0" in text


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(
    plan: Plan, tmp_path: Path, receiver: Receiver, status: int
) -> None:
    clock = Clock()
    receiver.statuses, receiver.headers = [status], {"Location": f"{receiver.url}/elsewhere"}
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        clock.now += 1
        sender(store, receiver, clock).send_due()
        assert store.outbox.count() == 1
    assert [request.path for request in receiver.got] == ["/done"]


def test_gone_means_never_again(plan: Plan, tmp_path: Path, receiver: Receiver) -> None:
    clock = Clock()
    receiver.statuses = [410]
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        clock.now += 1
        sender(store, receiver, clock).send_due()
        assert store.outbox.count() == 0


def test_a_receiver_that_fails_holds_up_no_other(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store, serving(lambda _: Reply(status=500)) as (broken, _):
        bad = Receiver(url=broken)
        for _ in range(20):
            store.succeed(accepted(store, plan, subscriber(bad, progress=None)))
        clock.now += 1
        hosts = f"{bad.host},{receiver.host}"
        assert sender(store, receiver, clock, callback_hosts=hosts).send_due() == 16
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        clock.now += 3600  # all are due, the new one is first
        sender(store, receiver, clock, callback_hosts=hosts).send_due()
    assert [request.path for request in receiver.got] == ["/done"]


def test_a_stop_leaves_what_is_under_way_to_the_next_start(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock, closing, held = Clock(), threading.Event(), threading.Event()

    def never(_: Received) -> Reply:
        closing.set()  # once the request is there, the service stops
        held.wait(PATIENCE)
        return Reply()

    with serving(never) as (url, _):
        slow = Receiver(url=url)
        with opened(tmp_path) as store:
            store.succeed(accepted(store, plan, subscriber(slow, progress=None)))
            clock.now += 1
            sender(store, slow, clock, closing=closing).run()
            assert store.outbox.count() == 1
        held.set()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        assert db.execute("SELECT attempts FROM callbacks").fetchall() == [(0,)]


# Events ---------------------------------------------------------------------------------------


def test_progress_is_called_at_the_start_and_each_further_tenth(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store:
        job = accepted(store, plan, subscriber(receiver))
        calls = sender(store, receiver, clock)

        def windows(*percents: int) -> None:
            for percent in percents:
                store.count_window(job, STEP, offset=0, length=1, progress=percent)
            clock.now += 1
            calls.send_due()

        windows(3, 9)
        windows(9, 10, 14)
        windows(15, 19)
        windows(20, 30, 41)  # the last one alone: those before it were not sent yet
        store.put_back(job)
        job = store.take()  # a resumed job has begun before
        assert job is not None
        windows()
        store.count_window(job, STEP, offset=0, length=1, progress=77)
        store.succeed(job)  # in place of the progress
        clock.now += 1
        calls.send_due()
    assert [request.path for request in receiver.got] == [*["/progress"] * 3, "/done"]
    assert len({request.headers["webhook-id"] for request in receiver.got}) == 4


def test_a_failure_is_called_and_nothing_else(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store:
        store.fail(accepted(store, plan, subscriber(receiver)), RasterError("broken"))
        clock.now += 1
        sender(store, receiver, clock).send_due()
    (request,) = receiver.got
    assert request.path == "/failed"
    assert verified(request)["status"] == "failed"


@pytest.mark.parametrize("when", ["running", "finished"])
def test_a_dismissed_job_calls_nobody(
    plan: Plan, tmp_path: Path, receiver: Receiver, when: str
) -> None:
    with opened(tmp_path) as store:
        job = accepted(store, plan, subscriber(receiver))
        if when == "finished":
            store.succeed(job)
        store.dismiss("", job.id)
        if when == "running":
            with pytest.raises(LeaseLost):
                store.succeed(job)  # its run ends later
        with pytest.raises(LeaseLost):
            store.count_window(job, STEP, offset=0, length=1, progress=50)
        assert store.outbox.count() == 0


def test_an_event_without_an_address_is_not_queued(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    whom = Subscriber(success=f"{receiver.url}/done")
    with opened(tmp_path) as store:
        job = accepted(store, plan, whom)
        store.count_window(job, STEP, offset=0, length=1, progress=50)
        store.fail(job, RasterError("broken"))
        quiet = accepted(store, plan, None)
        store.succeed(quiet)
        assert store.outbox.count() == 0
        assert store.job_requests.read(accepted(store, plan, whom)).subscriber == whom


def test_a_job_that_expires_takes_its_callbacks_with_it(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver)))
        store.sweep(9e10)
        assert store.outbox.count() == 0


# Upgrades and backups -------------------------------------------------------------------------


def test_a_store_of_the_release_before_is_upgraded(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    with opened(tmp_path) as store:
        kept = accepted(store, plan, None)
        store.put_back(kept)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:  # as schema 3 was
        db.executescript(
            "DROP TABLE callbacks; ALTER TABLE jobs DROP COLUMN subscriber; "
            "ALTER TABLE jobs DROP COLUMN lease; ALTER TABLE jobs DROP COLUMN expires; "
            "ALTER TABLE windows DROP COLUMN lease; DROP TABLE heads; "
            "PRAGMA user_version = 3"
        )
    with opened(tmp_path) as store:
        job = store.take()
        assert job is not None
        assert (job.id, job.subscriber) == (kept.id, None)
        store.succeed(job)
        store.succeed(accepted(store, plan, subscriber(receiver)))
        assert store.outbox.count() == 1


def test_a_restored_backup_calls_what_was_waiting(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    with opened(tmp_path / "state") as store:
        job = accepted(store, plan, subscriber(receiver, progress=None))
        (store.files.folder(job) / "result-1").mkdir()
        store.succeed(job)
        back_up(tmp_path / "state", tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "new")
    clock = Clock()
    clock.now += 1
    with opened(tmp_path / "new") as store:
        assert sender(store, receiver, clock).send_due() == 1
    assert verified(receiver.got[0])["jobID"] == job.id


# Signatures -----------------------------------------------------------------------------------


def test_the_signature_is_the_one_of_the_specification() -> None:
    # The example of the specification's reference libraries.
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = signed(
        b'{"test": 2432232314}',
        message="msg_p5jXN8AQM9LWM0D4loKWxJek",
        seconds=1614265330,
        secrets=[secret],
    )
    assert found["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_caller_has_a_secret_of_its_own(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None), owner="anna"))
        clock.now += 1
        sender(store, receiver, clock).send_due()
    (request,) = receiver.got
    assert verified(request, "anna")
    for wrong in ("ben", ""):
        with pytest.raises(WebhookVerificationError):
            verified(request, wrong)
    altered = replace(request, body=request.body.replace(b"successful", b"failed"))
    with pytest.raises(WebhookVerificationError):
        verified(altered, "anna")


def test_while_a_secret_is_replaced_both_verify(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        clock.now += 1
        sender(store, receiver, clock, callback_secrets=f"{OTHER},{SECRET}").send_due()
    (request,) = receiver.got
    assert verified(request, secret=SECRET) == verified(request, secret=OTHER)


# Where callbacks may go -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/x", "http://169.254.169.254/latest", "http://localhost:1/x",
        "http://user:password@hooks.example/x", "ftp://hooks.example/x", "file:///etc/passwd",
        "/etc/passwd", "hooks.example/x", "http://hooks.example:8080/x", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize("event", ["success", "failed", "progress"])
def test_other_addresses_are_rejected_when_the_job_is(url: str, event: str) -> None:
    settings = Settings(callback_hosts="hooks.example:443", callback_secrets=SECRET)  # type: ignore[arg-type]
    good = Subscriber(success="https://hooks.example/a")
    check_subscriber(good, settings)
    with pytest.raises(ForbiddenReference, match=r"subscriber\.\w+Uri"):
        check_subscriber(replace(good, **{event: url}), settings)


def test_without_hosts_there_are_no_callbacks() -> None:
    with pytest.raises(ForbiddenReference, match="PIMC_CALLBACK_HOSTS"):
        check_subscriber(Subscriber(success="https://hooks.example/a"), Settings())


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.1.2.3"], ["93.184.216.34", "::1"]])
def test_a_name_that_leads_inside_is_not_called(
    plan: Plan, tmp_path: Path, receiver: Receiver, addresses: list[str]
) -> None:
    clock = Clock()
    port = receiver.host.rpartition(":")[2]

    async def resolver(_host: str, _port: int) -> list[str]:
        return addresses

    whom = Subscriber(success=f"http://hooks.example:{port}/done")
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, whom))
        clock.now += 1
        settings = Settings(callback_hosts="hooks.example", callback_secrets=SECRET)  # type: ignore[arg-type]
        CallbackSender(
            store.outbox, settings, document=lambda *_: {}, metrics=Metrics(), clock=clock,
            closing=threading.Event(), resolver=resolver,
        ).send_due()  # fmt: skip
        assert store.outbox.count() == 1
    assert receiver.got == []


def test_a_host_that_is_no_longer_allowed_is_not_called(
    plan: Plan, tmp_path: Path, receiver: Receiver
) -> None:
    clock = Clock()
    with opened(tmp_path) as store:
        store.succeed(accepted(store, plan, subscriber(receiver, progress=None)))
        clock.now += 1
        sender(store, receiver, clock, callback_hosts="other.example").send_due()
    assert receiver.got == []


@pytest.mark.parametrize(
    ("secrets", "reason"),
    [("", "need a secret that signs them"), ("whsec_c2hvcnQ=", "24 to 64"), ("plain", "24 to 64"),
     (f"{SECRET},whsec_%", "24 to 64")],
)  # fmt: skip
def test_hosts_need_a_good_secret(
    monkeypatch: pytest.MonkeyPatch, secrets: str, reason: str
) -> None:
    monkeypatch.setenv("PIMC_CALLBACK_HOSTS", "hooks.example")
    monkeypatch.setenv("PIMC_CALLBACK_SECRETS", secrets)
    with pytest.raises(SettingsError, match=reason) as error:
        read_settings()
    assert "PIMC_CALLBACK_SECRETS" in str(error.value)
    assert not secrets or secrets not in str(error.value)


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_CALLBACK_SECRETS", SECRET)
    assert "0123" not in repr(read_settings())
    assert SECRET not in repr(read_settings())


# Through HTTP ---------------------------------------------------------------------------------


def called(receiver: Receiver) -> str:
    return json.dumps(
        {"successUri": f"{receiver.url}/done", "failedUri": f"{receiver.url}/failed",
         "inProgressUri": f"{receiver.url}/progress"}
    )  # fmt: skip


def test_a_job_of_the_service_calls_back(
    zoo: Path, tmp_path: Path, receiver: Receiver, gate: Gate
) -> None:
    files = stack(tmp_path)
    how = {"model_dir": zoo, "callback_hosts": receiver.host, "callback_secrets": SECRET}
    with served(**how) as api:
        secret = api.get("/callbacks").json()["secret"]
        with gate.held():
            response = api.post(
                "/classify-pixels", files=files, headers=ASYNC,
                data={"model": HELD, "subscriber": called(receiver)},
            )  # fmt: skip
            assert response.status_code == 202, response.text
            begun = receiver.arrived.get(timeout=PATIENCE)
        assert begun.path == "/progress"
        assert Webhook(secret).verify(begun.body, begun.headers)["status"] == "running"
        ended = begun
        while ended.path == "/progress":
            ended = receiver.arrived.get(timeout=PATIENCE)
        document = Webhook(secret).verify(ended.body, ended.headers)
        job = response.json()["jobID"]
        assert (ended.path, document["jobID"]) == ("/done", job)
        assert document == api.get(f"/jobs/{job}").json()
        # It has arrived before the service has read the receiver's response.
        assert soon(lambda: metric(api, DELIVERED) == 1)
        series = {**SERIES, "subscriber": json.loads(called(receiver)), "model": "embed-pixel"}
        job = api.post("/embed", json=series, headers=ASYNC).json()["jobID"]
        assert waited(api, job)["status"] == "successful"
        while (last := receiver.arrived.get(timeout=PATIENCE)).path == "/progress":
            pass
        assert Webhook(secret).verify(last.body, last.headers)["jobID"] == job


def test_a_subscriber_is_of_a_job_on_an_allowed_host(zoo: Path, receiver: Receiver) -> None:
    how = {"model_dir": zoo, "callback_hosts": "hooks.example", "callback_secrets": SECRET}
    with served(**how) as api:
        given = {**SERIES, "subscriber": {"successUri": "https://hooks.example/x"}}
        response = api.post("/embed", json=given)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert "respond-async" in response.json()["detail"]
        elsewhere = {**SERIES, "subscriber": json.loads(called(receiver))}
        response = api.post("/embed", json=elsewhere, headers=ASYNC)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden_reference")
        assert api.get("/jobs").json()["jobs"] == []
        wrong = {**SERIES, "subscriber": {"failedUri": "https://hooks.example/x"}}
        response = api.post("/embed", json=wrong, headers=ASYNC)
        assert response.json()["errors"][0]["field"] == "subscriber.successUri"


def test_a_service_without_hosts_sends_none(zoo: Path, receiver: Receiver) -> None:
    with served(model_dir=zoo) as api:
        given = {**SERIES, "subscriber": json.loads(called(receiver))}
        response = api.post("/embed", json=given, headers=ASYNC)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden_reference")
        assert api.get("/callbacks").status_code == 404
