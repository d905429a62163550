"""What faults do to runs: kill -9 at random moments, damaged files, full disks, races on one store.

    python benchmarks/faults.py [--kills 40] [--damages 60] [--disks 20] [--races 20] [--seed 0]
        [--home DIR] [--only TEXT]

Every fault is followed by an ordinary run, which must end with the plan, metrics, verdict and
output digests of an undisturbed run. Prints a table of counts; exit code 1 if one did not. Runs are
of a tiny random checkpoint and take seconds, so moments within a stage are hit.
tests/support/faults.py does the faults, tests/pipeline/test_faults.py a few of each.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from support import faults  # noqa: E402
from support.forks import Fork  # noqa: E402
from support.runs import World  # noqa: E402

Case = Callable[[World, random.Random], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("kills", 40), ("damages", 60), ("disks", 20), ("races", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args(arguments)
    home = options.home or Path(tempfile.mkdtemp(prefix="faults-"))
    world = faults.small_world(home)
    faults.finish(world.elsewhere(home / "first"))  # creates the tracking database
    whole = world.elsewhere(home / "whole")
    run = faults.finish(whole)
    cases = Cases(whole, faults.findings(run.result), faults.windows(run), run.lines[-1][0])

    table: list[tuple[str, Counter[str]]] = []
    selected: list[tuple[str, int, Case]] = [
        *((f"kill -9 in {p}", options.kills, cases.killed_in(p)) for p in faults.PHASES),
        ("kill -9 anywhere", options.kills, cases.killed_anywhere),
        ("kill -9 three times over", options.kills // 4, cases.killed_thrice),
        ("store file damaged", options.damages, cases.store_damaged),
        ("checkpoint file damaged", options.damages, cases.checkpoint_damaged),
        ("disk full, store and checkpoints", options.disks, cases.disk_full),
        ("disk full, everything", options.disks, cases.disk_full_of_everything),
        ("two runs at once", options.races, cases.raced),
        ("two runs at once, one killed", options.races, cases.raced_and_killed),
    ]
    for name, count, case in (one for one in selected if options.only in one[0]):
        counts: Counter[str] = Counter()
        for number in range(count):
            rng = random.Random(f"{options.seed} {name} {number}")
            place = world.elsewhere(home / "trial")
            try:
                counts[case(place, rng)] += 1
            except AssertionError as error:
                counts["WRONG"] += 1
                print(f"{name} #{number}: {error}", file=sys.stderr)
            shutil.rmtree(place.home)
        table.append((name, counts))
        print(f"{name:<34} {count:>4}  " + ", ".join(f"{n} {w}" for w, n in counts.most_common()))
        sys.stdout.flush()
    return int(any(counts["WRONG"] for _, counts in table))


class Cases:
    """One trial each: what was done, in words, or AssertionError."""

    def __init__(
        self, whole: World, findings: object, windows: dict[str, float], seconds: float
    ) -> None:
        self.whole, self.findings, self.windows, self.seconds = whole, findings, windows, seconds

    def recovers(self, place: World) -> Fork:
        """Nothing looks finished that is not; the next run ends as if nothing had happened."""
        assert faults.wrong(place) == []
        run = faults.finish(place)
        self.same(run)
        assert faults.leftovers(place) == []
        return run

    def same(self, run: Fork) -> None:
        assert faults.findings(run.result) == self.findings, "other findings than undisturbed"

    def killed_in(self, phase: str) -> Case:
        def case(place: World, rng: random.Random) -> str:
            hit = faults.kill_within(place, phase, rng.uniform(0, self.windows[phase]))
            drafts = len(faults.leftovers(place))
            self.recovers(place)
            if not hit:
                return "hit after it, next run equal"
            return "left a draft, next run equal" if drafts else "next run equal"

        return case

    def killed_anywhere(self, place: World, rng: random.Random) -> str:
        hit = faults.kill_after(place, rng.uniform(0, self.seconds))
        self.recovers(place)
        return "next run equal" if hit else "had ended, next run equal"

    def killed_thrice(self, place: World, rng: random.Random) -> str:
        for _ in range(3):
            faults.kill_after(place, rng.uniform(0.2 * self.seconds, self.seconds))
            assert faults.wrong(place) == []
        self.recovers(place)
        return "next run equal"

    def store_damaged(self, place: World, rng: random.Random) -> str:
        shutil.copytree(self.whole.store, place.store)
        shutil.copytree(self.whole.checkpoints, place.checkpoints)
        path = rng.choice(faults.files_of_store(place))
        faults.spoil(path, rng.choice(faults.DAMAGES), rng)
        assert len(faults.wrong(place)) == 1, f"{path}: the damage cannot be seen"
        run = faults.finish(place)
        self.same(run)
        key = path.parent.name
        cached = [stage["cached"] for stage in run.result["stages"] if stage["key"] == key]
        assert not any(cached), f"{path} was read"
        return "made again, equal" if cached else "not needed, equal"

    def checkpoint_damaged(self, place: World, rng: random.Random) -> str:
        shutil.copytree(self.whole.store, place.store)
        shutil.copytree(self.whole.checkpoints, place.checkpoints)
        (export,) = place.checkpoints.glob("[!.]*")
        path = rng.choice(sorted(p for p in export.iterdir() if not p.name.startswith("note-")))
        faults.spoil(path, rng.choice(faults.DAMAGES), rng)
        run = place.start()
        code = run.wait()
        if code == 0:
            self.same(run)
            return "of no consequence, equal"
        assert code == 2, f"{path.name}: exit code {code}\n{run.text}"
        assert str(export) in run.result["error"], run.result["error"]
        export.rename(place.home / "aside")
        self.recovers(place)
        return "refused by name; moved away, equal"

    def disk_full(self, place: World, rng: random.Random) -> str:
        return self._disk_full(place, rng, everything=False)

    def disk_full_of_everything(self, place: World, rng: random.Random) -> str:
        return self._disk_full(place, rng, everything=True)

    def _disk_full(self, place: World, rng: random.Random, everything: bool) -> str:
        # too small for a stage output, or about what an export asks for
        few = rng.randrange(16 << 10, (3 << 20) if everything else (700 << 10))
        size = rng.choice((few, rng.randrange(15 << 20, (20 << 20))))
        with faults.small_disk(place.home / "disk", size) as disk:
            if disk is None:
                return "not tried: needs the right to mount a tmpfs"
            uri = f"sqlite:///{disk}/mlruns/mlflow.db" if everything else place.uri
            home = place.elsewhere(disk, uri=uri)
            outputs = [] if everything else [f"hydra.run.dir={place.home}/out"]
            run = home.start(*outputs)
            code = run.wait()
            assert faults.wrong(home) == []
            assert faults.leftovers(home) == []
            if not everything:
                assert code in (0, 2), f"exit code {code}\n{run.text}"
                assert code == 0 or "free" in run.text, run.text  # "GB free", "free some"
            faults.enlarge(disk, 64 << 20)
            self.recovers(home)
        return {0: "it fitted, equal", 2: "one line of error, next run equal"}.get(
            code, f"exit code {code}, next run equal"
        )

    def raced(self, place: World, rng: random.Random) -> str:
        first, second = self._two(place, rng)
        for run in (first, second):
            code = run.wait()
            assert code == 0, f"exit code {code}\n{run.text}"
            self.same(run)
        made = Counter(
            stage["key"]
            for run in (first, second)
            for stage in run.result["stages"]
            if not stage["cached"]
        )
        assert set(made.values()) == {1}, f"made twice: {made}"
        return "both equal, each stage made once"

    def raced_and_killed(self, place: World, rng: random.Random) -> str:
        first, second = self._two(place, rng)
        faults.pause(rng.uniform(0, self.seconds))
        first.kill()
        code = second.wait()
        assert code == 0, f"exit code {code}\n{second.text}"
        self.same(second)
        self.recovers(place)
        return "the other equal, next run equal"

    def _two(self, place: World, rng: random.Random) -> tuple[Fork, Fork]:
        first = place.start()
        faults.pause(rng.choice((0.0, rng.uniform(0, self.seconds))))
        return first, place.start()


if __name__ == "__main__":
    sys.exit(main())
