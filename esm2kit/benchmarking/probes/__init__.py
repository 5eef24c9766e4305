"""Probes: simple models of frozen features."""
