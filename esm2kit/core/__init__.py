"""Shared utilities that do not depend on proteins or models: errors, files, downloads, processes and random numbers."""
