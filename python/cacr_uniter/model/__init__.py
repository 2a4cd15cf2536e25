"""UNITER for image-text matching: configuration, network and checkpoints."""

from cacr_uniter.model.config import UniterConfig
from cacr_uniter.model.uniter import Output, UniterForRetrieval

__all__ = ["Output", "UniterConfig", "UniterForRetrieval"]
