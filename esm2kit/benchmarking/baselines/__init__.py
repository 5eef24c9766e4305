"""Baselines that do not use a language model."""
