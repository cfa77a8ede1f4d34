"""The child process that runs a model's code and its tests; started by path, imports none of ours.

It reads {"code", "tests", "memory", "seconds"} from standard input and writes how many tests passed
to the file descriptor named on its command line. It keeps an accident from doing harm; it is no
wall against an attacker, who can undo what one process does to itself.
"""

import json
import os
import resource
import sys

# Audit hooks cannot be removed again, and CPython raises these events in C.
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "shutil.",
    "pty.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def guard(event, arguments):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Refuse what code under test has no business doing."""
    if event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is not allowed in code under test")
    if event == "open" and arguments[2] and arguments[2] & _WRITING:
        raise PermissionError("files cannot be written in code under test")


def limit(memory: int, seconds: int) -> None:
    """Bound address space (MiB), processor time, files and cores of this process."""
    for kind, most in (
        (resource.RLIMIT_AS, memory * 2**20),
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def main() -> None:
    """Run the code once and each test after it; a test passes that raises nothing."""
    task = json.load(sys.stdin)
    answer = int(sys.argv[1])
    # What the code prints is of no use, and its standard output is not the answer's way.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limit(task["memory"], task["seconds"])
    sys.addaudithook(guard)
    space: dict[str, object] = {"__name__": "__main__"}
    passed = 0
    try:
        exec(compile(task["code"], "<reply>", "exec"), space)
        for test in task["tests"]:
            try:
                exec(compile(test, "<test>", "exec"), space)
                passed += 1
            except BaseException:  # noqa: BLE001 - also SystemExit is a failed test
                continue
    except BaseException:  # noqa: BLE001 - code that does not run passes nothing
        pass
    os.write(answer, json.dumps(passed).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
