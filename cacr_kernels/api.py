"""The public functions: validate, choose a backend, run, reduce."""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import native
from .arguments import as_problems, check_choice, parse_attention, parse_options, parse_reduction, parse_spans, reduce_loss
from .ops import congruence
from .problem import Options, Spans
from .reference import qk_reference, scores_reference
from .reference.blocks import accumulation_dtype
