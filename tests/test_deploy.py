"The files that other engines read: each can be read, its commands are understood by the program, and it says what was not run."
import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

from nanogpt.cli import parse_only
from nanogpt.core import ConfigError

FILES = [ROOT/"deploy"/name for name in ("skypilot.yaml", "slurm.sbatch", "trainjob.yaml")]
KNOWN = {"$SLURM_JOB_NUM_NODES": "2", "$HOST": "first", "$SKYPILOT_NUM_GPUS_PER_NODE": "8"} # what the engines put in

def strings(o):
    "Every text in a YAML document; a list of words counts as one line, as a command."
    if isinstance(o, dict): o = list(o.values())
    if isinstance(o, list) and o and all(isinstance(x, str) for x in o): yield shlex.join(o)
    elif isinstance(o, list): yield from (s for x in o for s in strings(x))
    elif isinstance(o, str): yield o

def scripts(path):
    "The shell texts in a file, without comments but with the commands that its comments tell to type."
    text = path.read_text(encoding="utf-8")
    own = [text] if path.suffix==".sbatch" else list(strings(yaml.safe_load(text)))
    return own+[line.lstrip("# ") for line in text.splitlines() if re.match(r"#\s+nanogpt ", line)]

def commands(text):
    "What follows `nanogpt` in each line, with the engines' variables filled in."
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#"): continue
        for name, value in KNOWN.items(): line = line.replace(name, value)
        words = shlex.split(line)
        at = next((i for i, w in enumerate(words) if w.rpartition("/")[2]=="nanogpt"), None)
        if at is not None and words[at+1:]: yield words[at+1:] # alone, it is a name

def test_these_are_the_files():
    "Those that train are tested here, those that serve the dashboard in test_container.py."
    import test_container
    served = [*test_container.LABELLED, ROOT/"deploy"/"chat.env", ROOT/"deploy"/"Dockerfile.dockerignore"]
    here = {p for p in (ROOT/"deploy").rglob("*") if p.is_file()}
    assert here==set(FILES) | {p for p in served if "deploy" in p.parts}

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_it_can_be_read_and_says_what_was_not_run(path):
    "bash reads every script in it, and its first lines say what was tried and what was not."
    top = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
    assert "# Tried: " in top and "# Not run: " in top
    for text in scripts(path):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode==0 and not done.stderr, (text, done.stderr)

@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_its_commands_are_understood(path):
    "The program parses every command, and the step it asks for divides among the processes it is given."
    found = [parse_only(words)[1] for text in scripts(path) for words in commands(text)]
    assert found and not [v for o in found for v in vars(o).values() if "$" in str(v)]
    for o in found:
        if type(o).__name__=="LaunchConfig":
            assert parse_only(list(o.command))[1].accum(o.nproc*o.nodes)>=1 and str(o.out).endswith("runs/gpt2")
        elif type(o).__name__=="TrainConfig": assert o.accum(16)==1

def test_control():
    "A command with a misspelled setting is refused, and a script with a missing quote is seen."
    with pytest.raises(ConfigError, match="did you mean --steps"):
        for words in commands("srun nanogpt launch --nproc 8 -- pretrain --step 3"): parse_only(words)
    assert subprocess.run(["bash", "-n"], input='echo "x', capture_output=True, text=True).returncode
