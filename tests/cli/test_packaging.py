"""The built wheel holds all that the repository's command line uses, and works without it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import runs
from support.runs import REPOSITORY, World

import eaft_prune

pytest_plugins = ("support.worlds",)

PACKAGE = REPOSITORY / "src" / "eaft_prune"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the installed backend; without one, pip fetches it."""
    out = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here,
            "--disable-pip-version-check", "--wheel-dir", str(out), str(REPOSITORY),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)
    return home


def files_under(root: Path, suffixes: tuple[str, ...] = ()) -> set[str]:
    """Relative paths of the files under a directory, all or those of some kinds."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (not suffixes or path.suffix in suffixes)
    }


def test_the_wheel_holds_conf_sweeps_and_package_data(unpacked: Path) -> None:
    home = unpacked / "eaft_prune"
    assert files_under(home / "conf") == files_under(REPOSITORY / "conf")
    assert files_under(home / "sweeps") == files_under(REPOSITORY / "sweeps")
    assert files_under(home / "demo") == files_under(PACKAGE / "demo")
    packs = ("reasoning_style", "tool_agentic", "calib_prompt")
    assert {f"packs/{name}.parquet" for name in packs} <= files_under(home / "demo")
    assets = files_under(PACKAGE / "report", (".js", ".css", ".html"))
    assert assets
    assert files_under(home / "report") >= assets
    code = (".py",)
    assert files_under(home, code) == files_under(PACKAGE, code)
    plugins = PACKAGE.parent / "hydra_plugins"
    assert files_under(unpacked / "hydra_plugins") == files_under(plugins, code)
    for name in files_under(home / "conf"):
        assert (home / "conf" / name).read_bytes() == (REPOSITORY / "conf" / name).read_bytes()


def test_the_wheel_holds_nothing_of_the_workshop(unpacked: Path) -> None:
    top = {path.name for path in unpacked.iterdir()}
    assert top == {"eaft_prune", "hydra_plugins", f"eaft_prune-{eaft_prune.__version__}.dist-info"}
    stray = {".pyc", ".lock", ".draft", ".db"}
    assert not [name for name in files_under(unpacked) if Path(name).suffix in stray]


@pytest.mark.slow
def test_the_wheel_runs_with_its_own_conf_and_sweeps(unpacked: Path, tmp_path: Path) -> None:
    """From a directory outside the repository; the wheel's conf is changed to tell it apart."""
    marked = unpacked / "eaft_prune" / "conf" / "pruning" / "eaft_reap.yaml"
    text = marked.read_text()
    marked.write_text(text + "\nw_good: 0.123\n")
    sweep = unpacked / "eaft_prune" / "sweeps" / "only_in_the_wheel.yaml"
    seeds = unpacked / "eaft_prune" / "sweeps" / "seeds.yaml"
    sweep.write_text(seeds.read_text())
    try:
        code = (
            "import sys, eaft_prune; from eaft_prune.cli.main import check, main; "
            "print(eaft_prune.__file__); "
            "print(len(check(['+sweeps=only_in_the_wheel']).points)); "
            "sys.exit(main(sys.argv[1:]))"
        )
        arguments = ["--cfg", "job", "--package", "pruning"]
        done = runs.process(arguments, tmp_path, code=code, PYTHONPATH=str(unpacked))
    finally:
        marked.write_text(text)
        sweep.unlink()
    assert done.code == 0, done.err
    where, points, printed = done.out.split("\n", 2)
    assert where == str(unpacked / "eaft_prune" / "__init__.py")
    assert int(points) > 1
    assert "w_good: 0.123" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_editable_install_runs_from_anywhere(tmp_path: Path) -> None:
    done = runs.process(["--cfg", "job", "--package", "pruning"], tmp_path)
    assert done.code == 0, done.err
    assert "keep_n: 28" in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_demo_is_shipped() -> None:
    """The default command line names these, and they exist."""
    demo = PACKAGE / "demo"
    packs = {path.stem for path in (demo / "packs").glob("*.parquet")}
    assert packs == {"reasoning_style", "tool_agentic", "calib_prompt"}
    assert (demo / "checkpoint" / "config.json").is_file()
    weights = sum(path.stat().st_size for path in (demo / "checkpoint").iterdir())
    assert weights <= 12e6
    assert sum(path.stat().st_size for path in (demo / "packs").iterdir()) <= 4e6


def test_options_of_ones_own_work_beside_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    options = REPOSITORY / "docs" / "examples" / "options"
    flags = ["--config-dir", str(options), "--cfg", "job", "--package", "pruning"]
    done = runs.process(["experiment=mine", *flags], tmp_path, PYTHONPATH=str(unpacked))
    assert done.code == 0, done.err
    assert "keep_n: 24\n" in done.out
    assert "name: eaft_reap_calm\n" in done.out


@pytest.mark.slow
@pytest.mark.skipif(
    not (PACKAGE / "demo" / "checkpoint").is_dir(), reason="the demo checkpoint is not shipped yet"
)
def test_the_shipped_model_and_packs_run(world: World, tmp_path: Path) -> None:
    """The default command line on fewer, shorter blocks; every default group but the counts."""
    few = ["eval.num_blocks=4", "eval.seq_lens=[256]", "gate.seq_lens=[256]"]
    few += ["profile.num_blocks=4", "profile.seq_len=256", f"tracking.uri={world.uri}"]
    done = runs.main(few, tmp_path)
    assert done.code == 0, done.out
    result = done.result
    assert set(result["reports"]["base"]) == {
        "reasoning_style", "tool_agentic", "calib_prompt", "UNION",
    }  # fmt: skip
    assert result["reports"]["base"]["UNION"]["256"]["ppl"] < 20
    assert {len(ids) for ids in result["plan"]["kept"]} == {28}
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"outputs", "store", "checkpoints"}
