"""Headless runs of the notebooks: execution, manifests, comparison and HTML pages."""
