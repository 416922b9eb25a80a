"""Each gate is silent on the repository, silent on small good examples, and speaks on small bad ones (its controls)."""
import nbformat.v4 as nbf
import pytest
from conftest import ROOT
from gates import GATES

EXPORT = '''#| export
def double(
    x:int, # any number
)->int:    # twice that number
    "Twice the number."
    return 2*x'''
GOOD = ["# Doubling\n\n> What twice means", "#| default_exp doubling", "## A first step", EXPORT, "assert double(2) == 4",
        "## What you learned\n\nTwice is plus itself."]
MODULE = '__all__ = ["double"]\n' + EXPORT.replace("#| export", "") + "\n"
A = "__all__ = []\nclass A:\n    'An A.'\n"
PROTOCOL = """__all__ = []
class P(Protocol):
    'What can be measured.'
    def m(
        self,
        x, # (B,)
        y, # (B,)
    ): 'Their distance.'
class A:
    'Keeps the promise of P.'
"""
PNG = nbf.new_output("display_data", {"image/png": "iVBORw0KGgo="})
ERROR = nbf.new_output("error", ename="ValueError", evalue="", traceback=[])
WARNING = nbf.new_output("stream", name="stderr", text="x.py:1: UserWarning: careful")

def notebook(sources, output=None):
    "The text of a notebook; a source that begins like prose is a markdown cell; `output` goes to the last code cell."
    prose = lambda s: s.startswith(("# ", "## ", "- ", "*")) or s[0].isupper()
    cells = [nbf.new_markdown_cell(s) if prose(s) else nbf.new_code_cell(s) for s in sources]
    if output: [c for c in cells if c.cell_type == "code"][-1].outputs = [output]
    return nbf.writes(nbf.new_notebook(cells=cells))

def write(root, name="01_doubling", sources=GOOD, module=MODULE, output=None, files=()):
    "A repository of one lesson and its module, and of other files: name → text."
    mine = {f"nbs/{name}.ipynb": notebook(sources, output), f"nanogpt/{name.split('_', 1)[1]}.py": module}
    for path, text in {**mine, **dict(files)}.items():
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        (root/path).write_text(text.replace("ROOT", str(root)), encoding="utf-8")
    return root

def plus(*new, at=5): return dict(sources=[*GOOD[:at], *new, *GOOD[at:]])
def long(n): return dict(module=MODULE + "\n\ndef _long():\n" + "    x = 1\n"*(n - 1))
def readme(commands): return {"README.md": f"```sh\n{commands}\n```\n"}

def later(source):
    "A module that imports from a lesson that comes after it."
    files = {"nbs/01a_halving.ipynb": notebook([s.replace("doubling", "halving") for s in GOOD]), "nanogpt/halving.py": MODULE}
    return dict(module=source + "\n" + MODULE, files=files)

# What each gate must catch. Some could be fooled in several ways, so they have several controls.
BAD = {
    "one_notebook_one_module": [dict(name="1_doubling"), dict(name="01_twice"), dict(files={"nanogpt/stray.py": ""})],
    "import_order": [later("from .halving import double"), later("import nanogpt.halving"), later("from nanogpt import halving"),
                     later("def _lazy():\n    from nanogpt.halving import double"), later("from . import halving")],
    "ruff_clean": [dict(module="import os\n" + MODULE), dict(files={"tests/test_x.py": "import os\n"})],
    "parameters_explained": [dict(module=MODULE.replace(" # any number", "")),
                             dict(module="__all__ = []\ndef f(x, y): # both\n    'Sum.'\n    return x+y\n"),
                             dict(module=A + "    def m(self, x): return x\n"),
                             dict(module=PROTOCOL + "    def m(self, x, z): return x\n")],
    "docstrings": [dict(module=MODULE.replace('"Twice the number."', "pass")), dict(module=A + "    def m(self): return 1\n")],
    "public_names": [dict(module=MODULE.replace("__all__", "ALL")), dict(module=MODULE + "left = 1\n"),
                     dict(module=MODULE + "for i in range(3): pass\n")],
    "no_star_imports": [dict(module="from os import *\n" + MODULE), plus("#| export\nfrom os import *")],
    "no_pickle": [dict(module="import pickle\n" + MODULE), plus("import torch; torch.load('x.pt')"),
                  dict(files={"tests/test_x.py": "import numpy\nnumpy.load('x', allow_pickle=True)\n"})],
    "tested_after_claim": [dict(sources=[s for s in GOOD if "assert" not in s]), plus("x = 1", "x = 2", "x = 3", at=4),
                           dict(sources=[s.replace("assert double(2) == 4", "test_worlds = double(2)") for s in GOOD]),
                           dict(sources=[s.replace("assert", "#| eval: false\nassert") for s in GOOD])],
    "module_length": [dict(module=MODULE + "X = 1\n"*250)],
    "function_length": [long(26), dict(module=long(51)["module"] + "def _f(): pass\n"*99)],
    "cell_length": [plus("x = 1\n"*26), plus("#| export\nclass A:\n" + "    x = 1\n"*50), plus("#| export\n" + "X = 1\n"*26)],
    "notebook_size": [plus("A word. "*60_000)],
    "notebook_shape": [plus("x = 1", at=0), dict(sources=GOOD[:-1]), dict(sources=["# Doubling", *GOOD[1:]])],
    "pictures_described": [dict(output=PNG), dict(sources=GOOD[:5], output=PNG)],
    "headings": [plus(*["x = 1"]*10)],
    "short_paragraphs": [plus("One. Two! Three? Four. Five."), plus("- a list\n\nOne `a.b`. *Two.*\nThree? (Four.) Five: 3.5.")],
    "outputs_calm": [dict(output=ERROR), dict(output=WARNING)],
    "no_machine_paths": [dict(files={"docs/a.md": "see ROOT/nbs"}), dict(files={".ci/run": "cd /" + "work/main"})],
    "readme_commands": [dict(files=readme("nanogpt fly --high")),
                        dict(files={**readme("make tea"), "tests/readme_commands.txt": "make tea\n"})],
    "links_lead_somewhere": [plus("Next is [02_halving](02_halving.ipynb)."), dict(files={"README.md": "See [there](docs/a.md#top)."})],
}
# Good code that a gate once hurt, or could.
FAIR = {
    "parameters_explained": [dict(module=A + "    def m(self, x): # (B,T)\n        'Same.'\n        return x\n"),
                             dict(module=PROTOCOL + "    def m(self, x, y): return x\n")],
    "docstrings": [dict(module=PROTOCOL + "    def m(self, x, y): return x\n")],
    "public_names": [dict(module=MODULE + "LIMITS = {k: 1 for k in 'ab'}\n_i = 1\n")],
    "no_pickle": [plus("Never use pickle. It runs code.")],
    "tested_after_claim": [plus("x = 1", "x = 2", at=4)],
    "function_length": [dict(module=long(25)["module"] + "    # why\n\n"*20)],
    "cell_length": [plus("#| export\nclass A:\n" + "    x = 1\n"*45), plus("x = 1\n" + "# why\n"*40)],
    "notebook_shape": [dict(sources=[GOOD[1], GOOD[0], *GOOD[2:]])],
    "pictures_described": [dict(sources=[*GOOD[:5], "*Picture:* two bars, one twice as high.", GOOD[5]], output=PNG)],
    "short_paragraphs": [plus("Use `a. B.` or “C. D.”, i.e. this. Two. Three 3.5, e.g. 4. Four.\n\n- One. Two.\n- Three. Four. Five.")],
    "links_lead_somewhere": [plus("See [here](01_doubling.ipynb#top), [the web](https://x.org/a) and `a[i](j)`.")],
    "readme_commands": [dict(files={**readme("$ make tea  # hot"), "Makefile": "tea:\n", "tests/readme_commands.txt": "make tea\n"})],
}

@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    bad = GATES[name](ROOT)
    assert not bad, f"{GATES[name].__doc__}\n" + "\n".join(bad)

@pytest.mark.parametrize("name,n", [(name, n) for name, examples in BAD.items() for n in range(len(examples))])
def test_control(name, n, tmp_path):
    assert GATES[name](write(tmp_path, **BAD[name][n])), "the gate is blind: it does not see this"

@pytest.mark.parametrize("name", GATES)
def test_fair(name, tmp_path):
    for n, example in enumerate([{}, *FAIR.get(name, [])]): assert GATES[name](write(tmp_path/str(n), **example)) == []

def test_every_gate_has_a_control(): assert set(BAD) == set(GATES)
