"""The `cacr` command: finds the asked part, imports only that, and turns expected problems into one sentence.

Exit status: 0 done, 1 the data are damaged (data check), 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from cacr_uniter.errors import ProcessError, UserError, is_out_of_memory

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "versions, GPUs, backends, and what to do about what is missing"),
    "demo": ("demo", "scenes, a small training with CACR, and its scores beside chance, in minutes"),
    "study": ("study", "the comparison of auxiliary losses over seeds"),
    "train": ("train", "fine-tune UNITER, with or without congruence regularisation"),
    "data scenes": ("data_scenes", "write a scene data set: pictures, captions, features, Winoground-like test set"),
    "data import": ("data_import", "region features and captions of other programs into the published databases"),
    "data check": ("data_check", "read a database and say what is wrong with it"),
    "eval winoground": ("eval_winoground", "text, image and group scores of a checkpoint or a score file"),
    "eval retrieval": ("eval_retrieval", "image and text retrieval recall of a checkpoint"),
    "eval attention": ("eval_attention", "how congruent the attention of a checkpoint is, by layer, and its picture"),
    "bench": ("bench", "kernels beside their peers, training cost, numerics, pictures; see cacr bench --help"),
}
"""Command to (module of `cacr_uniter.commands`, summary)."""

EXTRA = "train"
EXTRA_PACKAGES = {
    "PIL": "pillow",
    "accelerate": "accelerate",
    "jsonargparse": "jsonargparse",
    "lmdb": "lmdb",
    "lz4": "lz4",
    "matplotlib": "matplotlib",
    "msgpack": "msgpack",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
    "yaml": "pyyaml",
}
"""Import name to package of the extra `train`."""

LOOSE_PACKAGES = {"pyarrow": "pyarrow", "h5py": "h5py"}
"""Packages that single file formats need."""

SMALLER = {
    "train": "`cacr train --plan` shows what a run needs; take a larger model.freeze_layers, a smaller model.size, "
    "data.cache disk or a larger machine",
    "eval": "lower --batch-size, or take --device cpu",
}
"""What to do where memory is full, by the first word of the command."""


def main(argv: list[str] | None = None) -> int:
    """Runs `cacr` with `argv` (default: the process's) and returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words[:1]
    words = words[1:] if traceback else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"cacr-kernels {version('cacr-kernels')}")
        return 0
    try:
        name, rest = _command(words)
        if name is None:
            return 0
        return int(importlib.import_module(f"cacr_uniter.commands.{COMMANDS[name][0]}").main(rest))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, ValueError) as error:
        return _fail(error, str(error), traceback)
    except OSError as error:
        return _fail(error, _refused(error), traceback)
    except ModuleNotFoundError as error:
        advice = _missing(error.name or "")
        if advice is None:
            raise
        return _fail(error, advice, traceback)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cure = SMALLER.get(words[0], "close other programs, or give it less to do at once")
        return _fail(ProcessError(), f"out of memory: {cure}", traceback)


def run() -> NoReturn:
    """The command ``cacr``. One of several processes leaves without Python's farewell, during which a thread of
    torch.distributed that lets go of a Python object would abort it."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def usage() -> str:
    """The list of commands."""
    lines = [f"  cacr {name:<18}{summary}" for name, (_, summary) in COMMANDS.items()]
    head = "usage: cacr [--traceback] COMMAND ...   (cacr COMMAND --help explains one)"
    options = ["  --traceback shows where an error arose", "  -V, --version prints the version"]
    return "\n".join([head, "", *lines, "", *options])


def _command(words: list[str]) -> tuple[str | None, list[str]]:
    """The command's name and its arguments; name None after printing the help of a group such as `data`."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    group = [name for name in COMMANDS if name.startswith(words[0] + " ")]
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print("\n".join(f"  cacr {name:<18}{COMMANDS[name][1]}" for name in group))
        return None, []
    known = ", ".join(group or COMMANDS)
    raise UserError(f"{' '.join(words[: 2 if group else 1])!r} is no command; there are: {known}")


def _missing(module: str) -> str | None:
    """What to do about a module that is not installed; None for a module that no extra brings."""
    top = module.split(".")[0]
    if top in EXTRA_PACKAGES:
        return f"the package {EXTRA_PACKAGES[top]} is not installed; run: pip install 'cacr-kernels[{EXTRA}]'"
    if top in LOOSE_PACKAGES:
        return f"the package {LOOSE_PACKAGES[top]} is not installed; run: pip install {LOOSE_PACKAGES[top]}"
    return None


def _refused(error: OSError) -> str:
    """Sentence about a file that the system would not read or write."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason.lower()}" if error.filename else reason


def _fail(error: Exception, message: str, traceback: bool) -> int:
    """Prints the sentence, unless the first of the processes that torchrun started prints the same one."""
    if traceback:
        raise error
    rank = os.environ.get("RANK", "0")
    if rank == "0" or isinstance(error, ProcessError):
        process = f"process {rank}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 and rank != "0" else ""
        print(f"cacr: {process}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run()
