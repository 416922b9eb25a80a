"The page 'on a GPU': its commands are understood, agree with the README, and do what they say with a small model in two processes."
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from gates import markdown, readme_lines
from mini import QUICK, SHAPE, environment, log, reason, run, steps_done, wait
from test_dist import free_port, needs_proc, numbers, rank_of, workers

from nanogpt.cli import parse_only
from nanogpt.core import read_json
from nanogpt.corpus import documents

PAGE = "\n".join(markdown(ROOT/"nbs/12a_plan.ipynb"))
LINES = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
DATA, ONE, EIGHT, TORCHRUN, MACHINES = LINES # in the order of the page

def test_they_are_understood():
    "Every command means something, its step can be shared by its GPUs, and the tokens are those that the page tells."
    assert LINES==[line for line in LINES if parse_only(shlex.split(line)[shlex.split(line).index("nanogpt")+1:])]
    one = parse_only(shlex.split(ONE)[1:])[1]
    assert f"{one.steps:,} steps of {one.batch_tokens:,}, which are {one.steps*one.batch_tokens:,}" in PAGE
    for line, world in ((EIGHT, 8), (MACHINES, 16)):
        cfg = parse_only(shlex.split(line)[1:])[1]
        assert cfg.nproc*cfg.nodes==world and parse_only(list(cfg.command))[1]==one and one.accum(world)==16//world
    words = shlex.split(TORCHRUN)
    assert words[0]=="torchrun" and parse_only(words[words.index("nanogpt")+1:])[1]==one

def test_the_readme_says_the_same():
    "The README's commands for this run are those of the page, to the letter."
    told = [line for _, line in readme_lines(ROOT) if "runs/fineweb" in line]
    assert told and set(told)<={DATA, ONE, EIGHT, TORCHRUN, MACHINES}

def small(line, text, nproc=2, at="", steps=20):
    "The words of a command with a small model and a small text in the places of the large ones; every other word as it stands."
    words = shlex.split(line)
    for i, w in enumerate(words):
        if w=="fineweb-edu": words[i] = str(text)
        if words[i-1]=="--tokens": words[i] = "20K"
        if words[i-1] in ("--nproc", "--nproc_per_node"): words[i] = str(nproc)
        if words[i-1]=="--endpoint": words[i] = at
    if "pretrain" in words: words += [*SHAPE, *QUICK, "--steps", str(steps)]
    return [sys.executable, "-m", {"nanogpt": "nanogpt", "torchrun": "torch.distributed.run"}[words[0]], *words[1:]]

def begin(words, home):
    return subprocess.Popen(words, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")

def finish(*processes):
    "All of them must end well; what they said to stderr."
    try: said = [p.communicate(timeout=200) for p in processes]
    finally:
        for p in processes: p.kill()
    assert [p.returncode for p in processes]==[0]*len(processes), said
    return [err for _, err in said]

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a little text, in which the page's first command has been run."
    home = tmp_path_factory.mktemp("page")
    tales = documents("tales", "train", 0)
    (home/"text.jsonl").write_text("".join(json.dumps({"text": next(tales)})+"\n" for _ in range(300)), encoding="utf-8")
    finish(begin(small(DATA, home/"text.jsonl"), home))
    return home

def test_two_processes(home):
    "The command for eight GPUs, with two processes: everything lies where the page says."
    finish(begin(small(EIGHT, None), home))
    out = home/"runs/gpt2"
    assert reason(out)=="done" and len(log(out, "step"))==20 and read_json(out/"config.json")["world"]==2
    assert (out/"ckpt/step-00000020/MANIFEST.json").exists() and (out/"model/model.safetensors").exists() and not (out/"data").exists()
    assert run("ckpt", "list", out).stdout.count("valid")==3

def apart(home, tmp_path):
    "Another folder with the same data in it."
    (tmp_path/"runs").mkdir()
    (tmp_path/"runs/fineweb").symlink_to(home/"runs/fineweb")
    return tmp_path

@needs_proc
@pytest.mark.long
@pytest.mark.timeout(900)
def test_killed_stopped_and_typed_again(home, tmp_path):
    "`launch`, one process killed, then SIGTERM, then the same line again: every number equals torchrun's, which nobody disturbed."
    quiet, rough = (apart(home, (tmp_path/o)) for o in ("quiet", "rough") if not (tmp_path/o).mkdir())
    finish(begin(small(TORCHRUN, None, steps=150), quiet))
    words, out = small(EIGHT, None, steps=150), rough/"runs/gpt2"
    p = begin(words, rough)
    assert wait(p, lambda: steps_done(out)>=20)
    os.kill(next(o for o in workers(p) if rank_of(o)==b"1"), signal.SIGKILL)
    assert wait(p, lambda: any("going on after step" in o["text"] for o in log(out, "note")))
    n = steps_done(out)
    assert wait(p, lambda: steps_done(out)>n+10)
    p.send_signal(signal.SIGTERM)
    assert "restart 1 of 3" in finish(p)[0] and reason(out)=="preempted" and steps_done(out)<150
    finish(begin(words, rough))
    assert reason(out)=="done" and numbers(out)==numbers(quiet/"runs/gpt2") and len(numbers(out))==150

@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_gpu_then_two_machines(home, tmp_path):
    "The command for one GPU, and then the one for two machines on what it left: they read the rows that one would have read on."
    there, at = apart(home, tmp_path), f"localhost:{free_port()}"
    finish(begin(small(ONE, None, steps=10), there))
    finish(*[begin(small(MACHINES, None, nproc=1, at=at, steps=20), there) for _ in range(2)])
    out = there/"runs/gpt2"
    assert reason(out)=="done" and "world" in next(o["text"] for o in log(out, "note") if "changed since" in o["text"])
    assert [o["step"] for o in log(out, "step")]==list(range(1, 21)) and read_json(out/"config.json")["world"]==2
    (tmp_path/"alone").mkdir()
    finish(begin(small(ONE, None, steps=20), apart(home, tmp_path/"alone")))
    assert [o["ids_sha"] for o in log(out, "step")]==[o["ids_sha"] for o in log(tmp_path/"alone/runs/gpt2", "step")]

def test_control_a_missing_word_is_seen():
    "A line with a misspelled setting would be refused."
    from nanogpt.core import ConfigError
    with pytest.raises(ConfigError, match="did you mean --steps"): parse_only(shlex.split(ONE+" --step 3")[1:])
