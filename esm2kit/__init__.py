"""Train, use and judge ESM-2 protein language models."""
