# The training image: `docker run IMAGE ARGUMENTS` runs `python -m training ARGUMENTS`.
#
#   packages ──► training
#
# On Linux x86-64 the torch of the lock file is built for CUDA 13; it also computes on a CPU.

# scripts/pin_base_image.py adds the digest of the tag.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY docker/locked/training.txt ./
# Only wheels, by sha256: see service.Dockerfile. Here ONNX Runtime only checks exported graphs on the
# CPU, so its plug-ins for GPUs are removed.
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --require-hashes --no-deps \
        --only-binary=:all: --requirement training.txt \
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
# Runs and data have the same relative paths as beside a checkout, so the commands are the same.
WORKDIR /srv/pimc
COPY --from=packages /opt/venv /opt/venv
COPY models/ models/
COPY training/ training/
USER 10001:10001
VOLUME ["/models", "/srv/pimc/runs", "/srv/shared/data"]
STOPSIGNAL SIGTERM
# A training ends when it is done, and its log shows the progress.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
