"""`cacr train`: fine-tune UNITER; see `cacr_uniter.training`."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    from cacr_uniter.training import main as train

    return train(argv)
