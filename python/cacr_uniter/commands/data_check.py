"""`cacr data check`: read every record of a database and say what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from cacr_uniter.arguments import Parser
from cacr_uniter.commands.box_options import add_box_options, asked_rule
from cacr_uniter.commands.progress import bars


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="cacr data check",
        description="Read every record of a text or image database and compare it with its JSON files and with sense. "
        "Exit status 1 if there are problems.",
    )
    parser.add_argument("folder", type=Path, help="text database, image database, or the folder that holds it")
    parser.add_argument(
        "--images", type=Path, help="of a text database: the image database that should hold its images"
    )
    add_box_options(parser)
    args = parser.parse_args(argv)

    from cacr_uniter.data.check import check_database

    with bars() as progress:
        report = check_database(args.folder, images=args.images, rule=asked_rule(args), progress=progress)
    print(report)
    return 0 if report.ok else 1
