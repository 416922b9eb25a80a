"""The plug is pulled at every write, fsync and rename of a save, and checkpoints are damaged: a whole one is found.

The system calls are counted and the kill is put in from outside, by strace; where it cannot run, those tests say so and are skipped.
"""
import collections
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from mini import copy, environment, here, program

# Imports once, then forks a saver for each line it reads: strace takes hold of it while it is stopped. `careless` writes in place.
SERVER = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from nanogpt.checkpoint import save_folder
from nanogpt.core import write_json

def fill(folder):
    save_file({"w": torch.full((3000,), 2.)}, folder/"model.safetensors")
    write_json(folder/"state.json", dict(step=2))

def careful(path): save_folder(path, fill)
def careless(path): path.mkdir(); fill(path)

for line in sys.stdin:
    how, path = line.split()
    if not (pid := os.fork()):
        os.kill(os.getpid(), signal.SIGSTOP)
        globals()[how](Path(path))
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""
CALLS = "write,fsync,rename"

@pytest.fixture(scope="module")
def saver():
    "Saves a checkpoint under strace; returns the calls that were seen."
    tool = program("strace", "strace")
    p = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    def save(how, path, trace, inject=()):
        p.stdin.write(f"{how} {path}\n"); p.stdin.flush()
        pid = int(p.stdout.readline())
        words = [tool, "-p", str(pid), "-y", "-o", str(trace), "-e", f"trace={CALLS}", *inject]
        strace = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        first = strace.stderr.readline()
        if "attached" not in first:
            os.kill(pid, signal.SIGKILL); strace.wait()
            pytest.skip(f"strace may not look into another process here: {first.strip()}")
        os.kill(pid, signal.SIGCONT)
        assert p.stdout.readline().strip()=="ended"
        strace.communicate(timeout=60)
        return [line for line in trace.read_text().splitlines() if re.match(r"\w+\(", line)]
    yield save
    p.stdin.close(); p.wait(timeout=60); p.stdout.close()

@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "A run with one checkpoint, saved in peace."
    from nanogpt.checkpoint import save_folder
    home = tmp_path_factory.mktemp("one")/"run"
    save_folder(home/"ckpt/step-00000001", lambda t: (t/"state.json").write_text('{"step": 1}\n'))
    return home

def kills(saver, one, how, tmp_path):
    "Save a second checkpoint, killed at each call in turn; yields the call, its number and the run that was left."
    seen = saver(how, copy(one, tmp_path/"whole")/"ckpt/step-00000002", tmp_path/"trace")
    counted = collections.Counter(line.partition("(")[0] for line in seen)
    for call, n in sorted(counted.items()):
        for k in range(1, n+1):
            run = copy(one, tmp_path/f"{call}{k}")
            saver(how, run/"ckpt/step-00000002", tmp_path/"trace", ("-e", f"inject={call}:signal=KILL:when={k}"))
            yield call, k, run

def test_a_kill_at_every_call_of_a_save(saver, one, tmp_path, capsys):
    "Whatever call is the last one: the newest checkpoint is the old one or the new one, and every byte of it is right."
    from nanogpt.checkpoint import checkpoints, latest, verify
    ends = collections.Counter()
    for call, k, run in kills(saver, one, "careful", tmp_path):
        for path in checkpoints(run): verify(path) # no folder with a checkpoint's name is ever a half
        found = latest(run)
        assert found is not None, (call, k)
        ends[found.name] += 1
    assert set(ends)=={"step-00000001", "step-00000002"} and sum(ends.values())>=12, ends
    assert "set aside" not in capsys.readouterr().err

def test_control_saved_in_place(saver, one, tmp_path):
    "The test above can fail: written straight into its place, a checkpoint is left as a half."
    from nanogpt.checkpoint import checkpoints
    halves = sum(len(list(path.iterdir()))<2 for _, _, run in kills(saver, one, "careless", tmp_path) for path in checkpoints(run)[1:])
    assert halves

def test_every_file_is_on_the_disk_before_the_name_moves(saver, one, tmp_path):
    "A power cut forgets what was not synced: first each file, then the manifest, then the rename, then the folder with the name."
    run = copy(one, tmp_path/"run")
    lines = saver("careful", run/"ckpt/step-00000002", tmp_path/"trace")
    calls = [(line.partition("(")[0], line) for line in lines]
    moved = max(i for i, (call, line) in enumerate(calls) if call=="rename" and line.count("step-00000002")>=2)
    synced = [(i, re.search(r"<(.*?)>", line)[1]) for i, (call, line) in enumerate(calls) if call=="fsync"]
    before = [Path(o).name for i, o in synced if i<moved]
    for name in ("model.safetensors", "state.json"): assert name in before
    assert "MANIFEST.json" in before[-2] # the file, and then the folder it was renamed in
    assert (run/"ckpt").resolve() in [Path(o) for i, o in synced if i>moved]

# ---- damage ----------------------------------------------------------------------------------------------------------

def files(folder): return sorted(p for p in folder.iterdir() if p.name!="MANIFEST.json" and p.stat().st_size)

def flip(folder, dice):
    path = dice.choice(files(folder))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1<<dice.randrange(8)
    path.write_bytes(data)

def cut(folder, dice):
    path = dice.choice(files(folder))
    os.truncate(path, dice.randrange(path.stat().st_size))

def grow(folder, dice):
    with open(dice.choice(files(folder)), "ab") as f: f.write(bytes(dice.randrange(1, 5000)))

def lose(folder, dice): dice.choice([*files(folder), folder/"MANIFEST.json"]).unlink()

def blank(folder, dice):
    path = dice.choice([p for p in files(folder) if p.stat().st_size>=64])
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data)-32)
    data[at:at+32] = bytes(32) if any(data[at:at+32]) else b"\1"*32 # a sector that was never written
    path.write_bytes(data)

def mix(folder, dice):
    other = folder.with_name("step-00000005") # a file of another moment, whole in itself
    name = dice.choice(["model.safetensors", "optimizer.safetensors", "state.json"])
    shutil.copy(other/name, folder/name)

@pytest.mark.parametrize("harm", [flip, cut, grow, lose, blank, mix], ids=lambda f: f.__name__)
def test_damage_is_found_every_time(harm, whole, tmp_path, capsys):
    "Twenty times each: the damaged checkpoint is named and set aside, and the one before is used."
    from nanogpt.checkpoint import latest
    for i in range(20):
        run = tmp_path/str(i)
        for step in (20, 25, 30): copy(whole/f"ckpt/step-{step:08d}", run/f"ckpt/step-{step:08d}")
        copy(whole/"ckpt/step-00000020", run/"ckpt/step-00000005")
        newest = run/"ckpt/step-00000030"
        harm(newest, Random(i))
        assert here("ckpt", "verify", run)[0]==3, i
        assert latest(run).name=="step-00000025" and newest.with_name(newest.name+".damaged").is_dir()
        assert f"set aside {newest.name}" in capsys.readouterr().err
        shutil.rmtree(run)

def test_control_undamaged(whole, tmp_path):
    "A copy that nobody touched is accepted."
    from nanogpt.checkpoint import latest
    assert latest(copy(whole, tmp_path/"run")).name=="step-00000030" and here("ckpt", "verify", tmp_path/"run")[0]==0
