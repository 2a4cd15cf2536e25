"""Readers and writers of the published LMDB databases, under one name."""

from cacr_uniter.data.box_rule import BoxRule
from cacr_uniter.data.image_db import ImageDB, Regions
from cacr_uniter.data.image_writer import ImageDBWriter
from cacr_uniter.data.text_db import Caption, TextDB, TextDBWriter

__all__ = ["BoxRule", "Caption", "ImageDB", "ImageDBWriter", "Regions", "TextDB", "TextDBWriter"]
