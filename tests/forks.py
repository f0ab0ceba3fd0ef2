"""Processes that begin with torch loaded: forks of one server. Loading it takes seconds, and the tests start Python hundreds of times.

`Process` and `run` take what follows `python` on a command line and do what it would do: `-m MODULE`, `-c CODE` or a file, with
arguments. Everything but loading is that of a process of its own: folder, environment, streams, signals, exit status. What a start
itself does is tested with real ones. What libraries read of an environment when they are loaded is the server's: without the hub.

`run(*TWO, ...)` is torchrun, whose two workers are forks as well: it starts this file in place of Python, which asks the server.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOADED = (
    "accelerate", "torch._dynamo", "torch.distributed.launcher.api", "mmgen.formats.convert", "mmgen.metrics.evaluate", "mmgen.methods.distill.method",
    "mmgen.methods.run", "mmgen.sampling.folder", "mmgen.sampling.loading", "mmgen.cli", "datasets",
    "diffusers.models.autoencoders.autoencoder_kl", "transformers",
)  # fmt: skip
TWO = "-m", "torch.distributed.run", "--nproc_per_node", "2"


class Process:
    """As subprocess.Popen(text=True); without `stdout` and `stderr` it keeps what is written there for `communicate`.

    Attributes: pid; returncode, of a process that a signal ended the negative number of it.
    """

    def __init__(
        self, *arguments: str | Path, cwd: Path | None = None, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None,
        ignored: int | None = None, own_terminal: bool = False, **environment: str | None,
    ) -> None:  # fmt: skip
        """The streams: descriptors. ignored: a signal. own_terminal: it controls that of stdin. environment: beyond that of the tests;
        None: without."""
        merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        assert merged["OMP_NUM_THREADS"] == "1", "the server has read it already"
        if "FORKS" not in merged:
            merged |= places()
        self.args, self.returncode = [sys.executable, *map(str, arguments)], None
        self._kept = [tempfile.TemporaryFile() if stream is None else None for stream in (stdout, stderr)]
        request = {
            "arguments": self.args[1:], "cwd": str(cwd or os.getcwd()), "ignored": ignored, "own_terminal": own_terminal,
            "environment": {name: value for name, value in merged.items() if value is not None},
        }  # fmt: skip
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(merged["FORKS"])
        with open(os.devnull) as nothing, tempfile.TemporaryFile() as file:  # a request may be longer than a message
            file.write(json.dumps(request).encode())
            file.flush()
            streams = [nothing.fileno() if stdin is None else stdin]
            streams += [kept.fileno() if kept else stream for kept, stream in zip(self._kept, (stdout, stderr), strict=True)]
            socket.send_fds(self._server, [b"x"], [*streams, file.fileno()])
            self._answers = self._server.makefile()
            self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._server.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None and not select.select([self._server], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it wrote to the standard output and to the standard error, once it has ended."""
        self.wait(timeout)
        return tuple(None if kept is None else _content(kept) for kept in self._kept)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*arguments: str | Path, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
    """As subprocess.run(capture_output=True, text=True); options: those of `Process`."""
    process = Process(*arguments, **options)
    try:
        out, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _content(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="backslashreplace")


@functools.cache
def places() -> dict[str, str]:
    """For an environment: where the server waits, and what torchrun takes for Python, as other programs may."""
    folder = tempfile.TemporaryDirectory(prefix="forks-")
    place = Path(folder.name)
    (place / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" ask "$@"\n')
    (place / "python").chmod(0o700)
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub")}  # its library reads them when it is loaded
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **hub}
    command = [sys.executable, __file__, "serve", str(place / "socket")]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(folder.cleanup)
    assert server.stdout.readline() == "ready\n", "the server of forks did not begin"
    return {"FORKS": str(place / "socket"), "PYTHON_EXEC": str(place / "python")}


def ask(arguments: list[str]) -> int:
    """In place of `python ARGUMENTS`: a fork with these streams, to which signals are passed on. Its exit status."""
    process = Process(*(word for word in arguments if word != "-u"), stdin=0, stdout=1, stderr=2, **os.environ)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    status = process.wait()
    return status if status >= 0 else 128 - status


# ---------------------------------------------------------------------- the server


def serve(address: str) -> dict[str, Any]:
    """Forks at each request; returns the request, in the fork."""
    gc.collect()
    gc.freeze()  # a fork that looks for cycles copies all pages of what was loaded
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:  # it is closed when the tests end, however they do
        connection, _ = listening.accept()
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 4)
        if os.fork():
            connection.close()
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if child := os.fork():
            _watch(child, connection)
        connection.close()
        with open(descriptors.pop(), "rb") as file:
            file.seek(0)
            request = json.loads(file.read())
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        return request
    os._exit(0)


def _watch(child: int, connection: socket.socket) -> None:
    """Tells who asked for it the process's number and how it ended; where nobody listens any more, it is killed."""
    connection.sendall(f"{child}\n".encode())
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.01)[0]:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
    connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    os._exit(0)


def begin(request: dict[str, Any]) -> None:
    """Makes this process what Python would have made of the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run in the background
    if request["ignored"]:
        signal.signal(request["ignored"], signal.SIG_IGN)
    if request["own_terminal"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        raw = os.fdopen(number, f"{mode}b", closefd=False)
        lines = name == "stderr" or name == "stdout" and os.isatty(number)
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    kind, *rest = request["arguments"]
    given = [place for place in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if place]
    if kind in ("-m", "-c"):
        what, *rest = rest
        sys.path[:2] = [os.getcwd(), *given]
        sys.argv = ["-c", *rest]
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[:2] = [str(Path(kind).parent), *given]
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def end(status: int) -> None:
    """As Python ends, but without taking all modules apart, which takes a second; with them where FORKS_END is set."""
    if "FORKS_END" in os.environ:
        raise SystemExit(status)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        raise SystemExit(ask(sys.argv[2:]))
    from mmgen.system.process import tune

    tune()
    for name in LOADED:
        with contextlib.suppress(ImportError):  # of what is optional
            importlib.import_module(name)
    request = serve(sys.argv[2])
    try:
        begin(request)
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        end(left.code or 0)
    end(0)
