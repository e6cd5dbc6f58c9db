"""OUT.partial: a run that was cut off goes on where it was, and OUT appears whole or not at all.

```
OUT.partial/journal.json    the recipe, the input's fingerprint, what is finished
OUT.partial/lock            held (flock) by the process that works here
OUT.partial/model/          what becomes OUT, by one rename
```

A folder of that name with anything else in it is somebody else's, and stays as it is.

The journal is replaced after every shard, atomically and on disk before the next one begins. A
shard that is there and not in the journal was cut off in between, and is made again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from scalellm_plugins.errors import ConfigError

from .container import writing
from .plan import Selection
from .recipe import Recipe, differences

_FILES = ("journal.json", "journal.json.tmp", "lock")


class State(msgspec.Struct, forbid_unknown_fields=True):
    """journal.json. `shards`: {finished file: bytes}."""

    recipe: Recipe
    source: str
    fingerprint: str
    selection: Selection | None = None
    shards: dict[str, int] = {}


class Journal:
    """The work on OUT; made by `begin`, ended by `finish`."""

    def __init__(self, out: Path, state: State, lock: IO[bytes]) -> None:
        self._out, self._state, self._lock = out, state, lock
        self.resumed = bool(state.shards) or self._chose

    @property
    def _chose(self) -> bool:
        chosen = self._state.selection
        return chosen is not None and bool(chosen.influence or chosen.channels)

    @property
    def folder(self) -> Path:
        """What will be OUT."""
        return _partial(self._out) / "model"

    @property
    def selection(self) -> Selection | None:
        """What was chosen from the calibration text, once it has been."""
        return self._state.selection

    def select(self, selection: Selection) -> None:
        """Remember the choice: it cost a pass over the text."""
        self._state.selection = selection
        self.save()

    def has(self, shard: str) -> bool:
        """Whether a shard is finished (and is still what it was)."""
        path = self.folder / shard
        return shard in self._state.shards and (
            path.is_file() and path.stat().st_size == self._state.shards[shard]
        )

    def wrote(self, shard: str) -> None:
        """A shard is finished."""
        self._state.shards[shard] = (self.folder / shard).stat().st_size
        self.save()

    def finish(self) -> None:
        """Make OUT of it.

        Raises:
            ConfigError: OUT has come into being meanwhile.
            OutputError: it cannot be renamed.
        """
        _refuse_existing(self._out)
        with writing(self._out):
            _sync_folder(self.folder)
            self.folder.rename(self._out)
            _sync_folder(self._out.parent)
        self._remove()

    def give_up(self, refused: bool) -> None:
        """Leave the work for a run to come, if there is any worth it.

        Args:
            refused: the command cannot be done; what it chose is of no use to another.
        """
        if self._state.shards or (self._chose and not refused):
            self._lock.close()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove()

    def _remove(self) -> None:
        """Remove what this module has made, and nothing else: a user may have put files there."""
        partial = _partial(self._out)
        for name in _FILES:
            (partial / name).unlink(missing_ok=True)
        self._lock.close()
        with suppress(OSError):  # not empty
            partial.rmdir()

    def save(self) -> None:
        """Write the journal."""
        write_whole(_partial(self._out) / "journal.json", msgspec.json.encode(self._state))


def begin(out: Path, recipe: Recipe, source: Path, fingerprint: str) -> Journal:
    """Begin the work on OUT, or go on with it.

    Raises:
        ConfigError: OUT exists, OUT.partial is no folder of ours, somebody else is working on it,
            or what was begun was another command's or on another input.
        OutputError: nothing can be written there.
    """
    refuse(out)
    partial = _partial(out)
    with writing(out):
        (partial / "model").mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"another process is working in {partial}") from None
    state = State(recipe, str(source.resolve()), fingerprint)
    try:
        journal = Journal(out, _earlier(partial, state) or state, lock)
    except BaseException:
        lock.close()
        raise
    try:
        for cut_off in (partial / "model").glob("*.tmp"):  # made again, and in the way till then
            cut_off.unlink()
        journal.save()  # before anything is in `model`, which is ours by the journal only
    except BaseException:
        journal.give_up(refused=False)
        raise
    return journal


def refuse(out: Path) -> None:
    """OUT is never overwritten, and a folder OUT.partial that we have not made not touched.

    Raises:
        ConfigError: there is one.
    """
    _refuse_existing(out)
    partial = _partial(out)
    if not (partial.exists() or partial.is_symlink()):
        return
    others = (
        ["it is no folder"] if partial.is_symlink() or not partial.is_dir() else _others(partial)
    )
    if others:
        raise ConfigError(
            f"{partial}, in which OUT is prepared, exists and was not made by `scalellm compress` "
            f"({', '.join(others[:3])}): name another OUT, or move it away"
        )


def _others(partial: Path) -> list[str]:
    """What is in the folder and not ours; without a journal, nothing has been written yet."""
    found = sorted(path.name for path in partial.iterdir())
    others = [name for name in found if name not in (*_FILES, "model")]
    if not (partial / "journal.json").exists():
        inside = partial / "model"
        others += (
            sorted(f"model/{path.name}" for path in inside.iterdir()) if inside.is_dir() else []
        )
        if (partial / "lock").exists() and (partial / "lock").stat().st_size:
            others.append("lock")
    return others


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten: name another OUT, or remove it")


def _earlier(partial: Path, now: State) -> State | None:
    """What an earlier run has left, if it was this one."""
    path = partial / "journal.json"
    remedy = f"Give the earlier command to go on with it, or remove {partial} to begin anew."
    try:
        before = msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} cannot be understood ({error}). {remedy}") from None
    reasons = differences(before.recipe, now.recipe)
    if before.source != now.source:
        reasons.append(f"MODEL: {before.source} then, {now.source} now")
    elif before.fingerprint != now.fingerprint:
        reasons.append(f"{now.source} has changed since")
    if reasons:
        raise ConfigError(f"{partial} was begun differently ({'; '.join(reasons)}). {remedy}")
    return before


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut.

    Raises:
        OutputError: there is no room, or no right to write.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
