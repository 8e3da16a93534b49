# An image of this checkout for machines with NVIDIA GPUs, whose driver is new enough for CUDA 13 (580 or newer).
# CUDA itself comes with jax. From the root of the checkout:
#
#   docker build --file launch/docker/gpu.Dockerfile --tag REGISTRY/t5x_like-gpu:TAG .
#   docker run --gpus=all --shm-size=8g --volume="$PWD/runs:/app/runs" REGISTRY/t5x_like-gpu:TAG \
#     train --config=tiny --workdir=runs/tiny
FROM python:3.11.14-slim-bookworm

# The last two tell NVIDIA's container runtime what to bring in.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app

# Everything that the code stands on, in a layer that only new versions rebuild.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY launch/docker/cuda.txt launch/docker/cuda.txt
RUN mkdir t5x_like && pip install setuptools==84.2.1 \
    && pip install --constraint constraints.txt --constraint launch/docker/cuda.txt \
    --editable ".[cuda,gcs,trackers]"

COPY . .
RUN pip install --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 1000 trainer \
    && mkdir --parents runs \
    && chown trainer:trainer runs

USER 1000

# No shell around it, which would keep SIGTERM to itself: the run saves and ends with status 75.
ENTRYPOINT ["python", "-m", "t5x_like"]
CMD ["--help"]
