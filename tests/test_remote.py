"""Laws of a store at a URI, with a server that speaks S3: whole or absent, sent once, hashed when read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import SMALL_SHARDS
from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from test_predictor import CARD
from test_pretrain import JOBS, QUICK, TINY, terminated_when_training_begins
from test_stream import streamed
from test_trainer import fit, trainer
from tiny import model
from werkzeug.serving import WSGIRequestHandler, make_server

from jobs import dispatch, journal, locks, schedule
from jobs.__main__ import main
from jobs.console import Outcome
from jobs.locks import Busy, rebuild_lock, training_lock
from jobs.store import catalog_of, names_in, resolve
from pipelines.build import BuildReport, build
from pipelines.cache import CachedShards
from pipelines.catalog import Catalog, CatalogError, DatasetVersion, content_id, names_there
from pipelines.corpora.rows import CorpusError
from pipelines.remote import Remote, RemoteError
from pipelines.shards import file_sha256
from pipelines.stream import read_samples
from schemas.jobs import BuildConfig, CorpusConfig, load
from schemas.records import MANIFEST
from xdecoder.inference.predictor import Predictor
from xdecoder.model.files import save_model
from xdecoder.training.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
Request = tuple[str, str, str]  # method, path, query


class Server:
    """S3 on this machine, which remembers what it was asked."""

    def __init__(self) -> None:
        self.answer = DomainDispatcherApplication(create_backend_app)
        self.requests: list[Request] = []
        self.before: Callable[[Request], None] = lambda request: None
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        self.requests.append(request)
        try:
            self.before(request)
        except PermissionError:
            start_response("403 Forbidden", [])
            return [b"<Error><Code>AccessDenied</Code><Message>no rights</Message></Error>"]
        return self.answer(environ, start_response)

    def written(self) -> list[str]:
        """What was changed since this was last asked."""
        found = [path for method, path, _ in self.requests if method not in ("GET", "HEAD")]
        self.requests.clear()
        return found


class Quiet(WSGIRequestHandler):
    def log(self, *said: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    s3 = Server()
    thread = threading.Thread(target=s3.server.serve_forever)
    thread.start()
    yield s3
    s3.server.shutdown()
    thread.join()


@pytest.fixture
def uri(server: Server, request: pytest.FixtureRequest) -> str:
    """A prefix of a new bucket."""
    options = f"?endpoint_override={server.url.removeprefix('http://')}&scheme=http&region=us-east-1"
    bucket = request.node.name.partition("[")[0].replace("_", "-")[:60]
    fs.FileSystem.from_uri(f"s3://{bucket}{options}&allow_bucket_creation=true")[0].create_dir(bucket)
    server.requests.clear()
    return f"s3://{bucket}/some prefix{options}".replace(" ", "%20")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """This machine's side of a store at a URI, for a machine of that name."""

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def at(uri: str, name: str) -> Path:
        monkeypatch.setenv("XDECODER_STORE", uri)
        monkeypatch.setenv("XDECODER_WORK", str(tmp_path / name))
        return resolve("store")

    return at


Machine = Callable[[str, str], Path]
UNREAD = CorpusConfig(name="unread", format="captions_table", split="train", root="/nowhere", annotations="x")


def published(demo_dataset: DatasetVersion, store: Path) -> Catalog:
    """The demo version, built elsewhere, at the URI of this store."""
    shutil.copytree(demo_dataset.shards_root.parent, store / "datasets" / "demo")
    (store / "datasets" / "demo" / "current.json").unlink()
    catalog = catalog_of(store, "demo")
    assert catalog.serve(demo_dataset.id)
    return catalog


def job_file(corpora: tuple[CorpusConfig, ...], folder: Path) -> Path:
    """A rebuild of these."""
    written = [corpus.model_dump(mode="json") for corpus in corpora]
    job = {"kind": "rebuild", "corpora": written, "build": SMALL_SHARDS.model_dump()}
    path = folder / "rebuild.yaml"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_what_one_machine_publishes_another_reads(
    kind: str, demo_dataset: DatasetVersion, machine: Machine, uri: str, tmp_path: Path
) -> None:
    place = uri if kind == "s3" else (tmp_path / "far away").as_uri()
    published(demo_dataset, machine(place, "one"))
    store = machine(place, "two")
    assert not store.exists()
    version = catalog_of(store, "demo").open()
    assert (version.id, version.card) == (demo_dataset.id, demo_dataset.card)
    assert version.samples.equals(demo_dataset.samples)
    assert version.verify() == demo_dataset.verify()
    whole = list(islice(streamed(demo_dataset), 8))
    for how in ({}, {"workers": 1}, {"threads": 2}):
        assert list(islice(streamed(version, **how), 8)) == whole  # type: ignore[arg-type]
    evaluated = [sample.key for sample in read_samples(version, split="val", stream="segmentation")]
    assert evaluated == [s.key for s in read_samples(demo_dataset, split="val", stream="segmentation")]
    cached = CachedShards(version.source(), tmp_path / "cache", 10**8, version.manifest)
    assert list(islice(streamed(version, shards=cached, workers=1), 8)) == whole
    assert not list(store.rglob("*.tar"))


def test_a_rebuild_sends_what_is_not_there_yet(
    demo_corpora: tuple[CorpusConfig, ...], machine: Machine, uri: str, server: Server, tmp_path: Path
) -> None:
    shutil.copytree(demo_corpora[0].root, tmp_path / "corpora")
    corpora = [c.model_copy(update={"root": str(tmp_path / "corpora")}) for c in demo_corpora]

    def rebuilt(machine_name: str) -> BuildReport:
        return build(corpora, SMALL_SHARDS, catalog_of(machine(uri, machine_name), "demo"))

    first = rebuilt("one")
    sent = server.written()
    assert len({path for path in sent if "/shards/" in path}) == first.num_shards
    assert sent[-1].endswith("/current.json") and first.new
    again = rebuilt("one")
    assert again.version == first.version and not again.new and server.written() == []
    afresh = rebuilt("two")
    assert afresh.shards_written == first.num_shards, "a machine that has never built has all to build"
    assert afresh.version == first.version and not afresh.new and server.written() == []

    table = next(Path(c.root) / c.annotations for c in corpora if c.format == "captions_table")
    header, line, *lines = table.read_text(encoding="utf-8").splitlines()
    changed = line.split("\t")[0] + "\tsomething else entirely"
    table.write_text("\n".join([header, changed, *lines]) + "\n", encoding="utf-8")
    second = rebuilt("one")
    sent = server.written()
    assert second.new and len({path for path in sent if "/shards/" in path}) == 1
    catalog = catalog_of(machine(uri, "three"), "demo")
    assert catalog.current() == second.version and set(catalog.versions()) == {first.version, second.version}
    assert len(catalog.diff(first.version, "current").changes) == 1
    assert catalog.rollback() == first.version == catalog_of(machine(uri, "one"), "demo").current()


def test_a_kill_in_the_middle_shows_nothing_and_the_next_one_finishes(
    demo_corpora: tuple[CorpusConfig, ...], machine: Machine, uri: str, server: Server, tmp_path: Path
) -> None:
    store = machine(uri, "one")
    catalog = catalog_of(store, "demo")
    served = build(demo_corpora[:2], SMALL_SHARDS, catalog)
    file = job_file(demo_corpora, tmp_path)
    wanted = build(demo_corpora, SMALL_SHARDS, Catalog(store, "demo"))  # built, and not yet published
    process = subprocess.Popen([sys.executable, "-m", "jobs", file], cwd=ROOT)
    whole: list[str] = []

    def kill(request: Request) -> None:
        method, path, query = request
        if method == "POST" and "/shards/" in path and "uploadId" in query:
            whole.append(path)
            if len(whole) == 3:
                process.kill()
                process.wait()

    server.before = kill
    assert process.wait() == -signal.SIGKILL
    server.before = lambda request: None
    elsewhere = catalog_of(machine(uri, "two"), "demo")
    assert elsewhere.versions() == (served.version,)
    elsewhere.open().verify()  # the one before
    assert catalog.remote is not None
    before = {Path(name).name for name in catalog.remote.list("shards")}
    server.written()
    machine(uri, "one")
    assert main([str(file)]) == 0
    sent = {Path(path).name for path in server.written() if "/shards/" in path}
    assert sent and len(before) > served.num_shards and not sent & before
    assert elsewhere.current() == wanted.version
    elsewhere.open().verify()


def test_a_scheduled_rebuild_publishes_there(
    demo_corpora: tuple[CorpusConfig, ...], machine: Machine, uri: str, tmp_path: Path
) -> None:
    store, file = machine(uri, "one"), str(job_file(demo_corpora, tmp_path))
    schedule.fire("demo", file, str(ROOT), str(store))
    (run,) = schedule.history(store, "demo")
    assert run.status == "done", run.message
    elsewhere = catalog_of(machine(uri, "two"), "demo")
    assert elsewhere.open().verify()
    schedule.fire("demo", file, str(ROOT), str(store))
    assert [run.status for run in schedule.history(store, "demo")] == ["done", "done"]
    assert elsewhere.versions() == (elsewhere.current(),)


def test_a_corpus_at_a_uri_is_copied_once(
    demo_corpora: tuple[CorpusConfig, ...], uri: str, server: Server, tmp_path: Path
) -> None:
    def read() -> list[str]:
        """The files that were fetched since this was last asked."""
        found = [path for method, path, _ in server.requests if method == "GET" and "." in path]
        server.requests.clear()
        return found

    world, there = Path(demo_corpora[0].root), Remote.at(uri)
    files = [path for path in world.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: there.upload(path, path.relative_to(world).as_posix()), files))
    corpora = [corpus.model_copy(update={"root": uri}) for corpus in demo_corpora]
    expected = build(demo_corpora, SMALL_SHARDS, Catalog(tmp_path / "here", "demo"))
    catalog = Catalog(tmp_path / "store", "demo")
    read()
    assert build(corpora, SMALL_SHARDS, catalog).version == expected.version
    assert len(read()) == len(files)
    again = build(corpora, SMALL_SHARDS, catalog)
    assert not again.new and not again.inspected and not again.shards_written and read() == []

    images, table = next((c.images, c.annotations) for c in demo_corpora if c.format == "captions_table")
    header, line, *lines = (world / table).read_text(encoding="utf-8").splitlines()
    there.write(table, "\n".join([header, line.split("\t")[0] + "\tanother", *lines]).encode() + b"\n")
    changed = build(corpora, SMALL_SHARDS, catalog)
    assert changed.new and changed.shards_written == 1
    (fetched,) = read()
    assert fetched.endswith(table)
    there.delete(f"{images}/{line.split(chr(9))[0]}")
    assert set(build(corpora, SMALL_SHARDS, catalog).rejects) == {"no-image"}


def test_a_version_at_a_uri_is_a_corpus(
    demo_dataset: DatasetVersion, machine: Machine, uri: str, tmp_path: Path
) -> None:
    catalog = published(demo_dataset, machine(uri, "one"))
    place, _, options = uri.partition("?")
    root = f"{place}/datasets/demo/versions/{demo_dataset.id}?{options}"
    of_all = {"name": "composed", "format": "dataset", "split": "train", "parts": ("train", "val")}
    corpus = CorpusConfig.model_validate(of_all | {"root": root})
    store = Catalog(tmp_path / "store", "composed")
    report = build([corpus], SMALL_SHARDS, store)
    assert report.num_samples == len(demo_dataset.samples) and not report.rejects
    store.open().verify()
    local = corpus.model_copy(update={"root": str(demo_dataset.folder)})
    assert build([local], SMALL_SHARDS, Catalog(tmp_path / "here", "composed")).version == report.version
    build([local], SMALL_SHARDS, store)
    assert not list((store.cache / "corpora").iterdir()), "what no corpus needs any more"
    assert catalog.remote is not None
    for wrong in (root.replace(demo_dataset.id, "0000"), uri):
        with pytest.raises(CorpusError, match="version"):
            build([corpus.model_copy(update={"root": wrong})], SMALL_SHARDS, store)
    with pytest.raises(CorpusError, match="holds no files"):
        nothing = {"format": "webdataset", "annotations": "*.tar", "root": f"{place}/nothing?{options}"}
        build([corpus.model_copy(update=nothing)], SMALL_SHARDS, store)
    with pytest.raises(CorpusError, match="holds no key"):
        build([corpus.model_copy(update={"root": "s3://key:secret@bucket/x"})], SMALL_SHARDS, store)


def test_what_one_machine_is_at_no_other_begins(
    machine: Machine, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "APART_S", 0.1)
    one, two = machine(uri, "one"), machine(uri, "two")
    with rebuild_lock(one, "demo"):
        with pytest.raises(
            Busy, match=rf"'demo' is being rebuilt .*{os.getpid()}\).*90 s after it was killed"
        ):
            rebuild_lock(two, "demo").__enter__()
        with rebuild_lock(two, "another"), training_lock(two, "demo"):
            pass
    with rebuild_lock(two, "demo"), pytest.raises(Busy):
        rebuild_lock(one, "demo").__enter__()
    assert not any("locks" in name for name in Remote.at(uri).list())


def test_the_lock_of_a_killed_process_ends(
    machine: Machine, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own machine knows at once, another one when nobody has written for a while."""
    one, two = machine(uri, "one"), machine(uri, "two")
    holder = (
        "import sys, time; from pathlib import Path; from jobs import locks; locks.BEAT_S = 0.2\n"
        "with locks.training_lock(Path(sys.argv[1]), 'it'): print('mine', flush=True); time.sleep(100)"
    )
    monkeypatch.setattr(locks, "APART_S", 0.1)
    for store in (one, two):
        monkeypatch.setattr(locks, "DEAD_S", 5)
        process = subprocess.Popen(
            [sys.executable, "-c", holder, one], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        if store == two:
            time.sleep(7)  # it lives, and says so
        with pytest.raises(Busy):
            training_lock(two, "it").__enter__()
        process.kill()
        process.wait()
        if store == two:
            monkeypatch.setattr(locks, "DEAD_S", 1000)
            with pytest.raises(Busy):
                training_lock(store, "it").__enter__()
            monkeypatch.setattr(locks, "DEAD_S", 2)
            time.sleep(4)
        with training_lock(store, "it"):
            pass


def test_a_process_whose_lock_was_taken_is_interrupted(
    machine: Machine, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was frozen for longer than its lock lives."""
    monkeypatch.setattr(locks, "BEAT_S", 0.3)
    one, two = machine(uri, "one"), machine(uri, "two")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train leaves one of its own
    try:
        with pytest.raises(KeyboardInterrupt), rebuild_lock(one, "demo"):
            monkeypatch.setattr(locks, "DEAD_S", -10)
            rebuild_lock(two, "demo").__enter__()
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "another one may have begun the same" in caplog.text


def test_of_many_machines_one_has_the_lock(
    machine: Machine, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "APART_S", 0.2)
    stores = [machine(uri, str(number)) for number in range(4)]
    inside, most, entered = 0, 0, 0

    def compete(store: Path) -> None:
        nonlocal inside, most, entered
        for _ in range(3):
            with suppress(Busy), rebuild_lock(store, "demo"):
                inside += 1
                most, entered = max(most, inside), entered + 1
                time.sleep(0.05)
                inside -= 1

    with ThreadPoolExecutor() as pool:
        list(pool.map(compete, stores))
    compete(stores[0])
    assert most == 1 and entered >= 3


def test_a_byte_that_changed_over_there_is_found(
    demo_dataset: DatasetVersion, machine: Machine, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = published(demo_dataset, machine(uri, "one"))
    assert main(["datasets", "verify"]) == 0
    assert catalog.remote is not None
    for name in sorted(catalog.remote.list())[::3]:
        if name == "current.json":
            continue
        whole = catalog.remote.read(name)
        at = len(whole) // 2
        catalog.remote.write(name, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        capsys.readouterr()
        assert main(["datasets", "verify"]) == 2
        assert name.rpartition("/")[2] in capsys.readouterr().err
        if "checksums" in name:
            with pytest.raises(CatalogError, match="is damaged"):
                catalog_of(machine(uri, "two"), "demo").open()
            machine(uri, "one")
        catalog.remote.delete(name)
        catalog.serve(demo_dataset.id)
        assert main(["datasets", "verify"]) == 0, "what was deleted is sent again"


def test_other_bytes_of_the_same_samples_are_never_written_over(
    demo_dataset: DatasetVersion, machine: Machine, uri: str
) -> None:
    """As a machine with another PNG encoder would make them."""
    catalog = published(demo_dataset, machine(uri, "one"))
    store = machine(uri, "two")
    shutil.copytree(catalog.root, store / "datasets" / "demo")
    other = catalog_of(store, "demo")
    shard = other.shards_root / demo_dataset.manifest["shard"][0].as_py()
    shard.write_bytes(shard.read_bytes() + bytes(10240))
    digest = file_sha256(shard)
    rows = demo_dataset.manifest.to_pylist()
    rows[0] |= {"sha256": digest, "size_bytes": shard.stat().st_size}
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST)
    tables = (manifest, demo_dataset.samples, demo_dataset.rejects)
    version = content_id(demo_dataset.card, *tables)
    assert other.publish(demo_dataset.card.model_copy(update={"version": version}), *tables)
    for which in (demo_dataset.id, version):
        other.open(which).verify()
    shard.write_bytes(bytes(100))
    another = Remote.at(uri) / "another"
    with pytest.raises(CatalogError, match=f"{shard.name} is not what was written"):
        Catalog(store, "demo", another).serve(version)
    assert names_there(manifest)[shard.name] not in another.list("shards") and not another.list("versions")


def test_what_nothing_needs_goes_but_not_what_another_machine_is_sending(
    demo_dataset: DatasetVersion, machine: Machine, uri: str
) -> None:
    catalog = published(demo_dataset, machine(uri, "one"))
    there = catalog.remote
    assert there is not None
    for answer in "ab":
        card = demo_dataset.card.model_copy(update={"answers": (answer,)})
        tables = (demo_dataset.manifest.slice(1), demo_dataset.samples, demo_dataset.rejects)
        catalog.publish(card.model_copy(update={"version": content_id(card, *tables)}), *tables)
    assert len(catalog.versions()) == 3
    lone = names_there(demo_dataset.manifest.slice(0, 1))[demo_dataset.manifest["shard"][0].as_py()]
    elsewhere = catalog_of(machine(uri, "two"), "demo")
    assert elsewhere.prune({}, keep=1, before=0) == 0
    assert len(elsewhere.versions()) == 2 and lone in there.list("shards")
    assert elsewhere.prune({}, keep=1) == demo_dataset.manifest["size_bytes"][0].as_py()
    elsewhere.open().verify()
    assert elsewhere.rollback() in elsewhere.versions()


def test_what_cannot_be_reached_is_one_message(
    machine: Machine, server: Server, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(place: str) -> str:
        machine(place, "one")
        assert main(["datasets", "list"]) == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1 and len(message.splitlines()) == 1
        return message

    absent = uri.replace("s3://test", "s3://absent")
    assert "there is no bucket 'absent-what-cannot" in refusal(absent)
    with pytest.raises(RemoteError, match="there is no bucket"):  # before anything is read
        build([UNREAD], BuildConfig(), catalog_of(machine(absent, "one"), "demo"))
    assert "Unrecognized filesystem" in refusal("nowhere://bucket")
    machine(uri, "one")
    assert main(["datasets", "show"]) == 2 and "no dataset 'demo' in s3://" in capsys.readouterr().err
    assert main(["datasets", "prune"]) == 2 and "set MLFLOW_TRACKING_URI" in capsys.readouterr().err


def test_what_is_refused_costs_no_samples(
    demo_dataset: DatasetVersion, machine: Machine, uri: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike what is damaged, which is skipped."""

    def refuse(request: Request) -> None:
        raise PermissionError

    version = published(demo_dataset, machine(uri, "one")).open()
    with (
        monkeypatch.context() as patch,
        pytest.raises(RemoteError, match="cannot read .*ACCESS_DENIED.*credent"),
    ):
        patch.setattr(server, "before", refuse)
        next(streamed(version))
    assert len(next(streamed(version))[0]) == 4


def test_a_model_is_loaded_from_there(uri: str, server: Server, tmp_path: Path) -> None:
    save_model(model(), CARD, tmp_path)
    with pytest.raises(ValueError, match=r"^s3://[^?]* holds no model: model.json is missing"):
        Predictor.load(uri)
    for path in tmp_path.iterdir():
        Remote.at(uri).upload(path, path.name)
    loaded = Predictor.load(uri)
    assert loaded.card == CARD
    assert all(map(torch.equal, loaded.model.state_dict().values(), model().state_dict().values()))


def test_checkpoints_lie_there_and_a_damaged_one_gives_way(
    uri: str,
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(request: Request) -> None:
        if request[1].endswith("rank0.pt"):
            raise PermissionError

    there = Remote.at(uri) / "checkpoints"

    def checkpoints(machine: str) -> Checkpoints:
        return Checkpoints(tmp_path / machine, keep=1, facts={}, there=there)

    of, saved = trainer(tasks=("captioning",)), checkpoints("one")
    fit(of, 1)
    for step, metric in ((1, 5.0), (2, None), (3, None)):
        of.step = step
        saved.save(of, metric)
    saved.wait()
    names = [f"step-0000000{step}/{file}" for step in (1, 3) for file in ("checkpoint.json", "rank0.pt")]
    assert sorted(there.list()) == names and not list((tmp_path / "one").iterdir())
    there.write("step-00000009/rank0.pt", b"whose rank was killed")
    again = trainer(tasks=("captioning",))
    checkpoints("two").restore(again)
    weights = of.model.state_dict()
    assert again.step == 3 and all(torch.equal(x, weights[n]) for n, x in again.model.state_dict().items())
    with monkeypatch.context() as patch, pytest.raises(RemoteError, match="cannot read"):
        patch.setattr(server, "before", refuse)
        checkpoints("two").restore(again)  # what cannot be read just now may be whole
    there.write("step-00000003/rank0.pt", b"damaged")
    checkpoints("three").restore(again)
    assert again.step == 1 and "step-00000003 is damaged" in caplog.text
    assert not list((tmp_path / "two").iterdir()) and not list((tmp_path / "three").iterdir())


@pytest.mark.usefixtures("ray_session")
def test_a_training_goes_on_upon_another_machine(
    demo_dataset: DatasetVersion, machine: Machine, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    def pretrain(store: Path) -> Outcome:
        tasks = ["train.tasks=[captioning]", "evaluate.tasks=[captioning]"]
        return dispatch.run(
            load(JOBS / "pretrain.yaml", [*TINY, *QUICK, *tasks, "train.steps=8"]), store, "it"
        )

    store = machine(uri, "one")
    published(demo_dataset, store)
    with (
        terminated_when_training_begins(store, "demo"),
        pytest.raises(ValueError, match="stopped as asked"),
    ):
        pretrain(store)
    (first,) = [json.loads(path.read_text()) for path in (store / "runs").glob("*/run.json")]
    shutil.rmtree(store)
    store = machine(uri, "two")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # the rest is as on one machine
        patch.setattr("jobs.evaluate.measure", killed)
        pretrain(store)
    (run,) = names_in(store / "runs")
    assert not first["finished"] and (store / "runs" / run / "model").is_dir()
    steps = [row.step for row in journal.rows(store / "runs" / run / "metrics.jsonl")]
    assert steps == [*range(1, 9)], "the curve of before the move came along, and no step was done twice"
