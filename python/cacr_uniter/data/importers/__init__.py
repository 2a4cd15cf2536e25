"""Importers: region features and captions of other programs into the LMDB databases.

One file a format; `features` and `captions` are the entry points, `records` the checks that every format goes through.
"""

from cacr_uniter.data.importers.captions import import_captions
from cacr_uniter.data.importers.features import FORMATS, import_features

__all__ = ["FORMATS", "import_captions", "import_features"]
