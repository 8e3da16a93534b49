# An image of this checkout for TPU machines. From the root of the checkout:
#
#   docker build --file launch/docker/tpu.Dockerfile --tag REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG .
#   docker push REGION-docker.pkg.dev/PROJECT/REPOSITORY/t5x_like:TAG
#
# It runs as root: the device files of the chips belong to root, on Google Kubernetes Engine and on TPU VMs.
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app

# Everything that the code stands on, in a layer that only new versions rebuild.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir t5x_like && pip install setuptools==84.2.1 \
    && pip install --constraint constraints.txt --editable ".[tpu,gcs,trackers]"

COPY . .
RUN pip install --no-deps --no-build-isolation --editable .

# No shell around it, which would keep SIGTERM to itself: the run saves and ends with status 75.
ENTRYPOINT ["python", "-m", "t5x_like"]
CMD ["--help"]
