"Every notebook runs from top to bottom, each in its own process: notebooks that share one would share os.environ and memory."
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))
TEST = str(Path(sys.executable).with_name("nbdev-test"))

def run(notebook, env):
    "Run it without real data: a lesson must work for a reader who has none."
    env = {k: v for k, v in env.items() if k != "NANOGPT_DATA"}
    return subprocess.run([TEST, str(notebook), "--verbose"], cwd=notebook.parents[1], env=env, capture_output=True, text=True, timeout=240)

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook, env):
    r = run(notebook, env)
    assert r.returncode == 0 and "Success" in r.stdout, r.stdout + r.stderr
    assert not (warned := re.findall(r".*\b[A-Z]\w*Warning: .*", r.stderr)), "a reader would see\n" + "\n".join(warned)

def test_there_are_notebooks(): assert NOTEBOOKS

FALSE = [("assert 1 == 2", "AssertionError"), ("import warnings; warnings.warn('careful')", "UserWarning: careful")]

@pytest.mark.parametrize("source,says", FALSE, ids=["claim", "warning"])
def test_control(source, says, tmp_path, env):
    "A notebook whose claim is false fails, and a warning is seen."
    import nbformat.v4 as nbf
    (tmp_path/"nbs").mkdir()
    (tmp_path/"pyproject.toml").write_bytes((ROOT/"pyproject.toml").read_bytes())
    notebook = tmp_path/"nbs"/"01_false.ipynb"
    notebook.write_text(nbf.writes(nbf.new_notebook(cells=[nbf.new_code_cell(source)])), encoding="utf-8")
    with pytest.raises(AssertionError, match=says): test_notebook(notebook, env)
