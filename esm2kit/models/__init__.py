"""The ESM-2 model: architecture, weights, and inference."""
