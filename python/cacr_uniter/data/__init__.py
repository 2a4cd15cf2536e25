"""Batches, the published LMDB formats, tokenising, the retrieval data set and the importers."""
