"""Experiments: each file returns a ConfigDict from `get_config`, starting from `common.config()`."""
