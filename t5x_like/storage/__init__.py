"""What outlives a process: paths, work directories, manifests, checkpoints. It knows no model and no config class."""

import os

# Read once by etils, at its first path of any kind: it would import TensorFlow where that is installed (10 s, and the
# trainer never does) for gs:// files, which gcsfs reads as well.
os.environ.setdefault("EPATH_USE_TF", "false")
