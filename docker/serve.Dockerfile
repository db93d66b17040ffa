# An image that serves a bundle: HTTP on port 8080, with the page at `/`. From the root of the repository:
#
#   docker build --file docker/serve.Dockerfile --tag torchdlrm-serve .
#   docker run --rm --publish 8080:8080 --volume "$PWD/bundle:/bundle:ro" torchdlrm-serve
#   docker run --rm --publish 8080:8080 --env-file keys torchdlrm-serve s3://models/live/current --host 0.0.0.0
#
# `keys` holds AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=... and AWS_REGION=..., a line each.
#
# This file has not been built where it was written: there is no container engine. What its RUN lines do was done there in a
# bare clone, with the same commands and a virtual environment of its own; docs/serving.md has them.
#
# Where pip would fetch CUDA builds of PyTorch: --build-arg PIP_FLAGS="--extra-index-url <address of PyTorch's CPU wheels>".

ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_FLAGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/torchdlrm
# First what changes rarely: with an empty package, this layer holds the dependencies, and is kept when our code changes.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p src/torchdlrm && touch src/torchdlrm/__init__.py \
 && /opt/torchdlrm/bin/pip install $PIP_FLAGS '.[serve]' \
 # Or setuptools would take its copy of the empty package for newer than ours.
 && rm -rf src build
COPY configs/ configs/
COPY src/ src/
RUN /opt/torchdlrm/bin/pip install --no-deps --force-reinstall .

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin torchdlrm \
 && install --directory --mode 1777 /cache
COPY --from=build /opt/torchdlrm /opt/torchdlrm
ENV PATH=/opt/torchdlrm/bin:$PATH PYTHONDONTWRITEBYTECODE=1 TORCHDLRM_CACHE=/cache
USER 10001
VOLUME /bundle /cache
EXPOSE 8080
# Live, not ready: an orchestrator asks for readiness itself, and a container that still loads is not to be killed.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/live', timeout=2)"]
# SIGTERM, which `docker stop` sends, lets accepted requests finish; --stop-timeout should leave them the time.
ENTRYPOINT ["dlrm", "serve"]
CMD ["/bundle", "--host", "0.0.0.0", "--port", "8080"]
