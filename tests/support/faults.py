"""What goes wrong in the world, done to real runs: kill -9, full disks, damaged files, races."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import tiny
from support.forks import Fork
from support.runs import World, rows, write_pack

from eaft_prune.core.store import Store, damage
from eaft_prune.records.manifest import misfits

# phase -> (the line that a run prints before it, the line that it prints at its end)
PHASES = {
    "profile": ("pack/profile/", "profile "),
    "export": ("plan ", "export "),
    "evaluate/base": ("inspect/pruned", "evaluate/base/"),
    "evaluate/pruned": ("evaluate/base/", "evaluate/pruned/"),
}
DAMAGES = ("truncated", "bit flipped", "zeroed", "emptied", "removed", "lengthened")


def small_world(home: Path) -> World:
    """A random checkpoint with a few companion files, three packs, one tracking database."""
    home.mkdir(parents=True, exist_ok=True)
    packs = {
        name: write_pack(home / f"{name}.parquet", rows(60, seed))
        for seed, name in enumerate(("alpha", "beta", "gamma"))
    }
    model = tiny.write_checkpoint(home / "model")
    for number in range(60):  # each is copied and synced: the export takes a while
        (model / f"note-{number:02d}.txt").write_text("a companion file\n")
    return World(home, model, packs, f"sqlite:///{home}/mlruns/mlflow.db")


def finish(world: World, *overrides: str) -> Fork:
    """A run that must end well."""
    run = world.start(*overrides)
    code = run.wait()
    assert code == 0, f"exit code {code}:\n{run.text}"
    return run


def findings(result: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same experiment must agree on to the last bit."""
    digests = {k: v for k, v in result["digests"].items() if not k.startswith("inspect/")}
    found = {name: result[name] for name in ("plan", "reports", "gate")}
    return {**found, "checkpoint": result["checkpoint"]["digest"], "digests": digests}


def wrong(world: World) -> list[str]:
    """What looks finished under this world's store and checkpoints, and is not whole."""
    found = [f"{home}: {why}" for home in Store(world.store).outputs() if (why := damage(home))]
    for export in world.checkpoints.glob("[!.]*"):
        if why := misfits(export):
            found.append(f"{export}: {why}")
    return found


def leftovers(world: World) -> list[Path]:
    """Drafts that are still there."""
    places = (world.store, world.checkpoints)
    return [path for place in places for path in place.rglob("*.draft")]


def windows(run: Fork) -> dict[str, float]:
    """Seconds that each phase of a finished run took."""

    def when(prefix: str) -> float:
        return next(at for at, line in run.lines if line.startswith(prefix))

    return {phase: when(end) - when(begin) for phase, (begin, end) in PHASES.items()}


def kill_within(world: World, phase: str, seconds: float) -> bool:
    """Kill a run so long after a phase began; False if the phase was over by then."""
    begin, end = PHASES[phase]
    run = world.start()
    assert run.until(begin), run.text
    time.sleep(seconds)
    return run.kill() and not any(line.startswith(end) for _, line in run.lines)


def kill_after(world: World, seconds: float) -> bool:
    """Kill a run so long after its start; False if it had ended."""
    run = world.start()
    time.sleep(seconds)
    return run.kill()


def pause(seconds: float) -> None:
    time.sleep(seconds)


def spoil(path: Path, how: str, rng: random.Random) -> None:
    """Damage one file in place."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if how == "removed":
        path.unlink()
        return
    if how == "truncated":
        data = data[:at]
    elif how == "bit flipped":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        before = bytes(data)
        data[at : at + 64] = bytes(len(data[at : at + 64]))
        if bytes(data) == before:
            data[at] = 255
    elif how == "emptied":
        data = bytearray()
    else:
        data += bytes(rng.randrange(1, 99))
    path.write_bytes(data)


def files_of_store(world: World) -> list[Path]:
    return sorted(p for p in world.store.rglob("*") if p.is_file() and p.suffix != ".lock")


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path | None]:
    """A tmpfs of so many bytes, or None without the right to mount one."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def enlarge(disk: Path, size: int) -> None:
    """Somebody made room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
