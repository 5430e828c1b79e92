# The image that trains: `docker run IMAGE ARGUMENTS` is `python -m training ARGUMENTS`.
#
#   packages ──► training
#
# On Linux x86-64 the torch that pip takes is built for CUDA 13; it computes on a CPU as well. Where
# no GPU will ever be, --build-arg PIP_EXTRA_INDEX_URL=… with PyTorch's index of CPU builds saves
# 4 GB.

# A tag, so that the base gets its security updates; a release should name a digest instead:
# --build-arg PYTHON_IMAGE=python@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
# Read by pip: an index beside the one that it is set up with.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# The extra's requirements alone, as wheels alone: see service.Dockerfile. ONNX Runtime only checks
# here, on the CPU, what was exported: its plug-ins for GPUs go.
RUN python -m venv --without-pip /opt/venv \
    && python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['training'], sep='\n')" > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install --only-binary=:all: \
        --constraint constraints.txt --requirement requirements.txt \
    && rm /opt/venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so \
        /opt/venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_tensorrt.so

FROM ${PYTHON_IMAGE} AS training
# libexpat1: the GDAL in rasterio's wheel links to it, and the slim image has none. Its version is
# left to Debian: a pinned one disappears from the archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pimc \
    && useradd --uid 10001 --gid pimc --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pimc \
    && install --directory --owner=pimc --group=pimc /models /srv/pimc/runs /srv/shared/data
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Runs and data lie where they do beside a checkout, so the commands are the same as there.
WORKDIR /srv/pimc
COPY --from=packages /opt/venv /opt/venv
COPY models/ models/
COPY training/ training/
USER 10001:10001
VOLUME ["/models", "/srv/pimc/runs", "/srv/shared/data"]
STOPSIGNAL SIGTERM
# It ends when it is done, and its log says how it goes.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
