"""Evaluation: Winoground scores and retrieval recall, from a model or from stored scores."""
