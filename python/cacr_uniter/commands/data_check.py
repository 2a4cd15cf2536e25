"""`cacr data check`: read every record of a database, or of a scene set, and say what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from cacr_uniter.arguments import Parser
from cacr_uniter.commands.box_options import add_box_options, asked_rule
from cacr_uniter.commands.progress import bars


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="cacr data check",
        description="Read every record of a text or image database, or of all databases of a scene set, and compare it "
        "with its JSON files and with sense. Exit status 1 if there are problems.",
    )
    parser.add_argument(
        "folder", type=Path, help="text database, image database or the folder that holds it, or scene set"
    )
    parser.add_argument(
        "--images", type=Path, help="of a text database: the image database that should hold its images"
    )
    add_box_options(parser)
    args = parser.parse_args(argv)

    from cacr_uniter.data.check import check_database, check_scene_set, is_scene_set

    rule = asked_rule(args)
    with bars() as progress:
        if args.images is None and is_scene_set(args.folder):
            reports = check_scene_set(args.folder, rule=rule, progress=progress)
        else:
            reports = [check_database(args.folder, images=args.images, rule=rule, progress=progress)]
    print(*reports, sep="\n")
    return 0 if all(report.ok for report in reports) else 1
