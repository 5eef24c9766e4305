"""Verification with the official weights: esm2kit's outputs next to published ones."""
