# The service image, for a CPU (the default target, `cpu`) or an NVIDIA GPU (`gpu`).
#
#   packages ──► packages-cpu ──► cpu
#        └─────► packages-gpu ──► gpu        runtime ──► cpu, gpu
#
# pip and its cache stay in the stages called packages*: the served image has an environment of
# installed wheels, without torch and without a compiler.

# scripts/pin_base_image.py adds the digest of the tag.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY docker/locked/service-cpu.txt docker/locked/service-gpu.txt ./
# Each wheel is that of the lock file, by sha256; a package that would have to be compiled is an
# error, not a slow build. `make lock` writes the lock files.
# ONNX Runtime's plug-in for TensorRT is removed, because the image has no TensorRT.
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --require-hashes --no-deps \
        --only-binary=:all: --requirement service-cpu.txt \
    && rm /opt/venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_tensorrt.so

# The same package computes on a CPU and on a GPU, and 80 % of it is the plug-in for CUDA. Without
# the plug-in, onnxruntime-gpu takes 66 MB, like onnxruntime (the package for CPUs), so a second set
# of pinned packages would gain nothing. libonnxruntime_providers_shared.so (15 kB) must stay: the
# import needs it.
FROM packages AS packages-cpu
RUN rm /opt/venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so

# CUDA 13 and cuDNN 9 come from wheels, so the base need not be an image of NVIDIA. The host needs
# only the driver (580 or newer) and the container toolkit.
FROM packages AS packages-gpu
RUN python -m pip --python /opt/venv/bin/python install --require-hashes --no-deps \
        --only-binary=:all: --requirement service-gpu.txt

FROM ${PYTHON_IMAGE} AS runtime
# libexpat1: the GDAL in rasterio's wheel links to it, and the slim image has none. Its version is
# left to Debian: a pinned one disappears from the archive with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 pimc \
    && useradd --uid 10001 --gid pimc --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pimc \
    && install --directory --owner=pimc --group=pimc /models /var/lib/pimc
# PYTHONPATH: scheduler and workers of Dask import the code from any folder.
# TMPDIR: temporary files of uploads and maps take some GB. /tmp is in memory if the root file system
# is read-only; /var/tmp is a volume, so it is on disk.
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/srv/pimc \
    HOME=/tmp \
    TMPDIR=/var/tmp \
    PIMC_HOST=0.0.0.0 \
    PIMC_PORT=8000 \
    PIMC_MODEL_DIR=/models \
    PIMC_STATE_DIR=/var/lib/pimc
WORKDIR /srv/pimc
COPY models/ models/
COPY service/ service/
# A number, so that an orchestrator can check that the user is not root.
USER 10001:10001
VOLUME ["/models", "/var/lib/pimc", "/var/tmp"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would send this request through a proxy of the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PIMC_PORT']), timeout=4); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "service"]

FROM runtime AS gpu
COPY --from=packages-gpu /opt/venv /opt/venv
# The folders of CUDA and cuDNN in the wheels, and the driver features that the container toolkit adds.
ENV LD_LIBRARY_PATH=/opt/venv/lib/python3.11/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.11/site-packages/nvidia/cudnn/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
ENV PIMC_PROVIDERS=cpu
