"""Architectures, one file each, and their published weights."""
