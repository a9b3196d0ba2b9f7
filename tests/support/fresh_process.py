"""Runs code in a process of its own that has imported torch and done nothing else.

It is forked from one that waits: importing torch takes seconds, and a process of pytest waits for that once. An import
starts no thread, so that nothing is lost in the fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WAITING = """
import json, os, signal, sys, traceback
import torch

def become(code, arguments, folder, environment, output, errors, seconds):
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        os.dup2(os.open(path, flags), number)
    signal.alarm(seconds)  # which ends it
    os.chdir(folder)
    os.environ.update({name: value for name, value in environment.items() if value is not None})
    for name in (name for name, value in environment.items() if value is None):
        os.environ.pop(name, None)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        status = ended.code
        if not isinstance(status, (int, type(None))):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)

requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
for request in requests:
    if (child := os.fork()) == 0:
        become(**json.loads(request))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class FreshProcesses:
    """Calling it runs code, as subprocess.run([sys.executable, "-c", code, *arguments], ...) would."""

    SECONDS = 120  # for one of them

    def __init__(self) -> None:
        paths = os.pathsep.join(sys.path)  # the package that this process imports, and no other
        self.waiting = subprocess.Popen(
            [sys.executable, "-c", WAITING], env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(
        self, code: str, *arguments: object, cwd: Path | str = ".", environment: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Its status, output and errors. environment: on top of this session's; a variable that is None is unset."""
        words = [str(argument) for argument in arguments]
        request = {"code": code, "arguments": words, "folder": str(Path(cwd).absolute()), "seconds": self.SECONDS}
        with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r") as errors:
            request |= {"environment": environment or {}, "output": output.name, "errors": errors.name}
            assert self.waiting.stdin is not None
            assert self.waiting.stdout is not None
            print(json.dumps(request), file=self.waiting.stdin, flush=True)
            status = self.waiting.stdout.readline()
            if not status:
                raise RuntimeError(f"the process that waits ended, status {self.waiting.wait()}")
            return subprocess.CompletedProcess(["-c", *words], int(status), output.read(), errors.read())

    def end(self) -> None:
        self.waiting.communicate()
