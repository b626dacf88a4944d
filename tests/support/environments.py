"""Virtual environments that tests install into, with dependencies in them that were installed once and kept."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys

from models import ROOT

CACHE = ROOT / ".cache/environments"


def create(folder, name, key, install):
    """Creates an environment, as a copy of one that is kept from run to run.

    Args:
        folder: where it is created.
        name: of the kept one; another of that name, with another key, goes.
        key: all that decides what is installed, beside this Python.
        install: a function from the folder of an empty environment, called unless there is a kept one.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps([sys.version, sys.executable, *key]).encode()).hexdigest()[:16]
    kept = CACHE / f"{name}-{digest}"
    done = CACHE / f"{name}-{digest}.done"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            for mark in CACHE.glob(f"{name}-*.done"):
                mark.unlink()
            for other in CACHE.glob(f"{name}-*"):
                shutil.rmtree(other)
            subprocess.run([sys.executable, "-m", "venv", kept], check=True)
            install(kept)
            done.touch()
        # Python finds its environment by the place of its executable, scripts by their first line. Installers replace
        # files, they do not write into them, so that the two may have all others in common.
        shutil.copytree(kept, folder, symlinks=True, copy_function=_link)
    for script in (folder / "bin").iterdir():
        content = script.read_bytes()
        if content.startswith(f"#!{kept}/".encode()):
            script.unlink()
            script.write_bytes(content.replace(bytes(kept), bytes(folder), 1))
            script.chmod(0o755)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy2(source, target)
