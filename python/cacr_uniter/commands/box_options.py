"""The options of the box rule, named as the fields of `cacr train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cacr_uniter.arguments import positive
from cacr_uniter.errors import UserError

if TYPE_CHECKING:
    from cacr_uniter.data.box_rule import BoxRule

BOX_OPTIONS = ("confidence", "max_regions", "min_regions", "fixed_regions")
RUN_RULE = "that of the checkpoint's run, else as the database's folder says"


def add_box_options(parser: argparse.ArgumentParser, default: str = "as the database's folder says") -> None:
    """Adds the four options; `default` says what counts where none is given."""
    group = parser.add_argument_group("box rule", f"how many regions of an image are used (default: {default})")
    add = group.add_argument
    add("--confidence", type=float, metavar="P", help="regions above this confidence (0.2 where only others are given)")
    add("--max-regions", type=positive, metavar="N", help="upper bound (100)")
    add("--min-regions", type=int, metavar="N", help="lower bound, also below the confidence (10)")
    add("--fixed-regions", type=positive, metavar="N", help="so many regions of every image instead")


def asked_rule(args: argparse.Namespace) -> BoxRule | None:
    """The rule of the options, None where none is given.

    Raises:
        UserError: bounds that no image can meet, or a fixed number beside bounds.
    """
    from cacr_uniter.data.box_rule import BoxRule

    given = [name for name in BOX_OPTIONS if getattr(args, name) is not None]
    if not given:
        return None
    if args.fixed_regions is not None:
        if given[0] != "fixed_regions":
            raise UserError(f"--fixed-regions stands instead of --{given[0].replace('_', '-')}: give one or the other")
        return BoxRule(fixed=args.fixed_regions)
    default = BoxRule()
    return BoxRule(
        default.threshold if args.confidence is None else args.confidence,
        default.max_boxes if args.max_regions is None else args.max_regions,
        default.min_boxes if args.min_regions is None else args.min_regions,
    )
