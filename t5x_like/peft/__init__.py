"""Adapters: small trained additions to weights that stay as they are."""
