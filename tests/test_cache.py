"""Laws of the shard cache: whole or absent, within its size, oldest out first, and shared by processes."""

import copy
import fcntl
import hashlib
import multiprocessing
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.cache import CachedShards, CacheError, RemoteShards
from pipelines.remote import Remote
from schemas.records import MANIFEST

SIZE = 1000
NAMES = [f"{i}.tar" for i in range(6)]


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "remote"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([i]) * SIZE)
    return folder


def manifest(remote: Path) -> pa.Table:
    rows = [
        {"shard": name, "size_bytes": SIZE, "sha256": hashlib.sha256(bytes([i]) * SIZE).hexdigest()}
        for i, name in enumerate(NAMES)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def cached(remote: Path, shards: int = 3) -> CachedShards:
    folder = remote.parent / "cache"
    return CachedShards(RemoteShards(Remote.at(str(remote))), folder, shards * SIZE, manifest(remote))


def content(shards: CachedShards, name: str) -> bytes:
    """As another process would read it."""
    return copy.deepcopy(shards).read(name, 0, 2 * SIZE)


def kept(shards: CachedShards) -> set[str]:
    return {path.name for path in shards.folder.iterdir() if path.name != ".lock"}


def test_a_shard_is_fetched_once(remote: Path) -> None:
    shards = cached(remote)
    assert content(shards, NAMES[2]) == bytes([2]) * SIZE
    (remote / NAMES[2]).unlink()
    assert content(shards, NAMES[2]) == bytes([2]) * SIZE


def test_the_least_recently_used_goes_first_and_stays_readable_for_who_reads_it(remote: Path) -> None:
    shards = cached(remote)
    content(shards, NAMES[1])
    assert shards.read(NAMES[1], 0, 1) == bytes([1])
    for name in (NAMES[0], NAMES[2], NAMES[0], NAMES[3]):
        content(shards, name)
    assert kept(shards) == {NAMES[2], NAMES[0], NAMES[3]}
    assert shards.read(NAMES[1], SIZE - 1, SIZE) == bytes([1])


def test_other_bytes_than_those_written_are_refused_and_leave_nothing(remote: Path) -> None:
    (remote / NAMES[0]).write_bytes(b"x" * SIZE)
    shards = cached(remote)
    with pytest.raises(CacheError, match=r"0\.tar has the hash"):
        shards.read(NAMES[0], 0, 1)
    (remote / NAMES[1]).unlink()
    with pytest.raises(CacheError, match=r"1\.tar cannot be fetched"):
        shards.read(NAMES[1], 0, 1)
    assert kept(shards) == set()


def test_damage_on_this_disk_is_mended_and_other_damage_is_not(remote: Path) -> None:
    shards = cached(remote)
    shards.read(NAMES[0], 0, SIZE)
    assert not shards.mend(NAMES[0])
    (shards.folder / NAMES[0]).write_bytes(b"x" * SIZE)
    assert shards.read(NAMES[0], 0, SIZE) == b"x" * SIZE
    assert shards.mend(NAMES[0])
    assert shards.read(NAMES[0], 0, SIZE) == bytes(SIZE)


def test_a_range_is_read_where_it_lies(remote: Path) -> None:
    shards = RemoteShards(Remote.at(str(remote)))
    assert shards.read(NAMES[3], SIZE - 2, 5) == bytes([3]) * 2
    with pytest.raises(FileNotFoundError):
        shards.read("absent.tar", 0, 1)


def test_what_a_killed_process_left_is_taken_over_or_deleted(remote: Path) -> None:
    shards = cached(remote)
    for name in NAMES[:3]:
        (shards.folder / f".{name}.part").write_bytes(b"x" * SIZE)
    assert content(shards, NAMES[0]) == bytes(SIZE)
    content(shards, NAMES[3])
    assert kept(shards) == {NAMES[0], NAMES[3]}


def test_a_shard_larger_than_the_cache_is_refused_at_once(remote: Path) -> None:
    with pytest.raises(ValueError, match=r"raise train\.cache_gb"):
        cached(remote, shards=0)


def _read_all(remote: Path, start: int, most: "multiprocessing.Queue[int]") -> None:
    shards = cached(remote, shards=2)
    largest = 0
    for turn in range(30):
        i = (start + turn * (start + 1)) % len(NAMES)
        assert content(shards, NAMES[i]) == bytes([i]) * SIZE
        with (shards.folder / ".lock").open() as lock:  # so that nothing goes while it is counted
            fcntl.flock(lock, fcntl.LOCK_EX)
            largest = max(largest, sum(path.stat().st_size for path in shards.folder.glob("[0-9]*")))
    most.put(largest)


def test_processes_share_a_folder_that_never_outgrows_its_size(remote: Path) -> None:
    context = multiprocessing.get_context("fork")
    most = context.Queue()
    processes = [context.Process(target=_read_all, args=(remote, start, most)) for start in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert max(most.get() for _ in processes) <= 2 * SIZE
