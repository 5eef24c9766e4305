"""Contacts between residues: predicted by a model, and compared with structures."""
