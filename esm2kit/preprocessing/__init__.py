"""FASTA files and clusters to a training dataset."""
