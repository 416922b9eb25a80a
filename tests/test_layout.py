"The metadata has one source, the package is what the notebooks say, and a built wheel holds all it needs."
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
from conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILD = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")

def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    return ini["DEFAULT"]

def copy(to, *folders):
    "A copy of what builds the package, so that no test changes the tree."
    to.mkdir(exist_ok=True)
    for name in BUILD: shutil.copy(ROOT/name, to/name)
    for d in folders: shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return to

def sh(*args, cwd, env):
    r = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy that also holds one file of each kind of data, on two levels."
    src = copy(tmp_path_factory.mktemp("build")/"src", "nanogpt", "lessons")
    for name in ("probe.json", "probe.gz", "probe.LICENSE", "below/probe.json"):
        (src/"nanogpt"/name).parent.mkdir(exist_ok=True)
        (src/"nanogpt"/name).write_text("{}")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(src/"out"), str(src)],
                   check=True, timeout=240)
    with zipfile.ZipFile(next((src/"out").glob("*.whl"))) as z: return {n: z.read(n) for n in z.namelist()}

def test_pyproject_holds_only_what_it_must():
    py = tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf-8"))
    assert set(py) == {"build-system", "project", "tool"} and set(py["project"]) == {"name", "dynamic"} and set(py["tool"]) == {"nbdev"}
    assert py["project"]["name"] == settings()["lib_name"]

def test_metadata_comes_from_settings(wheel):
    import nanogpt
    ini, meta = settings(), message_from_string(next(v for k, v in wheel.items() if k.endswith("/METADATA")).decode())
    assert (meta["Name"], meta["Version"]) == (ini["lib_name"], nanogpt.__version__)
    assert (meta["Summary"], meta["Author"]) == (ini["description"], ini["author"])
    assert meta["Requires-Python"] == ">=" + ini["min_python"]
    names = lambda key: {re.split(r"[;<>=!~ ]", x)[0] for x in ini[key].split()}
    required = [(r.split(";")[0].strip(), r) for r in meta.get_all("Requires-Dist")]
    assert {n for n, r in required if "extra ==" not in r} == names("requirements")
    for extra in ("dev", "bench"): assert {n for n, r in required if f'extra == "{extra}"' in r} == names(f"{extra}_requirements")
    entry = next(v for k, v in wheel.items() if k.endswith("/entry_points.txt")).decode()
    assert "nanogpt = nanogpt.cli:main" in entry and "nanogpt = nanogpt._modidx:d" in entry

def test_wheel_holds_modules_and_data(wheel):
    kinds = {".py", ".json", ".gz", ".LICENSE", ".j2", ".css", ".js"}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/"nanogpt").rglob("*") if p.suffix in kinds or p.name == "py.typed"}
    probes = {"nanogpt/probe.json", "nanogpt/probe.gz", "nanogpt/probe.LICENSE", "nanogpt/below/probe.json"}
    lessons = {"nanogpt/course_lessons/"+p.name for p in (ROOT/"lessons").glob("*.ipynb")}
    assert len(lessons)>20 and not (here | probes | lessons) - set(wheel)
    assert "nanogpt/py.typed" in wheel and any(n.endswith("/LICENSE") for n in wheel)
    assert all(n.startswith(("nanogpt/", "nanogpt-")) for n in wheel)

def test_every_file_of_the_package_is_code_or_known_data():
    strange = [p.name for p in (ROOT/"nanogpt").rglob("*") if p.is_file() and "__pycache__" not in p.parts
               and p.suffix not in {".py", ".json", ".gz", ".LICENSE", ".j2", ".css", ".js"} and p.name != "py.typed"]
    assert not strange, f"setup.py has no pattern that puts these into a wheel: {strange}"

def test_every_dependency_is_pinned():
    lines = [x.split("#")[0].strip() for x in (ROOT/"constraints.txt").read_text(encoding="utf-8").splitlines()]
    assert all("==" in x for x in lines if x)
    pinned = {x.split("==")[0] for x in lines if x}
    ini = settings()
    wanted = {re.split(r"[;<>=]", x)[0] for key in ("requirements", "dev_requirements", "bench_requirements") for x in ini[key].split()}
    assert pinned == wanted
    assert "torch==2.13.0" in lines

def snapshot(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for d in ("nbs", "nanogpt") for p in sorted((root/d).rglob("*")) if p.is_file()}

def test_exported_and_clean(tmp_path, env):
    "Exporting and cleaning change nothing: nobody edited a module by hand, nobody forgot to export."
    src = copy(tmp_path/"src", "nbs", "nanogpt")
    before = snapshot(src)
    for module in (src/"nanogpt").glob("*.py"):
        if not module.name.startswith("__"): module.unlink()  # a module whose notebook is gone must show up too
    for tool in ("nbdev-export", "nbdev-clean"): sh(str(Path(sys.executable).with_name(tool)), cwd=src, env=env)
    after = snapshot(src)
    assert {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)} == set(), "run `make notebooks` and commit the result"

@pytest.mark.parametrize("module", ["nanogpt", "nanogpt.core"])
def test_import_is_light(module, env):
    "The package opens at once: torch and the other heavy ones are imported where they are used."
    loaded = sh(sys.executable, "-c", f"import {module}, sys; print(*sys.modules)", cwd=ROOT, env=env).split()
    assert not {"torch", "datasets", "matplotlib", "IPython"} & set(loaded)
