"""Scores of mutations and sequences from a masked language model, without labels."""
