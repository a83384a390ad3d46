"""Gather in one folder what a GPU machine without a package index needs to train, in at most 48 MiB.

    python3.12 -m scripts.gpu_bundle.make .bundle --data tmp_data/ml-1m [--caches DIRECTORY]
    source .bundle/activate.sh          on the GPU machine, in the root of the repository

Run it in an environment with the Python, PyTorch and Triton of the GPU machine (NEEDED) and all that the trainer needs.
It needs no GPU, but pip with a package index, gcc, GNU tar and about 10 minutes. The GPU machine has an H100 or H200,
and PyTorch, Triton, pandas, pyarrow, matplotlib, tensorboard, scikit-learn, pytest and what these depend on. What else
training needs is CARRIED. Two packages are made small:

- FBGEMM keeps device code for sm_90, and of the lookups that training calls (KEPT_KERNELS). A launch of another kernel
  fails with "no kernel image is available". Attention, layers and dense steps need FBGEMM, too: TorchRec imports it.
- The CUTLASS compiler keeps the pages of machine code that compiling our kernels executes (see touched_pages). One that
  needs others ends its process with SIGTRAP: make the bundle again after changing kernels. The library that launches
  kernels is linked from the archive that the DSL brings for this, with PyTorch's libcudart.

--data names stores that scripts/preprocess_dataset.py has written. --caches names kernels that were compiled in this
environment: a directory with ``triton`` (as TRITON_CACHE_DIR) and ``hstu`` (in XDG_CACHE_HOME).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from scripts.gpu_bundle import libraries, unpack

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PINS = ROOT / "requirements" / "cuda.txt"
LARGEST = 48 << 20
"""Bytes that a bundle may have."""
ARCHITECTURE = 90
NEEDED = {"python": "3.12", "torch": "2.11", "triton": "3.6"}
CARRIED = (
    *("torchrec==1.6.1", "fbgemm-gpu==1.6.0", "iopath", "tensordict", "pyvers", "torchmetrics"),
    *("megatron-core", "gin-config"),
    *(
        "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base",
        "nvidia-cutlass-dsl-libs-core",
        "nvidia-cutlass-dsl-libs-cu13",
    ),
)
"""Packages, in the versions of requirements/cuda.txt where none is given. TorchRec and FBGEMM go with PyTorch."""
COMPILERS = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13")
"""A launch does not find what other versions of these have compiled."""
IMPORTS = (
    "torch",
    "torchrec",
    "fbgemm_gpu",
    "megatron.core",
    "gin",
    "tensordict",
    "torchmetrics",
    "iopath",
    "triton",
    "cutlass",
    "hstu",
)
PARTS = {"fbgemm": ["fbgemm_gpu"], "cutlass": ["nvidia_cutlass_dsl"]}
"""Archive → directories of packages that it holds. All others are in ``packages``."""
LEFT_OUT = (
    *("**/__pycache__", "**/tests", "megatron/core/datasets/helpers_cpp*.so", "fbgemm_gpu/experimental"),
    *("nvidia_cutlass_dsl/cu13/lib/stubs", "nvidia_cutlass_dsl/dsl_packages/iket"),
)
"""What training does not read."""
CUTLASS = "nvidia_cutlass_dsl"
COMPILER = f"{CUTLASS}/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu13.cpython-312-x86_64-linux-gnu.so"
LAUNCHER, LAUNCHER_ARCHIVE = (
    f"{CUTLASS}/cu13/lib/libcute_dsl_runtime.so",
    f"{CUTLASS}/cu13/lib/libcuda_dialect_runtime_static.a",
)
LOOKUP_KERNELS = re.compile(r"embedding_(?:nobag_)?(?:backward_)?codegen_")
"""Kernels of lookups, in one file per kind of pooling and optimizer."""
KEPT_KERNELS = re.compile(
    r"\d(?:split|dense)_embedding_nobag_"
    r"(?:codegen_forward|backward_codegen_(?:sgd|adagrad|rowwise_adagrad|adam|dense))_unweighted_"
    r"|\dsplit_embedding_backward_codegen_find_long_segments"
)
"""Those of tables without pooling, with our optimizers, for all dtypes and widths, in GPU or host memory, and the
search for frequent ids, which all optimizers share."""
NEVER_CALLED = ("fbgemm_gpu_tbe_training_backward_gwd", "fbgemm_gpu_tbe_training_backward_vbe")
"""Libraries that FBGEMM loads at its import: for global weight decay, and for batches of several sizes."""
COMPRESSION = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 26}]


def carried_versions() -> dict[str, str]:
    """The version of each package of CARRIED."""
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE))
    named = (package.partition("==") for package in CARRIED)
    return {name: version or pins[name] for name, _, version in named}


def download(directory: Path) -> list[Path]:
    """The wheels of CARRIED; those that are there are not fetched again."""
    directory.mkdir(parents=True, exist_ok=True)
    wheels: list[Path] = []
    for name, version in carried_versions().items():
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(directory.glob(pattern)):
            command = [
                "pip",
                "wheel",
                "--quiet",
                "--no-deps",
                "--wheel-dir",
                str(directory),
                f"{name}=={version}",
            ]
            subprocess.run([sys.executable, "-m", *command], check=True)
        wheels += directory.glob(pattern)
    return wheels


def install(wheels: Iterable[Path], site: Path) -> None:
    """Unpack wheels, without what is left out."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for pattern in LEFT_OUT:
        for path in list(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def entry_functions(library: Path) -> list[list[str]]:
    """The kernels in each container of device code, by their mangled names."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(cuobjdump), "-arch", f"sm_{ARCHITECTURE}a", "--dump-elf-symbols", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [re.findall(r"STT_FUNC .*STO_ENTRY\s+(\S+)", block) for block in listing.split("Fatbin elf code:")[1:]]


def is_needed(functions: Iterable[str]) -> bool:
    """Whether training calls one of these kernels, as far as their names say."""
    of_lookups = [name for name in functions if LOOKUP_KERNELS.search(name)]
    return not of_lookups or any(KEPT_KERNELS.search(name) for name in of_lookups)


def link(library: Path, *arguments: str) -> None:
    """Replace a shared library by one that is linked from these objects; without any, it is empty."""
    library.unlink()
    command = ["gcc", "-shared", "-s", "-o", str(library), f"-Wl,-soname,{library.name}", *arguments]
    subprocess.run(command, check=True)


def slim_fbgemm(site: Path) -> None:
    """Keep the device code that training calls, and nothing of libraries that it does not call."""
    for name in NEVER_CALLED:
        link(site / "fbgemm_gpu" / f"{name}.so")
    for path in sorted((site / "fbgemm_gpu").glob("*.so")):
        library = bytearray(path.read_bytes())
        if libraries.section(library, b".nv_fatbin"):
            kept = [is_needed(functions) for functions in entry_functions(path)]
            libraries.keep_device_code(library, ARCHITECTURE, kept)
            path.unlink()
            libraries.write(library, path)
            print(f"{path.name}: device code of {sum(kept)} of {len(kept)} source files", flush=True)


def slim_cutlass(site: Path) -> None:
    """Link the small library that launches kernels; keep the pages of the compiler that our kernels need."""
    cudart = metadata.distribution("nvidia-cuda-runtime").locate_file("nvidia/cu13/lib/libcudart.so.13")
    archive = site / LAUNCHER_ARCHIVE
    link(site / LAUNCHER, "-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive", str(cudart))
    archive.unlink()
    paths = ":".join([*(str(site.parent / path) for path in unpack.PATHS), str(ROOT)])
    environment = {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    trace = ["-m", "scripts.gpu_bundle.touched_pages", str(site / COMPILER)]
    compile_again = [
        "scripts/bench/compile_kernels.py",
        "--backend",
        "cutlass",
        "--capability",
        "90",
        "--head-dim",
        "64",
    ]
    for arguments in (trace, compile_again):
        subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, env=environment)


def pack(root: Path, paths: Iterable[Path], archive: Path) -> None:
    """Write a compressed archive. Files keep their holes, so that unpacking writes none of them."""
    names = sorted(str(path.relative_to(root)) for path in paths)
    options = ["--sparse", "--format=posix", "--sort=name", "--owner=0", "--group=0", "--mtime=@0"]
    options.append("--pax-option=delete=atime,delete=ctime")
    tar = subprocess.Popen(["tar", "-C", str(root), *options, "-c", *names], stdout=subprocess.PIPE)
    assert tar.stdout is not None
    with lzma.open(archive, "wb", filters=COMPRESSION) as compressed:
        shutil.copyfileobj(tar.stdout, compressed, 1 << 20)
    if tar.wait():
        raise RuntimeError(f"tar failed with exit code {tar.returncode}")
    print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


def write_manifest(folder: Path) -> None:
    """List checksums, and what the machine must have."""
    files = sorted(file for file in folder.iterdir() if file.name != unpack.MANIFEST)
    contents = {
        "needs": NEEDED,
        "imports": IMPORTS,
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    (folder / unpack.MANIFEST).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Make a bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made; must not exist or be empty")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="stores to carry")
    parser.add_argument("--caches", type=Path, help="directory of compiled kernels")
    parser.add_argument("--downloads", type=Path, default=ROOT / "build" / "gpu_bundle", help="wheels that are kept")
    options = parser.parse_args(argv)
    compilers = {name: carried_versions()[name] for name in COMPILERS} if options.caches else {}
    try:
        unpack.check_versions(NEEDED | compilers)
    except unpack.BundleError as error:
        parser.error(f"in this environment: {error}")
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty")
    with tempfile.TemporaryDirectory(dir=options.folder.resolve().parent) as scratch:
        root, site = Path(scratch), Path(scratch) / "site"
        install(download(options.downloads), site)
        slim_fbgemm(site)
        slim_cutlass(site)
        for store in options.data:
            shutil.copytree(store, root / "data" / store.name)
        if options.caches:
            shutil.copytree(options.caches, root / "caches")
        parts = {name: [site / directory for directory in directories] for name, directories in PARTS.items()}
        named = {path for paths in parts.values() for path in paths}
        parts["packages"] = [path for path in site.iterdir() if path not in named]
        parts |= {name: [root / name] for name in ("data", "caches") if (root / name).exists()}
        for name, paths in parts.items():
            pack(root, paths, options.folder / f"{name}.tar.xz")
    for script in ("unpack.py", "activate.sh"):
        shutil.copy(HERE / script, options.folder)
    write_manifest(options.folder)
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.folder}: {size / 2**20:.1f} MiB of at most {LARGEST / 2**20:.0f}")
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
