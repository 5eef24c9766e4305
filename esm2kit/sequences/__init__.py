"""Protein sequences: the alphabet, FASTA files, the on-disk store, clusters and batches."""
