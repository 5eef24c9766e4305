"""Embed proteins into HDF5 files, read these files, and explore the embeddings."""
