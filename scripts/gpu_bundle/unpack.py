"""Verify a bundle, unpack it, and check that everything imports. Needs the standard library alone.

    python3 .bundle/unpack.py DIRECTORY

Does nothing if DIRECTORY holds this very bundle. ``source .bundle/activate.sh`` calls it and sets the environment.

Exit codes: 0 done, 1 the bundle is damaged, is for another machine, or does not import.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PATHS = ("site", "site/nvidia_cutlass_dsl/dsl_packages")
"""What PYTHONPATH needs: the packages, and the modules of the CUTLASS DSL, which pip adds by a .pth file."""
ENVIRONMENT = "environment.sh"
"""In the directory: sets the variables."""
STAMP = ".unpacked"
"""In the directory: the manifest of the bundle that it holds."""


class BundleError(Exception):
    """The bundle cannot be used; the message says why and what to do."""


def verify(bundle: Path) -> dict[str, Any]:
    """The manifest, after comparing every file with its checksum, and this machine's versions with those it needs.

    Raises:
        BundleError: a file is missing or damaged, or Python, PyTorch or Triton has another version.
    """
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    for name, wanted in manifest["sha256"].items():
        file = bundle / name
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "no file"
        if found != wanted:
            raise BundleError(f"{file}: found {found}, needed sha256 {wanted}; copy or make the bundle again")
    check_versions(manifest["needs"])
    return manifest


def check_versions(needed: dict[str, str]) -> None:
    """Compare the versions of Python and of packages with the beginnings that are needed.

    Raises:
        BundleError: one differs.
    """
    for name, wanted in needed.items():
        try:
            found = platform.python_version() if name == "python" else metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        if not f"{found.partition('+')[0]}.".startswith(f"{wanted}."):
            raise BundleError(f"found {name} {found}, needed {wanted}; use or make a bundle for this machine")


def unpack(bundle: Path, directory: Path) -> None:
    """Unpack the archives of a verified bundle, replacing what the directory holds."""
    if directory.exists():
        shutil.rmtree(directory)
    (directory / PATHS[0]).mkdir(parents=True)  # tarfile fails where two threads make one directory at once

    def extract(archive: Path) -> None:
        with lzma.open(archive) as stream, tarfile.open(fileobj=stream) as tar:
            tar.extractall(directory, filter="data")

    with ThreadPoolExecutor() as pool:  # lzma releases the lock
        list(pool.map(extract, sorted(bundle.glob("*.tar.xz"))))


def environment(directory: Path) -> dict[str, str]:
    """What programs that use the bundle need in their environment: packages, and kernels that were compiled before."""
    caches = directory / "caches"
    paths = [Path.cwd(), *(directory / path for path in PATHS), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
        "XDG_CACHE_HOME": str(caches),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }


CHECK = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    print(name, getattr(module, "__version__", ""), getattr(module, "__path__", [module.__file__])[0])
if torch := sys.modules.get("torch"):
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
"""


def main(argv: list[str]) -> int:
    """Unpack the bundle beside this file."""
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 1
    bundle, directory = Path(__file__).resolve().parent, Path(argv[0]).resolve()
    begun, stamp = time.monotonic(), directory / STAMP
    contents = (bundle / MANIFEST).read_text(encoding="utf-8")
    if stamp.exists() and stamp.read_text(encoding="utf-8") == contents:
        print(f"{directory}: unpacked before")
        return 0
    try:
        manifest = verify(bundle)
        unpack(bundle, directory)
    except (BundleError, OSError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"unpacked into {directory} in {time.monotonic() - begun:.1f} s", flush=True)
    variables = environment(directory)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    (directory / ENVIRONMENT).write_text("".join(lines), encoding="utf-8")
    check = subprocess.run([sys.executable, "-c", CHECK, *manifest["imports"]], env=os.environ | variables)
    if check.returncode == 0:
        stamp.write_text(contents, encoding="utf-8")
        print(f"all of it took {time.monotonic() - begun:.1f} s")
    return min(check.returncode, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
