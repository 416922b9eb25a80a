"Models on a shelf: a bad one is named and disturbs nobody, few are in memory, and a demo dies with whoever makes it."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mini import tree

from nanogpt import shelf as shelves
from nanogpt.checkpoint import save_folder, save_model
from nanogpt.core import CheckpointError, ConfigError, DataError, DiskError, write_json
from nanogpt.hub import save_hub
from nanogpt.model import GPT, GPTConfig
from nanogpt.shelf import Entry, Shelf, describe, find_models, make_demo, newest_first, touch
from nanogpt.template import Template
from nanogpt.tokenizer import Tokenizer

TOK = Tokenizer.train(["the cat sat on the mat. the cat ran."]*3, 271)

def make(seed=0, **shape):
    torch.manual_seed(seed)
    shape = dict(block_size=64, n_layer=1, n_head=2, n_embd=16) | shape
    return GPT(GPTConfig(vocab_size=TOK.n_vocab, **shape)).eval()

def write_run(path, kind="TrainConfig", seed=0, init=None, when=None, **shape):
    "A finished run, as the program leaves it."
    save_model(path/"model", make(seed, **shape), TOK)
    write_json(path/"config.json", dict(kind=kind, settings=dict(out=str(path), **(dict(init=str(init)) if init else {}))))
    write_json(path/"exit.json", dict(reason="done", step=9, error=None))
    (path/"log.jsonl").write_text(json.dumps(dict(kind="step", step=9))+"\n")
    if when: os.utime(path/"model/MANIFEST.json", (when, when))
    return path

def write_steps(path, *steps, kind="TrainConfig"):
    "A run that was stopped: checkpoints and no final weights."
    for n in steps: save_model(path/f"ckpt/step-{n:08d}", make(n), TOK)
    write_json(path/"config.json", dict(kind=kind, settings=dict(out=str(path))))
    return path

@pytest.fixture
def home(tmp_path):
    write_run(tmp_path/"a/base", when=1000)
    write_run(tmp_path/"a/tuned", "SFTConfig", 1, tmp_path/"a/base", when=2000)
    return tmp_path

# ---- what is there -----------------------------------------------------------------------------------------------------

def test_newest_tuned_first(home):
    write_run(home/"zz", when=9000)
    write_run(home/"b/tuned", "SFTConfig", when=5000)
    write_run(home/"c", "SFTConfig", when=3000)
    (home/"bad/ckpt").mkdir(parents=True)
    found = find_models([home])
    assert [e.name for e in found]==["b/tuned", "c", "a/tuned", "zz", "a/base", "bad"]
    assert [e.kind for e in found]==["run"]*5+["bad"] and [e.tuned for e in found]==[True]*3+[False]*3
    assert found!=sorted(found, key=lambda e: e.name)!=sorted(found, key=lambda e: e.when)

def test_what_is_not_finished_comes_behind(home):
    "Stopped, killed, out of disk, tuned or not: named as unfinished, and last of what can be used."
    for name, kind, end in (("stopped", "SFTConfig", "preempted"), ("killed", "SFTConfig", ""), ("full", "TrainConfig", "disk_full"),
                            ("torn", "TrainConfig", "done")): # it ended, and its last weights were taken away
        write_steps(home/name, 1000, kind=kind)
        if end: write_json(home/name/"exit.json", dict(reason=end, step=1000, error=None))
    (home/"bad/ckpt").mkdir(parents=True)
    found = find_models([home])
    assert [(e.name, e.finished) for e in found[:2]]==[("a/tuned", True), ("a/base", True)] and found[-1].name=="bad"
    notes = {e.name:e.note for e in found[2:-1] if not e.finished}
    assert notes==dict(stopped="not finished: step 1,000, it was stopped", killed="not finished: step 1,000, still training, or killed",
                       full="not finished: step 1,000, the disk was full", torn="not finished: step 1,000, its last weights are gone")
    assert {e.name for e in found[2:4]}=={"stopped", "killed"} # the tuned ones first, here too
    assert Shelf([home]).load(home/"stopped").entry.finished is False # and still it can be asked for

def test_half_a_demo(home):
    "Its base is whole before the demo is; only a folder in which a demo speaks can be half of one."
    assert describe(home/"a/base").finished
    (home/"a/speedrun.log").write_text("1/3 pretraining")
    e = describe(home/"a/base")
    assert not e.finished and e.note=="half a demo: not tuned yet" and describe(home/"a/tuned").finished
    assert describe(write_run(home/"a/other")).finished
    write_json(home/"a/card.json", {})
    assert describe(home/"a/base").finished

def test_forms(home):
    "A stopped run, an export of ours, one of the hub, rounded weights, one model by several ways."
    write_steps(home/"stopped", 5, 20, kind="SFTConfig")
    write_json(home/"stopped/exit.json", dict(reason="preempted", step=20, error=None))
    save_model(home/"export", make(), TOK)
    save_hub(home/"hub", make(position="rotary", norm="rms", mlp="swiglu", bias=False), TOK, "llama")
    from nanogpt.quant import quantize
    small = make(n_embd=64)
    quantize(small, "int8", 32)
    save_model(home/"a/tuned/int8", small, TOK, kind="SFTConfig")
    os.symlink(home/"a", home/"again")
    os.symlink(home, home/"a/loop")
    found = {e.path.resolve().relative_to(home).as_posix():e for e in find_models([home, home/"a", home/"a/tuned/model"])}
    assert found["stopped"].kind=="run" and found["stopped"].tuned and found["stopped"].note=="not finished: step 20, it was stopped"
    assert found["export"].kind=="folder" and not found["export"].tuned and found["export"].parameters>0
    assert found["hub"].kind=="hub" and found["hub"].note=="llama"
    assert found["a/tuned/int8"].note=="int8" and found["a/tuned/int8"].tuned
    assert sorted(found)==["a/base", "a/tuned", "a/tuned/int8", "a/tuned/model", "export", "hub", "stopped"]
    shelf = Shelf([home], keep=9)
    for e in found.values(): assert shelf.load(e.path).model.cfg.vocab_size>=TOK.n_vocab # all of them can be had

def damage(folder):
    "Every way in which a folder can be bad, and a word of what is said of it."
    def of(name, change, make=write_run):
        path = make(folder/name)
        change(path)
    def cut(f): f.write_bytes(f.read_bytes()[:-9])
    def say(f, text): f.write_text(text) if isinstance(text, str) else f.write_bytes(text)
    of("short", lambda p: cut(p/"model/model.safetensors"))
    of("gone", lambda p: (p/"model/model.safetensors").unlink())
    of("unsaved", lambda p: shutil.rmtree(p/"model"))
    of("manifest", lambda p: say(p/"model/MANIFEST.json", "{"))
    of("list", lambda p: say(p/"model/MANIFEST.json", "[1, 2]"))
    of("unnamed", lambda p: (p/"model/MANIFEST.json").unlink())
    of("record", lambda p: say(p/"config.json", "[not json"))
    of("bytes", lambda p: say(p/"model/config.json", b"\xff\xfe\x00"))
    def other(p, **settings): # written with care, and wrong
        write_json(p/"model/config.json", json.loads((p/"model/config.json").read_text())|settings)
        sizes = json.loads((p/"model/MANIFEST.json").read_text())
        write_json(p/"model/MANIFEST.json", {o:want|dict(size=(p/"model"/o).stat().st_size) for o, want in sizes.items()})
    of("shape", lambda p: other(p, n_head=3))
    of("types", lambda p: other(p, n_layer="two"))
    of("words", lambda p: (p/"model/tokenizer.json").unlink())
    def export(p): save_model(p, make(), TOK); return p
    of("kind", lambda p: say(p/"config.json", json.dumps(dict(model_type="bert"))), export)
    of("half", lambda p: [shutil.rmtree(o) for o in (p/"ckpt").iterdir()], lambda p: write_steps(p, 3))
    of("<img src=x onerror=alert(1)>", lambda p: shutil.rmtree(p/"model"))
    of("settings", lambda p: say(p/"config.json", '{"kind": "SFTConfig", "settings": [7]}'))
    return {"short":"bytes, not", "gone":"missing", "unsaved":"nothing is saved yet", "manifest":"not readable JSON",
            "list":"cannot be read", "unnamed":"MANIFEST.json", "record":"not readable JSON", "bytes":"bytes, not", "shape":"n_head",
            "types":"cannot be read", "words":"tokenizer.json is missing", "kind":"'bert'", "half":"nothing is saved yet",
            "<img src=x onerror=alert(1)>":"nothing is saved", "settings":"cannot be read"}

def test_a_bad_folder_is_listed_with_its_reason_and_stops_nobody(home):
    bad = damage(home/"bad")
    found = {e.name:e for e in find_models([home])}
    assert [e.kind for k, e in found.items() if not k.startswith("bad/")]==["run", "run"]
    for name, why in bad.items():
        e = found["bad/"+name]
        assert e.kind=="bad" and why in e.note and "\n" not in e.note, (name, e)
    for name in bad: # and whoever asks for one all the same gets an error that says what to do
        with pytest.raises((CheckpointError, ConfigError, DataError)) as e: Shelf([home]).load(home/"bad"/name)
        assert e.value.fix
    assert Shelf([home]).load(home/"a/tuned").entry.name=="a/tuned"

def test_looking_changes_nothing(home):
    "Loading sets damaged checkpoints aside; a list must not."
    write_steps(home/"stopped", 5, 20)
    damage(home/"bad")
    (home/"stopped/ckpt/step-00000020/model.safetensors").write_bytes(b"short")
    before = tree(home)
    find_models([home], hub=True)
    assert tree(home)==before
    assert Shelf([home]).load(home/"stopped").model is not None and tree(home)!=before # the one before it is whole

def test_a_folder_that_may_not_be_read(home, monkeypatch):
    "Not even for an error of the system, whoever runs the tests."
    (home/"locked").mkdir()
    real = Path.exists
    def exists(path, **more):
        if "locked" in path.parts: raise PermissionError(13, "Permission denied")
        return real(path, **more)
    monkeypatch.setattr(Path, "exists", exists)
    found = find_models([home])
    assert [(e.name, e.kind) for e in found][1:]==[("a/base", "run"), ("locked", "bad")] and "PermissionError" in found[-1].note

def test_what_is_no_model_is_not_listed(home):
    (home/"web").mkdir()
    write_json(home/"web/config.json", dict(theme="dark"))
    (home/"data").mkdir()
    for name in ("train.bin", "val.bin"): (home/"data"/name).write_bytes(b"1")
    (home/".hidden").mkdir()
    shutil.copytree(home/"a/base", home/".hidden/base")
    deep = home/"1/2/3/4/5"
    shutil.copytree(home/"a/base", deep)
    assert [e.name for e in find_models([home, home/"nowhere"])]==["a/tuned", "a/base"]
    assert [e.kind for e in find_models([deep])]==["run"]
    assert find_models([])==[]

def test_names_of_the_hub(home, monkeypatch, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("HF_HUB_CACHE", str(store))
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    save_hub(store/"models--some--body/snapshots/abc", make(position="rotary", norm="rms", mlp="swiglu", bias=False), TOK, "llama")
    (store/"models--an--other/snapshots/abc").mkdir(parents=True)
    write_json(store/"models--an--other/snapshots/abc/config.json", dict(model_type="bert"))
    assert [e.name for e in find_models([home], hub=True)]==["a/tuned", "some/body", "a/base"]
    write_run(home/"own", "SFTConfig", init="some/body")
    write_run(home/"lost", "SFTConfig", init="some/where")
    shelf = Shelf([home])
    assert shelf.base(shelf.load(home/"own")).entry.name=="some/body" and describe(home/"lost").base is None
    asked = find_models(["gpt2"])
    assert [(e.name, e.kind) for e in asked]==[("gpt2", "hub")] and "hub" in asked[0].note
    monkeypatch.setenv("NANOGPT_DATA", str(store/"data")) # a name that the hub does not know
    save_hub(store/"data/models/mine", make(position="rotary", norm="rms", mlp="swiglu", bias=False), TOK, "llama")
    assert describe("mine").kind=="hub" and describe("mine").note=="llama" and shelf.load("mine").model is not None
    assert describe("theirs").kind=="bad"

def test_the_base_is_found_after_a_move(home, tmp_path_factory):
    to = tmp_path_factory.mktemp("else")/"there"
    assert describe(home/"a/tuned").base==home/"a/base"
    shutil.copytree(home/"a", to)
    assert describe(to/"tuned").base==to/"base" # the copy beside it, not the one it was tuned from
    shutil.rmtree(to/"base")
    assert describe(to/"tuned").base==home/"a/base"
    shutil.rmtree(home/"a/base")
    assert describe(to/"tuned").base is None and Shelf([to]).base(Shelf([to]).load(to/"tuned")) is None

def test_a_real_tuning(tuned, whole):
    "Runs that the program itself has made."
    first, *rest = find_models([whole.parent])
    assert first.path==tuned and first.tuned and first.base==whole and whole in [e.path for e in rest] and "done" not in first.note
    shelf = Shelf([whole.parent])
    one = shelf.load(tuned)
    base = shelf.base(one)
    talk = [dict(role="user", content="Who is there?")]
    assert base.entry.path==whole and base.template.prompt(talk)==one.template.prompt(talk)

# ---- a few in memory ---------------------------------------------------------------------------------------------------

def mapped(folder): # the files of weights below it that this process maps
    maps = (o.split()[-1] for o in Path("/proc/self/maps").read_text().splitlines() if o.endswith("model.safetensors"))
    return {o for o in maps if Path(o).is_relative_to(folder)}
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what a process maps")

def switch(shelf, paths, keep, also=lambda one: None):
    "Ten times another model, asked each time; never more than `keep` of them are mapped."
    for k in range(10):
        one = shelf.load(paths[k%len(paths)])
        also(one)
        one.model(torch.tensor([[1, 2, 3]]))
        del one
        assert len(mapped(paths[0].parent))<=keep, "too many"

@linux
@pytest.mark.parametrize("keep", (1, 2))
def test_switching_keeps_few(tmp_path, keep):
    paths = [write_run(tmp_path/str(k), seed=k) for k in range(3)]
    switch(Shelf([tmp_path], keep), paths, keep)
    kept = []
    with pytest.raises(AssertionError, match="too many"): switch(Shelf([tmp_path], keep), paths, keep, kept.append) # the control: a leak

SWITCH = """
import sys, torch
from pathlib import Path
from nanogpt.shelf import Shelf
def private(): return sum(int(o.split()[1])*1024 for o in open("/proc/self/smaps_rollup") if o.startswith("Private_Dirty"))
paths, dtype, leak = sorted(Path(sys.argv[1]).iterdir()), sys.argv[2], []
shelf = Shelf([sys.argv[1]], keep=2, dtype=dtype)
def switch(times, keep=lambda one: None):
    before = private()
    for k in range(times):
        one = shelf.load(paths[k%3])
        keep(one)
        with torch.inference_mode(): one.model(torch.tensor([[1, 2, 3]]))
        del one
    return private()-before
switch(9)
print(switch(21), switch(21, leak.append))
"""

@linux
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_memory_does_not_grow(tmp_path, env, dtype):
    "After thirty switches a process has no more memory of its own than after nine; a leak of models in 16 bits shows."
    paths = [write_run(tmp_path/str(k), seed=k, n_embd=256, n_layer=4) for k in range(3)]
    size = (paths[0]/"model/model.safetensors").stat().st_size
    words = [sys.executable, "-c", SWITCH, str(tmp_path), dtype]
    r = subprocess.run(words, env=env|dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=200, check=True)
    kept, leaked = map(int, r.stdout.split())
    assert kept<size/4
    if dtype=="bfloat16": assert leaked>19*size/4 # the control: twenty-one in half the bytes, and a good part of that

def test_the_last_asked_for_stays(home):
    write_run(home/"c", seed=3)
    shelf = Shelf([home])
    base, tuned = shelf.load(home/"a/base"), shelf.load(str(home/"a/tuned"))
    assert shelf.load(home/"a/base") is base
    shelf.load(home/"c") # the tuned one has to go: it was asked for longest ago
    assert shelf.load(home/"a/../a/base") is base and shelf.load(home/"a/tuned") is not tuned
    with pytest.raises(ConfigError, match="keep=2"): Shelf([home], keep=0)

def test_touch():
    assert touch([], "a", 2)==(["a"], []) and touch(["a", "b", "c"], "d", 1)==(["d"], ["a", "b", "c"])

def test_trained_on_is_loaded_anew(home):
    shelf = Shelf([home])
    old = shelf.load(home/"a/tuned")
    write_run(home/"a/tuned", "SFTConfig", 5, home/"a/base")
    new = shelf.load(home/"a/tuned")
    assert new is not old and not torch.equal(new.model.lm_head.weight, old.model.lm_head.weight) and shelf.load(home/"a/tuned") is new

def test_many_threads_load_once(home, monkeypatch):
    loads, got = [], []
    real = shelves.load_ready
    monkeypatch.setattr(shelves, "load_ready", lambda path, *rest: loads.append(path) or real(path, *rest))
    shelf = Shelf([home])
    threads = [threading.Thread(target=lambda: got.append(shelf.load(home/"a/tuned"))) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(loads)==1 and len(got)==8 and all(o is got[0] for o in got)

def test_a_model_that_cannot_be_loaded_takes_nobody_with_it(home):
    shelf = Shelf([home], keep=2)
    one = shelf.load(home/"a/tuned")
    two = shelf.load(home/"a/base")
    with pytest.raises(CheckpointError, match="no such folder"): shelf.load(home/"nowhere")
    assert shelf.load(home/"a/tuned") is one and shelf.load(home/"a/base") is two

def test_the_form_of_the_run_is_used(home):
    Template(TOK, "alpaca").save(home/"a/tuned")
    shelf = Shelf([home])
    one = shelf.load(home/"a/tuned")
    assert one.template.form=="alpaca" and shelf.base(one).template.form=="alpaca" and shelf.load(home/"a/base").template.form=="chat"

def test_order_is_total():
    some = [Entry(str(k), Path(str(k)), kind, tuned, when=when) for k, (kind, tuned, when) in
            enumerate([("run", False, 3), ("bad", True, 9), ("run", True, 1), ("folder", True, 2), ("hub", False, 3)])]
    assert [e.name for e in newest_first(some)]==["3", "2", "0", "4", "1"]

# ---- a demo that is being made -----------------------------------------------------------------------------------------

def ends(pid):
    "Wait until a process is gone, or is only a name that nobody has asked about."
    for _ in range(3000):
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError: return True
        if state=="Z": return True
        time.sleep(.02)
    return False

def until(ready, what):
    for _ in range(3000):
        if ready(): return
        time.sleep(.02)
    raise AssertionError(what)

def begun(demo): return any("1/3 pretraining" in o for o in demo.lines())

def test_a_demo_is_made_aside_and_stopped(tmp_path):
    demo = make_demo(tmp_path/"demo", "--threads", "1")
    try:
        with pytest.raises(ConfigError, match="already"): make_demo(tmp_path/"demo")
        until(lambda: begun(demo) or not demo.running, "it says nothing")
        assert begun(demo) and demo.running, demo.lines()
    finally: code = demo.close()
    assert code!=0 and not demo.running and ends(demo.child.pid)
    again = make_demo(tmp_path/"demo", "--no-such-flag", "1") # the folder is free again, and the words are the new one's
    assert again.child.wait(120)==2 and "no-such-flag" in "\n".join(again.lines())
    again.close()

def test_a_demo_needs_a_folder(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(DiskError): make_demo(tmp_path/"file/demo")

PARENT = """
import sys, time
from nanogpt.shelf import make_demo
demo = make_demo(sys.argv[1], "--threads", "1")
while not any("1/3" in o for o in demo.lines()): time.sleep(.02)
print(demo.child.pid, flush=True)
time.sleep(600)
"""

@linux
@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM))
def test_a_demo_dies_with_whoever_makes_it(tmp_path, env, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path/"demo")], env=env, stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(how)
        assert ends(pid)
    finally:
        parent.kill()
        parent.communicate()

@pytest.mark.long
def test_a_demo_that_trains_saves_when_it_is_stopped(tmp_path, monkeypatch):
    "In the middle of a training it ends as after Ctrl-C, and the next one goes on there."
    monkeypatch.setenv("CXX", "none") # no compiler: the first step comes sooner
    demo = make_demo(tmp_path/"demo", "--threads", "1")
    log = tmp_path/"demo/base/log.jsonl"
    until(lambda: log.exists() and "loss" in log.read_text() or not demo.running, "no step")
    demo.close()
    assert json.loads((tmp_path/"demo/base/exit.json").read_text())["reason"]=="preempted", demo.lines()
    assert "nothing is saved" not in describe(tmp_path/"demo/base").note
    again = make_demo(tmp_path/"demo", "--threads", "1")
    until(lambda: any("going on after step" in o for o in again.lines()) or not again.running, "it does not go on")
    again.close()

def test_a_whole_folder_is_needed(tmp_path):
    "The manifest is written last: a folder without one is a save that was cut off."
    save_folder(tmp_path/"x", lambda tmp: (tmp/"config.json").write_text("{}"))
    assert describe(tmp_path/"x").kind=="bad"
