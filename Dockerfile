# The trainer in the locked versions, each file checked by its hash (docs/install.md).
#   docker build -t hstu-trainer .                               for CPUs
#   docker build -t hstu-trainer:cuda --build-arg KIND=cuda .    for NVIDIA GPUs; the host brings the driver
FROM python:3.11-slim-bookworm AS base
# Compiles the C++ kernels for the processor of the machine, and Triton's launchers. Debian keeps no older versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# Everything that is locked, as wheels.
FROM base AS wheels
ARG KIND=cpu
# PyPI has not PyTorch's own build for CPU. The hashes decide which file is taken from which index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY requirements/ requirements/
# The first two lines bring setuptools, which builds what has no wheel, without an unchecked build environment.
RUN sed -n '/^setuptools==/,/[^\\]$/p' "requirements/torch_$KIND.txt" > setuptools.txt \
    && pip install --no-cache-dir --no-deps --require-hashes -r setuptools.txt \
    && pip wheel --no-cache-dir --no-deps --require-hashes --no-build-isolation --extra-index-url "$TORCH_INDEX" \
        --wheel-dir /wheels -r "requirements/torch_$KIND.txt" \
    && pip wheel --no-cache-dir --no-deps --require-hashes --no-build-isolation \
        --wheel-dir /wheels -r "requirements/$KIND.txt"
COPY pyproject.toml setup.py README.md LICENSE ./
COPY hstu/ hstu/
COPY scripts/ scripts/
COPY configs/ configs/
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base
ARG KIND=cpu
# Of the wheels, what training and serving need. TorchRec's metadata asks for FBGEMM's CUDA build, so it comes by itself.
# There is one version of each.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels "hstu-trainer[$KIND,serve]" \
    && pip install --no-cache-dir --no-index --find-links /wheels --no-deps torchrec \
    && useradd --uid 1000 --create-home hstu \
    && install -d -o hstu /work
USER 1000
WORKDIR /work
CMD ["hstu-train-retrieval", "--help"]
