"""What every command shares: a refusal is one line, and what is printed survives any terminal, pipe or shell.

Paper    none
In       a command's main(argv) and its name
Out      exit status 0, or 1 and a line that says what is wrong
Next     train.py, search.py, eval.py, serve.py and tools/ end with it
Differs  nothing: it is not in the released code
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable

import torch

if os.name != "posix":  # before fcntl and resource are asked for
    sys.exit("this program runs on Linux and macOS: it locks and syncs run folders as POSIX has it")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line by ValueError, without pages of usage before it."""

    def __init__(self, **given):
        super().__init__(allow_abbrev=False, **given)

    def error(self, message: str):
        raise ValueError(f"{message}; --help lists what there is")


def check_device(name: str) -> str:
    """The name of a device that this machine has. Raises ValueError with those that there are."""
    present = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in present and not (name == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device {name}: this machine has {', '.join(present)}")
    return name


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def quoted(*words) -> str:
    """A command line that a shell reads as these words."""
    return shlex.join(map(str, words))


def run(main: Callable[[list[str]], int | None], name: str, stopped: str = "stopped") -> None:
    """Runs a command and ends the process: a wrong input or a full disk ends it with one line and status 1.

    A character that the terminal cannot show is printed as its escape.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        if code := main(sys.argv[1:]):
            sys.exit(code)
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {' '.join(str(error).split())}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        sys.exit(f"{name}: out of memory; pass smaller batches or, to train, --micro_batch or --recompute")
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: {stopped}")
