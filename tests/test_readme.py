"What the README tells people to type is understood by the program: every `nanogpt …` line is parsed by the real CLI."
import importlib.util
import shlex

import pytest
from conftest import ROOT
from gates import readme_lines

def known():
    lines = (ROOT/"tests"/"readme_commands.txt").read_text(encoding="utf-8").splitlines()
    return [x.strip() for x in lines if x.strip() and not x.startswith("#")]

def verbs(line):
    "The arguments of nanogpt in `nanogpt …`, `python -m nanogpt …` and `torchrun … -m nanogpt …`; None for other commands."
    words = shlex.split(line)
    return words[words.index("nanogpt") + 1:] if "nanogpt" in words else None

LINES = sorted({line for _, line in readme_lines(ROOT) if verbs(line) is not None} | {x for x in known() if verbs(x) is not None})

@pytest.mark.parametrize("line", LINES)
def test_command_is_understood(line):
    if importlib.util.find_spec("nanogpt.cli") is None: pytest.skip("nanogpt.cli does not exist yet")
    from nanogpt.cli import parse_only
    parse_only(verbs(line))

def test_what_a_newcomer_needs_comes_first():
    "What it is and how to start, the demo, talking to it, learning from it, the verbs; how fast it is comes behind, with its tables."
    heads = [x[3:] for x in (ROOT/"README.md").read_text(encoding="utf-8").splitlines() if x.startswith("## ")]
    wanted = ["What `make demo` gives", "The chat page", "The course", "Verbs",
              "The same commands on real text", "On a GPU, or on eight", "How fast"]
    assert [x for x in heads if x in wanted]==wanted

def test_control():
    if importlib.util.find_spec("nanogpt.cli") is None: pytest.skip("nanogpt.cli does not exist yet")
    from nanogpt.cli import parse_only
    with pytest.raises((ValueError, SystemExit)): parse_only(["speedrun", "--no_such_flag", "1"])

def test_verbs():
    assert verbs("torchrun --nproc_per_node 2 -m nanogpt pretrain --out 'a b'") == ["pretrain", "--out", "a b"]
    assert verbs("make demo") is None
