"""Retrieval and answers that cite their sources."""
