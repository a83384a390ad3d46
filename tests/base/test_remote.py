"""Paths that are URLs, on a real S3 server: staging, its cache, faults, checkpoints, and a whole run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.base import remote
from hstu.base.errors import ConfigError, DataError
from hstu.checkpoint.directory import LATEST, CheckpointFailure, describe_files, set_link, write_manifest
from hstu.checkpoint.mirror import Mirror, fetch
from hstu.config.gin_io import read_and_check
from hstu.data.preprocess import InteractionColumns, import_interactions
from hstu.data.store.sequence_store import SequenceStore
from tests.object_store import BUCKET, ObjectStore, object_store
from tests.serve.http_server import Client, started, until

ROOT = Path(__file__).parents[2]
VALUES = """
import os, sys
from hstu.data.store.sequence_store import SequenceStore
there, here = map(SequenceStore.open, sys.argv[1:])
if not (child := os.fork()):  # as a data worker, which must not share a connection
    os._exit(list(there.sequence("action")) != list(here.sequence("action")))
assert list(there.sequence("item")) == list(here.sequence("item")) and os.waitpid(child, 0)[1] == 0
"""
STAGE = "import sys; from pathlib import Path; from hstu.base import remote as r; "
STAGE += "print(r.stage(sys.argv[1], r.Cache(Path(sys.argv[2]), 10**9)))"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    for name, value in {**server.environment, **home}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "_REPEATED_S", 2.0)
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.02)
    server.fault = lambda method, path: None
    server.requests.clear()
    return server


def checkpoint(path: Path, content: bytes = b"x" * 100_000) -> Path:
    (path / "tensors").mkdir(parents=True)
    (path / "tensors" / "0").write_bytes(content)
    (path / "progress.json").write_bytes(b"{}")
    write_manifest(path, describe_files(path, [path / "tensors" / "0", path / "progress.json"]))
    return path


def uploaded(path: Path, url: str, content: bytes = b"x" * 100_000) -> str:
    remote.upload(checkpoint(path, content), url, "manifest.json")
    return url


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def gets(store: ObjectStore, end: str) -> int:
    return sum(method == "GET" and path.split("?")[0].endswith(end) for method, path in store.requests)


def test_a_path_is_a_url_also_after_pathlib_has_changed_it() -> None:
    assert remote.url_of(Path("s3://bucket/a/b/")) == remote.url_of("s3://bucket/a/b") == "s3://bucket/a/b"
    assert remote.url_of("/data/a:b") is remote.url_of("data/store") is remote.url_of("file:///data") is None
    assert remote.stage("file:///data/store") == Path("/data/store")


@pytest.mark.parametrize("url", ["s3://key:word@bucket/x", "https://host/x?X-Amz-Signature=word"])
def test_credentials_in_a_url_are_refused_before_anything_is_written(url: str) -> None:
    with pytest.raises(ConfigError, match="come from the environment") as refused:
        remote.stage(url)
    assert "word" not in str(refused.value)
    with pytest.raises(ConfigError, match="come from the environment") as refused:
        read_and_check(["ml_100k_retrieval"], [f"DatasetArgs.dataset_path = {url!r}"], "retrieval", 1)
    assert "word" not in str(refused.value)


def test_what_was_uploaded_is_staged_once(store: ObjectStore, tmp_path: Path) -> None:
    url, cache = uploaded(tmp_path / "a", f"s3://{BUCKET}/once"), remote.Cache(tmp_path / "cache", 10**9)
    staged = remote.stage(url, cache)
    assert contents(staged) == contents(tmp_path / "a")
    assert remote.stage(url, cache) == staged and gets(store, "once/tensors/0") == 1
    assert remote.as_given(staged / "tensors" / "0") == f"{url}/tensors/0"
    (tmp_path / "a" / "tensors" / "0").write_bytes(b"other")
    write_manifest(tmp_path / "a", describe_files(tmp_path / "a", [tmp_path / "a" / "tensors" / "0"]))
    remote.upload(tmp_path / "a", url, "manifest.json")
    assert (remote.stage(url, cache) / "tensors" / "0").read_bytes() == b"other"
    with pytest.raises(remote.Absent, match="it has no meta"):
        remote.stage(f"s3://{BUCKET}/nothing", cache)


@pytest.mark.parametrize("kind", ["truncate", "503", "slow"])
def test_faults_that_pass_are_retried(store: ObjectStore, tmp_path: Path, kind: str) -> None:
    url = uploaded(tmp_path / "a", f"s3://{BUCKET}/faults-{kind}")
    store.fault = lambda method, path: kind if path.endswith("/0") and gets(store, "/0") in (1, 2) else None
    store.requests.clear()
    assert contents(remote.stage(url, remote.Cache(tmp_path / "c", 10**9))) == contents(tmp_path / "a")
    assert gets(store, "/0") == (1 if kind == "slow" else 3)


STAY = [("403", "Renew the credentials"), ("truncate", "goes on from what is there"), ("503", "goes on from what")]


@pytest.mark.parametrize("kind, remedy", STAY)
def test_faults_that_stay_end_with_a_remedy_and_nothing_half(
    store: ObjectStore, tmp_path: Path, kind: str, remedy: str
) -> None:
    url = uploaded(tmp_path / "a", f"s3://{BUCKET}/stay-{kind}")
    store.fault = lambda method, path: kind if path.endswith("/0") else None
    store.requests.clear()
    with pytest.raises(DataError, match=remedy) as failed:
        remote.stage(url, remote.Cache(tmp_path / "c", 10**9))
    assert f"{url}/tensors/0: {gets(store, '/0')} attempt(s) in" in str(failed.value)
    assert "secret" not in str(failed.value)
    assert not [path for path in (tmp_path / "c").rglob("*0") if path.is_file()]


def test_what_was_used_longest_ago_makes_room(store: ObjectStore, tmp_path: Path) -> None:
    urls = [uploaded(tmp_path / str(n), f"s3://{BUCKET}/room-{n}", bytes([n]) * 100_000) for n in range(3)]
    cache = remote.Cache(tmp_path / "cache", 205_000)
    first, second = (remote.stage(url, cache) for url in urls[:2])
    os.utime(first / "tensors" / "0", (time.time() - 100, 0))
    os.utime(second / "tensors" / "0", (time.time() - 200, 0))
    third = remote.stage(urls[2], cache)
    assert [(path / "tensors" / "0").exists() for path in (first, second, third)] == [True, False, True]
    assert contents(remote.stage(urls[1], cache)) == contents(tmp_path / "1")
    with pytest.raises(DataError, match=r"cache of 9e-05 GB. Set DatasetArgs.cache_gb higher"):
        remote.stage(urls[0], remote.Cache(tmp_path / "small", 90_000))


def test_processes_of_a_host_download_each_file_once(store: ObjectStore, tmp_path: Path) -> None:
    url = uploaded(tmp_path / "a", f"s3://{BUCKET}/shared")
    store.fault = lambda method, path: "slow" if path.endswith("/0") else None
    command = [sys.executable, "-c", STAGE, url, str(tmp_path / "cache")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = {process.communicate()[0].strip() for process in both}
    assert len(places) == 1 and contents(Path(places.pop())) == contents(tmp_path / "a")
    assert gets(store, "shared/tensors/0") == 1


def test_a_killed_stage_leaves_nothing_half(store: ObjectStore, tmp_path: Path) -> None:
    url = uploaded(tmp_path / "a", f"s3://{BUCKET}/killed")
    store.fault = lambda method, path: "slow" if path.endswith("/0") else None
    process = subprocess.Popen([sys.executable, "-c", STAGE, url, str(tmp_path / "cache")], cwd=ROOT)
    while not gets(store, "killed/tensors/0"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    store.fault = lambda method, path: None
    assert contents(remote.stage(url, remote.Cache(tmp_path / "cache", 10**9))) == contents(tmp_path / "a")


def test_checkpoints_go_to_a_url_and_the_newest_complete_one_comes_back(store: ObjectStore, tmp_path: Path) -> None:
    url, saved = f"s3://{BUCKET}/run", tmp_path / "saved"
    mirror = Mirror(url, saved, 2)
    for iteration in range(4):
        path = checkpoint(saved / f"iteration_{iteration:08d}", bytes([iteration]) * 1000)
        set_link(saved, LATEST, path)
        mirror.upload(path)
        while not mirror.is_done(1.0):
            pass
    assert remote.read(f"{url}/latest") == b"iteration_00000003"
    assert not {"iteration_00000000", "iteration_00000001"} & set(remote.names_in(url))
    store.fault = lambda method, path: "403" if method == "PUT" and path.endswith("4/manifest.json") else None
    set_link(saved, LATEST, last := checkpoint(saved / "iteration_00000004"))
    mirror.upload(last)
    with pytest.raises(CheckpointFailure, match=f"{last} could not be uploaded"):
        mirror.close()
    assert fetch(url, tmp_path / "elsewhere") == ["iteration_00000003"]
    assert contents(tmp_path / "elsewhere" / "iteration_00000003") == contents(saved / "iteration_00000003")
    store.fault = lambda method, path: None
    again = Mirror(url, saved, 2)
    again.fetch()  # what is here is newer: it goes there
    again.close()
    assert fetch(url, tmp_path / "elsewhere") == ["iteration_00000004"]


def test_a_store_is_made_appended_to_and_read_at_a_url(store: ObjectStore, tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), fsspec.filesystem("s3")
    for number in (1, 2):
        columns = {"user": rng.integers(0, 40, 600), "item": rng.integers(0, 90, 600), "time": np.arange(600) + 10**9}
        pd.DataFrame(columns).to_csv(tmp_path / f"{number}.csv", index=False)
        files.put_file(str(tmp_path / f"{number}.csv"), f"{BUCKET}/raw/{number}.csv")
    outputs = {"there": f"s3://{BUCKET}/shop", "here": str(tmp_path / "shop")}
    raw = {"there": f"s3://{BUCKET}/raw", "here": str(tmp_path)}
    for place, output in outputs.items():
        for number, append in ((1, False), (2, True)):
            table = InteractionColumns(
                interactions=Path(raw[place], f"{number}.csv"), user="user", item="item", time="time"
            )
            import_interactions("shop", table, output=output, append=append, shards=3, any_times=True)
    store.requests.clear()
    there, here = SequenceStore.open(outputs["there"]), SequenceStore.open(outputs["here"])
    assert there.checksums == here.checksums
    assert f"--interactions s3://{BUCKET}/raw/1.csv s3://{BUCKET}/raw/2.csv" in str(there.command)
    assert not gets(store, "shard.00001/sequence.item.npy")
    assert there.sequence("item")[:].tolist() == here.sequence("item")[:].tolist()
    there.verify_contents()
    assert gets(store, "shard.00001/sequence.item.npy") == 1


def test_shards_are_brought_in_the_order_that_is_expected(store: ObjectStore, tmp_path: Path) -> None:
    columns = {"user": np.arange(600) % 60, "item": np.arange(600) % 7, "time": np.arange(600) + 10**9}
    pd.DataFrame(columns).to_csv(tmp_path / "log.csv", index=False)
    table = InteractionColumns(interactions=tmp_path / "log.csv", user="user", item="item", time="time")
    import_interactions("shop", table, output=f"s3://{BUCKET}/ahead", shards=6, any_times=True)
    opened = SequenceStore.open(f"s3://{BUCKET}/ahead")
    store.requests.clear()
    opened.expect((4, 1, 5))
    until(lambda: gets(store, "shard.00005/sequence.item.npy") == 1)
    assert opened.sequence("item")[:1].tolist() == [0]  # of shard 0, after which 1 is here, and 2 and 3 follow
    until(lambda: gets(store, "shard.00003/sequence.item.npy") == 1)
    read = [int(path.split("/shard.")[1][:5]) for _, path in store.requests if "sequence.item.npy" in path]
    assert [*dict.fromkeys(read)] == [4, 1, 5, 0, 2, 3]


def lake_of(folder: Path) -> Path:
    """20 users in 4 files, with lists of 1,000 events."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        lists = {name: rng.integers(0, 9, (5, 1000)).tolist() for name in ("item", "action")}
        pq.write_table(pa.table({"user": range(5 * number, 5 * number + 5), **lists}), folder / f"{number}.parquet")
    (folder / "lake.json").write_text('{"user": "user", "item": "item", "action": "action"}')
    return folder


def values(opened: SequenceStore, name: str) -> list[int]:
    return np.asarray(opened.sequence(name)).tolist()


def test_a_lake_in_a_bucket_is_read_as_the_local_one(store: ObjectStore, tmp_path: Path) -> None:
    here, url = lake_of(tmp_path / "lake"), f"s3://{BUCKET}/of-users"
    for file in here.iterdir():
        fsspec.filesystem("s3").put_file(str(file), f"{url}/{file.name}")
    local, there = SequenceStore.open(here), SequenceStore.open(url)
    assert local.checksums == there.checksums and str(there) == url and str(local) == str(here)
    shutil.rmtree(tmp_path / "home")
    subprocess.run([sys.executable, "-c", VALUES, url, here], check=True, cwd=ROOT, timeout=100)
    store.fault = lambda method, path: "503" if path.endswith("of-users/2.parquet") else None
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(
        DataError, match=rf"{url}/2\.parquet: \d+ attempt\(s\) in \d s failed, the last with .*SlowDown"
    ):
        SequenceStore.open(url)
    store.fault = lambda method, path: None
    fsspec.filesystem("s3").put_file(str(here / "1.parquet"), f"{url}/2.parquet")
    with pytest.raises(DataError, match=r"user 5 has several rows"):
        SequenceStore.open(url)


def test_arrays_of_a_lake_make_room_as_files_of_urls_do(tmp_path: Path) -> None:
    here, cache = lake_of(tmp_path / "lake"), remote.Cache(tmp_path / "cache", 90_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hstu.data.store.lake._THREADS", 8)
        opened = SequenceStore.open(remote.stage(here, cache))
        expected = [values(opened, name) for name in ("item", "action")]  # 80 KB each
        assert sum(path.stat().st_size for path in tmp_path.glob("cache/**/*") if path.is_file()) < 100_000
    again = SequenceStore.open(remote.stage(here, remote.Cache(tmp_path / "other", 10**9)))
    assert expected == [values(again, name) for name in ("item", "action")]
    with pytest.raises(DataError, match=r"do not fit into .*Set DatasetArgs.cache_gb higher"):
        values(SequenceStore.open(remote.stage(here, remote.Cache(tmp_path / "small", 5000))), "item")


def test_no_place_for_a_cache_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"set XDG_CACHE_HOME or DatasetArgs\.cache_dir to a directory"):
        SequenceStore.open(lake_of(tmp_path / "lake"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_in_the_bucket_equals_the_local_one(store: ObjectStore, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "user": rng.integers(0, 300, 9000),
        "item": rng.integers(0, 200, 9000),
        "time": np.arange(9000) * 99 + 10**9,
    }
    pd.DataFrame(columns).to_csv(tmp_path / "shop.csv", index=False)
    fsspec.filesystem("s3").put_file(str(tmp_path / "shop.csv"), f"{BUCKET}/whole/shop.csv")
    table = ("--user", "user", "--item", "item", "--time", "time", "--quick", "--dataset_name", "shop", "--any_times")

    def run(*command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=environment)

    def train(run_name: str, gin: str, saved: str) -> subprocess.Popen[bytes]:
        settings = [f"TrainerArgs.output_dir = {run_name!r}", f"TrainerArgs.ckpt_save_dir = {saved!r}"]
        settings += ["TrainerArgs.ckpt_save_interval = 10", 'TrainerArgs.ckpt_load_dir = "auto"']
        settings += ["TrainerArgs.num_train_epochs = 2.0"]
        script = str(ROOT / "pretrain_gr_retrieval.py")
        return run(script, "--gin-config-file", gin, "--gin-bindings", *settings)

    bucket, preprocess = f"s3://{BUCKET}/whole", str(ROOT / "scripts" / "preprocess_dataset.py")
    assert run(preprocess, "--interactions", "shop.csv", "--output", "local/shop", *table).wait() == 0
    assert run(preprocess, "--interactions", f"{bucket}/shop.csv", "--output", f"{bucket}/shop", *table).wait() == 0
    assert train("here", "local/shop_retrieval_quick.gin", "saved").wait() == 0
    first = train("there", "shop_retrieval_quick.gin", f"{bucket}/saved")
    while not [
        name for name in remote.names_in(f"{bucket}/saved") if remote.read(f"{bucket}/saved/{name}/manifest.json")
    ]:
        assert first.poll() is None
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for kept in ("there", "home/hstu/remote"):  # another machine goes on
        shutil.rmtree(tmp_path / kept)
    assert train("there", "shop_retrieval_quick.gin", f"{bucket}/saved").wait() == 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("here", "there")]
    assert summaries[0]["last_metrics"] == summaries[1]["last_metrics"] and summaries[1]["status"] == "done"
    export = str(ROOT / "scripts" / "export.py")
    assert run(export, "--ckpt", f"{bucket}/saved", "--output", f"{bucket}/exports/a", "--program").wait() == 0
    assert run(export, "--run_dir", "here", "--output", "exports/a", "--program").wait() == 0
    delta = ("--delta", f"{bucket}/exports/a", "--output", f"{bucket}/exports/b")
    assert run(export, "--ckpt", f"{bucket}/saved", *delta).wait() == 0
    staged = remote.local_export(Path(f"{bucket}/exports"))
    weights = [(each / "model.safetensors").read_bytes() for each in (staged / "a", tmp_path / "exports" / "a")]
    assert weights[0] == weights[1]
    server, port = started(f"{bucket}/exports")
    try:
        reply = Client(port).post("/recommend", {"items": [3, 5], "timestamps": [10**9, 10**9 + 99], "k": 5})
        assert reply.status == 200, reply.text
        assert len(reply.json["items"]) == 5
    finally:
        server.terminate()
        server.communicate(timeout=60)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or store.environment["AWS_SECRET_ACCESS_KEY"].encode() not in path.read_bytes(), path
