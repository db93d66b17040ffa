# An image with the whole `dlrm` command, to preprocess, train, evaluate and export. From the root of the repository:
#
#   docker build --file docker/train.Dockerfile --tag torchdlrm .
#   docker run --rm --user "$(id -u)" --volume "$PWD/work:/work" torchdlrm preprocess log.tsv --out dataset
#   docker run --rm --user "$(id -u)" --volume "$PWD/work:/work" torchdlrm \
#     train /configs/criteo-small.toml --dataset dataset --run run --nproc-per-node 2
#
# It is also the image of Dask's scheduler and workers (deploy/preprocess.yaml), of trainings on several machines and of a live
# model; what they read and write may be URLs, with the keys in the environment, and copies in /cache.
#
# For GPUs: --build-arg EXTRA=gpu,cluster, then `docker run --gpus all --shm-size 8g`. PyTorch's CUDA builds bring their CUDA with
# them, so the base image stays the same, and the host needs a driver and NVIDIA's container toolkit alone. Who builds on
# a CUDA image all the same: --build-arg PYTHON_IMAGE=<a CUDA runtime image with Python 3.11 or newer and its venv module>.
#
# This file has not been built where it was written: there is no container engine. What its RUN lines do was done there in a
# bare clone, with the same commands and a virtual environment of its own; docs/serving.md has them.
#
# Where pip would fetch CUDA builds of PyTorch for the CPU set-up:
# --build-arg PIP_FLAGS="--extra-index-url <address of PyTorch's CPU wheels>".

ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_FLAGS=""
ARG EXTRA=cpu,cluster
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/torchdlrm
# First what changes rarely: with an empty package, this layer holds the dependencies, and is kept when our code changes.
COPY pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
RUN mkdir -p src/torchdlrm && touch src/torchdlrm/__init__.py \
 && /opt/torchdlrm/bin/pip install $PIP_FLAGS ".[$EXTRA]" \
 && /opt/torchdlrm/bin/pip install $PIP_FLAGS --no-deps --requirement requirements/torchrec.txt \
 # Or setuptools would take its copy of the empty package for newer than ours.
 && rm -rf src build
COPY configs/ configs/
COPY src/ src/
RUN /opt/torchdlrm/bin/pip install --no-deps --force-reinstall .

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin torchdlrm \
 && install --directory --owner 10001 /work && install --directory --mode 1777 /cache
COPY --from=build /opt/torchdlrm /opt/torchdlrm
COPY configs/ /configs/
# What an NVIDIA container runtime reads; without one they mean nothing.
ENV PATH=/opt/torchdlrm/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TORCHDLRM_CACHE=/cache \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /work
VOLUME /work /cache
# A job ends by itself and says with its exit code how: there is nothing to ask while it runs.
HEALTHCHECK NONE
# SIGTERM, which `docker stop` sends, lets a training save a checkpoint; the same command resumes from it.
ENTRYPOINT ["dlrm"]
CMD ["--help"]
