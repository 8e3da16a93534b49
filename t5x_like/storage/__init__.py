"""What outlives a process: paths, work directories, manifests, checkpoints. It knows no model and no config class."""
