"""`python -m t5x_like`, with jax believing that it is on a TPU machine: it then reads its place from the environment
that Google Kubernetes Engine gives to pods, by its own code. The devices are CPUs."""

import sys

from jax._src.clusters import cloud_tpu_cluster

from t5x_like.__main__ import main

if __name__ == "__main__":
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    sys.exit(main())
