"""Fetching a pinned Python package's archive with the interpreter's own pip."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import SetupError

_TIMEOUT = 900
"""Seconds that pip may take; 100 MB at 1 Mbit/s."""


@dataclass(frozen=True)
class Package:
    """A published file, pinned by version and content."""

    requirement: str
    """`name==version`."""
    sha256: str
    size: int
    """Bytes to download."""
    source: bool = False
    """Take the source archive and not the wheel."""


def fetch(package: Package, folder: Path, *, wanted_by: str) -> Path:
    """Download `package` into `folder`, which is created, and return the archive.

    Args:
        package: what to fetch; pip checks its SHA-256 before it unpacks anything.
        folder: a new directory on the disk that will hold the result.
        wanted_by: the name the user gave, for messages.

    Raises:
        SetupError: no pip, no network, no such file, or the file differs from what was published.
    """
    folder.mkdir(parents=True)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    form = "--no-binary=:all:" if package.source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", form, "--require-hashes"]
    command += ["--retries=1", "--timeout=15", "--disable-pip-version-check", "--quiet"]
    command += [f"--dest={folder}", f"--requirement={pinned}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"'{wanted_by}' is not cached and fetching {package.requirement} took longer than "
            f"{_TIMEOUT} s; try again on a faster connection"
        ) from error
    if done.returncode != 0:
        raise SetupError(_why(done.stderr, package, wanted_by))
    archive = next(file for file in folder.iterdir() if file != pinned)
    _check(archive, package)
    return archive


def _why(stderr: str, package: Package, wanted_by: str) -> str:
    """Return one sentence out of what pip said."""
    start = f"'{wanted_by}' is not cached and {package.requirement} could not be fetched: "
    if "No module named pip" in stderr:
        return f"{start}{sys.executable} has no pip; run `{sys.executable} -m ensurepip` once"
    if "HASHES" in stderr:
        return f"{start}the file's SHA-256 differs from the published {package.sha256}"
    if "No space left" in stderr:
        needed = 4 * package.size // 10**6
        return f"{start}the disk is full; free {needed} MB, or set TUNESMITH_CACHE to another disk"
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip failed without saying why"
    return (
        f"{start}offline, or the package index cannot be reached ({reason}); connect once, or set "
        "TUNESMITH_CACHE to a cache that has it"
    )


def _check(archive: Path, package: Package) -> None:
    # pip has checked the same hash; a wheel taken from pip's own cache is checked only here.
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise SetupError(
            f"{package.requirement}: {archive.name} has SHA-256 {found}, expected {package.sha256}"
        )
