"""Masked-language-model pretraining on preprocessed sequences."""
