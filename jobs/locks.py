"""One at a time: rebuilds of a dataset, trainings of a run, promotions of a model, schedulers of a store.

The lock of a store's folder is the system's, `flock`, which ends with its process. Machines that share a
store at a URI have tickets there besides: objects in `locks/<name>/`. Whoever writes one and then sees no
other has the lock: of two that write at a time at least one sees the other, as a list shows whatever was
written before it began. A ticket is written anew while its holder lives; how old it is compared with one's
own, by the clock over there, tells that its holder does not.
"""

import fcntl
import json
import logging
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from jobs.store import remote

if TYPE_CHECKING:
    from pipelines.remote import Remote

log = logging.getLogger(__name__)
BEAT_S = 15.0  # between two writings of a ticket
DEAD_S = 90.0  # nobody writes it any more; both chosen by us
TRIES = 3  # of two that see each other both step back, and come again after a while of chance
APART_S = 3.0


class Busy(ValueError):
    """Another process is at it; the same command will do later. The exit status is that of sysexits.h."""

    exit_status = os.EX_TEMPFAIL


@contextmanager
def promotion_lock(store: Path, model: str) -> Iterator[None]:
    """One promotion of a model at a time; others wait. The system frees the lock when the process ends."""
    name = f"promote-{model}"
    with _lock_file(store, name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with _ticket(store, name):
            yield


@contextmanager
def rebuild_lock(store: Path, dataset: str) -> Iterator[None]:
    """One rebuild of a dataset at a time, with all that follows it. Raises `Busy` where another runs."""
    name, refusal = f"rebuild-{dataset}", f"dataset {dataset!r} is being rebuilt by another process"
    with _alone(store, name, refusal), _ticket(store, name, refusal):
        yield


@contextmanager
def training_lock(store: Path, run: str) -> Iterator[None]:
    """One training of a run at a time: two would overwrite each other's checkpoints. Raises `Busy`."""
    name, refusal = f"train-{run}", f"the training {run!r} is under way in another process"
    with _alone(store, name, refusal), _ticket(store, name, refusal):
        yield


@contextmanager
def scheduler_lock(store: Path) -> Iterator[None]:
    """One scheduler a store's folder, which keeps its times. Raises `Busy` where another runs."""
    with _alone(store, "schedule", f"another scheduler keeps the schedule of {store}"):
        yield


@contextmanager
def _alone(store: Path, name: str, refusal: str) -> Iterator[None]:
    """A lock that nobody waits for; the file says who has it."""
    with _lock_file(store, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            raise Busy(f"{refusal} (host and process: {holder}); wait for it, or end it") from None
        file.truncate(0)
        file.write(f"{_process()}\n")
        file.flush()
        yield


@contextmanager
def _lock_file(store: Path, name: str) -> Iterator[IO[str]]:
    path = store / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        yield file


@contextmanager
def _ticket(store: Path, name: str, refusal: str = "") -> Iterator[None]:
    """The lock of the store's other side, if it has one, for whoever has that of this side.

    With a `refusal` nobody waits for it.
    """
    there = remote(store)
    if there is None:
        yield
        return
    place, side, over = there / f"locks/{name}", _side(store), threading.Event()
    own = f"{side}-{secrets.token_hex(8)}.json"
    beat = threading.Thread(target=_beat, args=(place, own, over), name="lock", daemon=True)
    try:
        tries = 0
        while holder := _holder(place, own, side):
            tries += 1
            if refusal and tries == TRIES:
                raise Busy(
                    f"{refusal} (host and process: {holder}); wait for it, or end it: {DEAD_S:g} s after it "
                    "was killed its lock is gone"
                )
            time.sleep(random.uniform(0, APART_S))
        beat.start()
        yield
    finally:
        over.set()
        if beat.ident:
            beat.join()
        with suppress(OSError):  # then it dies of age
            place.delete(own)


def _holder(place: "Remote", own: str, side: str) -> str:
    """Who else has the lock; "" where nobody has, and this ticket stays."""
    place.write(own, json.dumps(_process()).encode())
    tickets = place.list()
    now = tickets[own].mtime_ns
    for other, file in tickets.items():
        if other == own:
            continue
        # whoever wrote one on this side had the lock of this side, which is ours now
        if other.startswith(side) or now - file.mtime_ns > DEAD_S * 1e9:
            with suppress(FileNotFoundError):
                place.delete(other)
            continue
        try:
            holder = str(json.loads(place.read(other)))
        except FileNotFoundError:  # it ended meanwhile
            continue
        except (OSError, ValueError):  # it lives: its ticket is being written
            holder = "unknown"
        place.delete(own)
        return holder
    return ""


def _beat(place: "Remote", own: str, over: threading.Event) -> None:
    """Write the ticket anew; where it is gone, or was not written for too long, interrupt the process."""
    written = time.monotonic()
    while not over.wait(BEAT_S):
        try:
            if own in place.list():
                place.write(own, json.dumps(_process()).encode())
                written = time.monotonic()
                continue
        except OSError as error:
            if time.monotonic() - written < DEAD_S:
                log.warning("others may begin the same in %g s: %s", DEAD_S, error)
                continue
        log.error("this process was away so long that another one may have begun the same: it is interrupted")
        os.kill(os.getpid(), signal.SIGINT)
        return


def _side(store: Path) -> str:
    """A name of this folder on this machine since it was started, whatever the machine is called."""
    path, boot = store / "locks" / "side", Path("/proc/sys/kernel/random/boot_id")
    if not path.is_file():
        unfinished = path.with_name(f".side.{secrets.token_hex(8)}")
        unfinished.write_text(secrets.token_hex(8), encoding="utf-8")
        with suppress(FileExistsError):  # another process was first
            os.link(unfinished, path)
        unfinished.unlink()
    return path.read_text(encoding="utf-8") + (boot.read_text()[:8] if boot.is_file() else "")


def _process() -> str:
    return f"{socket.gethostname()} {os.getpid()}"
