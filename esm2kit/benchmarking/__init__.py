"""Benchmark embeddings on labelled tasks and compare the reports."""
