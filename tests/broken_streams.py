"""A script: commands of mmgen, each in a process of its own whose standard streams are closed, full, or a pipe that nobody reads.

Takes a JSON list of [kind, [argument, ...]] and prints one of [exit status, what it wrote to a stream that works]. Those of ENDS end as
Python ends, which flushes once more; the others as `tests/forks.py` ends, which runs this, without the second that Python takes.
"""

import io
import json
import os
import sys
import tempfile

from mmgen.__main__ import main

ENDS = "train-imm", "sample", "--help"
# What becomes of stdout and stderr
KINDS = {
    "closed": ("closed", "closed"), "stdout full": ("full", "kept"), "stderr full": ("kept", "full"), "pipe": ("pipe", "pipe"),
}


def stream(number: int, what: str, kept: int):
    """Puts it at the descriptor, and returns the stream that Python makes of it at its start."""
    if what == "closed":
        os.close(number)
        return None
    if what == "pipe":
        reader, target = os.pipe()
        os.close(reader)
    else:
        target = kept if what == "kept" else os.open("/dev/full", os.O_WRONLY)
    os.dup2(target, number)
    return io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), encoding="utf-8", line_buffering=number == 2)


def run(kind: str, arguments: list[str]) -> list:
    with tempfile.TemporaryFile() as kept:
        child = os.fork()
        if child == 0:
            out, err = KINDS[kind]
            sys.stdout, sys.stderr = stream(1, out, kept.fileno()), stream(2, err, kept.fileno())
            sys.argv = ["mmgen", *arguments]
            if arguments[0] in ENDS:
                os.environ["FORKS_END"] = "as Python does"
            main()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kept.seek(0)
        return [status, kept.read().decode()]


if __name__ == "__main__":
    found = [run(*case) for case in json.loads(sys.argv[1])]
    print(json.dumps(found))
