"Several real processes: together they are one, they stop together, they go on bit for bit, and a killed one comes back."
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mini import KEYS, PRETRAIN, SFT, copy, environment, log, one_message, reason, run, steps_done, wait

from nanogpt.core import read_json
from nanogpt.shard import write_shard
from nanogpt.tokenizer import get_tokenizer

ONE_STEP = ("--micro_batch", 2, "--batch_tokens", 256) # four passes of one process, two of each of two

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def words_of(words, before):
    if not before: return [sys.executable, "-m", "nanogpt", *map(str, words)]
    return [sys.executable, "-c", f"{before}\nimport sys\nfrom nanogpt.cli import main\nsys.exit(main(sys.argv[1:]))", *map(str, words)]

def start_group(world, *words, before=""):
    "The processes of one run, started by hand with the variables that torchrun would set: a list of Popen."
    env = environment(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    out = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    mine = [{**env, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]
    return [subprocess.Popen(words_of(words, before), env=o, **out) for o in mine]

def finish(processes, code=0):
    "What each of them printed to stdout and stderr; all must end with `code`."
    try: said = [p.communicate(timeout=150) for p in processes]
    finally:
        for p in processes: p.kill()
    assert [p.returncode for p in processes]==[code]*len(processes), said
    return said

def group(world, *words, code=0, before=""): return finish(start_group(world, *words, before=before), code)

def pretrain(shards, out, *more): return (*PRETRAIN, "--data", shards, "--out", out, *more)

def numbers(folder): return [tuple(o[k] for k in KEYS) for o in log(folder, "step")]

def near(a, b, loss=1e-5, norm=1e-4):
    "Two logs tell of the same run, up to the order in which float32 was added; they saw the same ids."
    assert len(a)==len(b)>0
    for x, y in zip(a, b, strict=True):
        assert x["ids_sha"]==y["ids_sha"] and x["tokens"]==y["tokens"] and x["lr"]==y["lr"], (x, y)
        assert abs(x["loss"]-y["loss"])<loss and abs(x["grad_norm"]-y["grad_norm"])<norm, (x, y)

@pytest.fixture(scope="module")
def one(shards, tmp_path_factory):
    "Twelve steps of one process, without dropout, whose numbers differ between processes."
    out = tmp_path_factory.mktemp("one")/"run"
    run(*pretrain(shards, out, *ONE_STEP, "--steps", 12, "--dropout", 0))
    return out

@pytest.fixture(scope="module")
def two(shards, tmp_path_factory):
    "Thirty steps of two processes with dropout that nobody stopped, checkpoints at every fifth."
    out = tmp_path_factory.mktemp("two")/"run"
    said = group(2, *pretrain(shards, out, *ONE_STEP, "--keep", 9))
    return out, said

# ---- two processes = one ---------------------------------------------------------------------------------------------

COUNT = """
import nanogpt.dist as d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
old, count = d.Group.wrap, []
def hook(group, bucket): count.append(1); return allreduce_hook(group, bucket)
def wrap(self, model, loss): ddp = old(self, model, loss); ddp.register_comm_hook(None, hook); return ddp
d.Group.wrap = wrap
import atexit; atexit.register(lambda: print("travels", len(count)))
"""

def test_two_are_one(one, shards, tmp_path):
    "Two processes log what one logs, with the same ids; gradients travel once in a step of two passes; the main process alone writes."
    out = tmp_path/"run"
    said = group(2, *pretrain(shards, out, *ONE_STEP, "--steps", 12, "--dropout", 0), before=COUNT)
    near(log(one, "step"), log(out, "step"))
    looks = [log(o, "eval") for o in (one, out)]
    assert [(o["step"], o["n"]) for o in looks[0]]==[(o["step"], o["n"]) for o in looks[1]]
    assert all(abs(x["val_loss"]-y["val_loss"])<1e-5 for x, y in zip(*looks, strict=True))
    assert "done after 12 steps" in said[0][0] and said[1][0]=="travels 12\n" and said[1][1]=="", said[1]
    assert said[0][0].endswith("travels 12\n") and read_json(out/"config.json")["world"]==2 and reason(out)=="done"

def test_each_pass_apart_is_seen(one, shards, tmp_path):
    "The count can fail: without the context around all but the last pass, gradients travel in every pass."
    apart = COUNT+"from contextlib import nullcontext\nd.Group.sync = lambda self, loss, last: nullcontext()"
    said = group(2, *pretrain(shards, tmp_path/"run", *ONE_STEP, "--steps", 3, "--dropout", 0), before=apart)
    assert said[1][0]=="travels 6\n"

OWN = """
import nanogpt.dist as d
everybody = d.Group.sum
def own(x): return x.dim()==0 and not x.is_floating_point() and 0<x.item()<2000 # a count of targets, not the hash of ids
"""

@pytest.fixture(scope="module")
def talks(one):
    "Four steps of instruction tuning in one process, and its words without --out."
    words = (*SFT, "--init", one, "--steps", 4)
    run(*words, "--out", one.parent/"talks")
    return one.parent/"talks", words

def test_targets_are_counted_over_all(talks, tmp_path):
    "Instruction tuning: the processes have different numbers of targets, and still two are one."
    alone, words = talks
    note = OWN+"def note(self, x):\n    if own(x): print('targets', x.item())\n    return everybody(self, x)\nd.Group.sum = note"
    said = group(2, *words, "--out", tmp_path/"two", before=note)
    counts = [[line for line in out.splitlines() if line.startswith("targets")] for out, _ in said]
    assert counts[0]!=counts[1], "both processes had as many targets: this test tests less than it says"
    near(log(alone, "step"), log(tmp_path/"two", "step"))

MEANS = OWN+"d.Group.sum = lambda self, x: x*self.world if own(x) else everybody(self, x)"

def test_control_a_mean_of_means(talks, tmp_path):
    "The comparison can fail: when each process divides by its own count, the numbers are others."
    alone, words = talks
    group(2, *words, "--out", tmp_path/"two", before=MEANS)
    a, b = (log(o, "step") for o in (alone, tmp_path/"two"))
    assert [o["ids_sha"] for o in a]==[o["ids_sha"] for o in b] and max(abs(x["loss"]-y["loss"]) for x, y in zip(a, b, strict=True))>1e-4

def test_fsdp_is_ddp(one, shards, tmp_path):
    "Cut into parts, the model trains the same; its checkpoint and its model are read by one process, which goes on with the next rows."
    out = tmp_path/"run"
    words = pretrain(shards, out, *ONE_STEP, "--dropout", 0, "--steps", 12)
    err = group(2, *words, "--parallel", "fsdp", "--save_every", 5)[0][1]
    near(log(one, "step"), log(out, "step"))
    assert "no samples are written" in err and log(out, "sample")==[] and len(log(out, "eval"))==len(log(one, "eval"))
    assert run("generate", "--model", out, "--prompt", "One day,", "--max_tokens", 3).stdout
    for name in ("step-00000010", "step-00000012"): run("ckpt", "verify", out/"ckpt"/name)
    shutil.rmtree(out/"ckpt/step-00000012")
    err = group(2, *words, "--parallel", "fsdp")[0][1]       # a part of the whole is found again …
    assert "going on after step 10 of 12" in err and "not bit-equal" not in err
    near(log(one, "step"), log(out, "step"))
    shutil.rmtree(out/"ckpt/step-00000012")
    assert "not bit-equal to a run never stopped: parallel, world" in run(*words).stderr # … by one process too
    near(log(one, "step"), log(out, "step"))

# ---- stopped and resumed ---------------------------------------------------------------------------------------------

def cut_back(two, to, step):
    "A copy of a finished run, as if it had been stopped after a step."
    out = copy(two[0], to)
    for p in (out/"ckpt").glob("step-*"):
        if int(p.name[5:])>step: shutil.rmtree(p)
    return out

def test_resumed_equals_never_stopped(two, shards, tmp_path):
    "Two processes go on from a checkpoint with the same losses, rates, gradients and ids, bit for bit."
    out = cut_back(two, tmp_path/"run", 10)
    err = group(2, *pretrain(shards, out, *ONE_STEP, "--keep", 9))[0][1]
    assert "going on after step 10 of 30" in err and "not bit-equal" not in err
    assert numbers(out)==numbers(two[0]) and len(read_json(out/"ckpt/step-00000015/state.json")["rng"])==2
    assert (out/"model/model.safetensors").read_bytes()==(two[0]/"model/model.safetensors").read_bytes()

def test_control_the_dice_of_one_process_are_forgotten(two, shards, tmp_path):
    "The comparison can fail: if only process 1 forgets its random numbers, the rest differs."
    out = cut_back(two, tmp_path/"run", 10)
    forget = "import os, nanogpt.checkpoint as ck\nif os.environ['RANK']=='1': ck.set_rng_state = lambda state: None"
    group(2, *pretrain(shards, out, *ONE_STEP, "--keep", 9), before=forget)
    got, want = numbers(out), numbers(two[0])
    assert got[:10]==want[:10] and all(g[1]!=w[1] for g, w in zip(got[10:], want[10:], strict=True))
    assert [g[5] for g in got]==[w[5] for w in want], "the ids do not depend on the dice"

def test_another_world_reads_the_same_data(two, shards, tmp_path):
    "One process goes on where two stopped: it says so, and reads the rows that the two would have read."
    out = cut_back(two, tmp_path/"run", 25)
    err = run(*pretrain(shards, out, *ONE_STEP, "--keep", 9)).stderr
    assert "going on after step 25 of 30" in err and "not bit-equal to a run never stopped: world" in err
    assert [o["ids_sha"] for o in log(out, "step")]==[o["ids_sha"] for o in log(two[0], "step")]

def test_a_world_that_does_not_fit_is_refused(two, shards, tmp_path):
    "Three processes cannot share four passes: each says so, with a number that would do; nothing is changed."
    out = cut_back(two, tmp_path/"run", 10)
    for _, err in group(3, *pretrain(shards, out, *ONE_STEP), code=2): assert "--batch_tokens=256 is not a multiple" in err and "192" in err
    assert numbers(out)==numbers(two[0])

CUTS = """
import os, shutil, sys
from pathlib import Path
import torch
from nanogpt import run as runs
from nanogpt.core import seed
from nanogpt.data import Loader
from nanogpt.dist import processes
from nanogpt.model import GPT, GPTConfig
from nanogpt.shard import Shard
from nanogpt.tokenizer import get_tokenizer
from nanogpt.trainer import FitConfig

home, parallel, width, world = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(os.environ["WORLD_SIZE"])
tok, jobs = get_tokenizer(home), [o.split(":") for o in sys.argv[4:]] # name:cut:what is forgotten
os.fsync = lambda handle: None # no power is cut here
slips = dict(dice=lambda t: torch.manual_seed(5), place=lambda t: t.loader.load_state_dict(t.loader.state_dict() | dict(position=0)))
old, rehearse = runs.resume_run, runs._rehearse

def train(out, dist, start):
    cfg = FitConfig(out=out, parallel=parallel, steps=14, warmup_steps=5, seq_len=16, micro_batch=2, batch_tokens=64*world, lr=1e-2,
                    eval_every=4, eval_batches=5, save_every=1, keep=99, threads=1, compile=False, kernel="fused", dtype="float32",
                    device="cpu")
    seed(start)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=16, n_layer=3, n_head=2, n_embd=width, dropout=.2))
    rows = {k: Loader(Shard(home/f"{k}.bin", tok), 16, 2, 0, dist.rank, world) for k in ("train", "val")}
    runs.fit(model, rows["train"], cfg, tok, rows["val"], dist=dist)

with processes(FitConfig(parallel=parallel, device="cpu")) as dist:
    train(home/"never", dist, 0)
    for name, cut, slip in jobs:
        out, point = home/name, f"ckpt/step-{int(cut):08d}"
        if dist.main:
            shutil.copytree(home/"never"/point, out/point)
            for o in ("log.jsonl", "config.json"): shutil.copy(home/"never"/o, out)
        dist.barrier()
        def resume(t, path, slip=slip): old(t, path); slips.get(slip, lambda t: None)(t)
        runs.resume_run, runs._rehearse = resume, (lambda t: None) if slip=="rehearsal" else rehearse
        train(out, dist, 99)
sys.exit(0)
"""

EDGE = 12 # steps in an epoch

@pytest.mark.parametrize("world,parallel,width,cuts,slips", [
    (2, "ddp", 16, (3, 8, EDGE), ("dice", "place")),
    (3, "ddp", 128, (3, EDGE), ("rehearsal",)), # more than a megabyte: DDP sends its gradients in several parts
    pytest.param(3, "fsdp", 16, (3, 8, EDGE), ("dice",), marks=pytest.mark.long)])
def test_cut_anywhere(world, parallel, width, cuts, slips, shards, tmp_path):
    "Stopped in the warm-up, mid-epoch and at an epoch's edge, with dropout and two passes a step: equal to the last bit; a slip is seen."
    tok = get_tokenizer(shards)
    for name, rows in (("train", EDGE*4*world), ("val", 7)):
        write_shard(tmp_path/f"{name}.bin", [[k*k%23 for k in range(rows*16+1)]], tok.fingerprint, tok.n_vocab)
    tok.save(tmp_path/"tokenizer.json")
    jobs = [f"cut{n}:{n}:" for n in cuts]+[f"{o}:3:{o}" for o in slips]
    said = group(world, tmp_path, parallel, width, *jobs, before=CUTS)
    never = tmp_path/"never"
    place = read_json(never/f"ckpt/step-{EDGE:08d}/state.json")["loader"]
    assert place["position"]==place["windows"] and log(never, "step")[2]["lr"]<log(never, "step")[4]["lr"]==1e-2
    def story(out, cut):
        states = [read_json(p/"state.json") | dict(seconds=0) for p in sorted((out/"ckpt").glob("step-*")) if int(p.name[5:])>cut]
        looks = [(o["step"], o["val_loss"], o["n"]) for o in log(out, "eval")]
        return numbers(out), looks, states, (out/"model/model.safetensors").read_bytes()
    for n in cuts: assert story(tmp_path/f"cut{n}", n)==story(never, n), n
    assert len(story(never, 0)[1])==4 and said[0][1].count("going on after step")==len(jobs) and "not bit-equal" not in said[0][1]
    for o in slips:
        got, want = numbers(tmp_path/o), numbers(never)
        assert got[:3]==want[:3] and got[3:]!=want[3:], f"{o} was forgotten, and nothing shows it"

POISON = """
import os, nanogpt.trainer as t
old = t.Trainer._loss
def loss(self, *batch):
    total, n = old(self, *batch)
    return total*(float("nan") if os.environ["RANK"]=="1" and self.done==5 and self.model.training else 1), n
t.Trainer._loss, step = loss, t.Trainer.step
def tell(self):
    row = step(self)
    if self.done>4: print("weights", self.done, self.model.lm_head.weight.double().sum().item().hex())
    return row
t.Trainer.step = tell
"""

def test_nan_in_one_is_skipped_in_both(shards, tmp_path):
    "A gradient of process 1 that is no number: no process takes the step, it is counted, and their weights stay the same."
    out = tmp_path/"run"
    said = group(2, *pretrain(shards, out, *ONE_STEP, "--steps", 10), before=POISON)
    weights, other = [[line.split()[2] for line in o.splitlines() if line.startswith("weights")] for o, _ in said]
    assert weights==other and len(weights)==6 and weights[0]==weights[1]!=weights[2], "step 6 changes nothing, anywhere"
    rows = log(out, "step")
    assert [o["skipped"] for o in rows]==[0]*5+[1]+[0]*4 and reason(out)=="done"
    assert [o["step"] for o in rows if o["loss"]!=o["loss"]]==[6]

# ---- launch ----------------------------------------------------------------------------------------------------------

def start_launch(*words, **more):
    return subprocess.Popen(words_of(("launch", *words), ""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                            env=environment(), **more)

def workers(p): return [int(o) for o in subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()]

def rank_of(pid): return next(o for o in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if o.startswith(b"RANK="))[5:]

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")

@needs_proc
def test_launch_restarts_then_stops(shards, tmp_path):
    "kill -9 of one process: all start again from the checkpoint. SIGTERM to launch: one more step, saved, exit 0, within 10 seconds."
    out = tmp_path/"run"
    p = start_launch("--nproc", 2, "--", *pretrain(shards, out, *ONE_STEP, "--steps", 100_000, "--eval_every", 0, "--save_every", 20))
    assert wait(p, lambda: steps_done(out)>=45)
    os.kill(next(o for o in workers(p) if rank_of(o)==b"1"), signal.SIGKILL)
    assert wait(p, lambda: any("going on after step" in o["text"] for o in log(out, "note")))
    n = steps_done(out)
    assert wait(p, lambda: steps_done(out)>n+10)
    asked = time.time()
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=30)
    assert time.time()-asked<10 and p.returncode==0 and reason(out)=="preempted", err
    assert "process 1 was ended by SIGKILL" in err and err.count("starting again in 1 s, restart 1 of 3")==1, err
    last, steps = steps_done(out), [o["step"] for o in log(out, "step")]
    assert steps==list(range(1, last+1)) and (out/f"ckpt/step-{last:08d}/MANIFEST.json").exists() and err.count("stopping after")==1

def test_launch_does_not_repeat_a_mistake(tmp_path):
    "A mistake of the user is exit 2, said once by the main process, and not tried again; a typing error starts nothing."
    words = ("pretrain", "--data", tmp_path/"none", "--out", tmp_path/"run", "--device", "cpu")
    err = run("launch", "--nproc", 2, "--", *words, code=2).stderr
    assert "starting again" not in err
    one_message(err, "holds no data to train on") # nothing stands below it
    one_message(run("launch", "--nproc", 2, "--", "pretrain", "--step", 3, code=2).stderr, "did you mean --steps?")
    one_message(run("launch", "--nproc", 2, "pretrain", "--steps", 3, code=2).stderr, "nanogpt launch --nproc 2 -- pretrain --steps 3")

def test_launch_gives_up(tmp_path):
    "What breaks every time is tried as often as was said, and no more."
    code = "from nanogpt.dist import LaunchConfig, launch\n" \
           "print(launch(LaunchConfig(nproc=1, max_restarts=2, wait_seconds=.1, command=('x',)), before=('-c', 'raise SystemExit(3)')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout=="1\n" and done.stderr.count("starting again")==2, done.stderr
    assert "in 0.1 s, restart 1 of 2" in done.stderr and "in 0.2 s, restart 2 of 2" in done.stderr

def test_torchrun(shards, tmp_path):
    "Plain torchrun works too; SIGTERM to it ends with one more step and an exit.json that says why."
    out = tmp_path/"run"
    words = pretrain(shards, out, *ONE_STEP, "--steps", 100_000, "--eval_every", 0, "--save_every", 0)
    p = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "nanogpt",
                          *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert wait(p, lambda: steps_done(out)>=10)
    asked = time.time()
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=30)
    last = steps_done(out)
    assert time.time()-asked<10 and reason(out)=="preempted" and read_json(out/"exit.json")["step"]==last, err
    assert len(log(out, "step"))==last and (out/f"ckpt/step-{last:08d}/MANIFEST.json").exists()

@needs_proc
def test_two_machines(shards, tmp_path):
    "Two launches that meet at one address, as two machines would: one run of two; a process killed on one brings both back."
    out, at = tmp_path/"run", f"localhost:{free_port()}"
    words = ("--nproc", 1, "--nodes", 2, "--endpoint", at, "--",
             *pretrain(shards, out, *ONE_STEP, "--steps", 100_000, "--eval_every", 0, "--save_every", 20))
    both = [start_launch(*words) for _ in range(2)]
    try:
        assert wait(both[0], lambda: steps_done(out)>=45)
        assert read_json(out/"config.json")["world"]==2
        os.kill(workers(both[1])[0], signal.SIGKILL)
        assert wait(both[0], lambda: any("going on after step" in o["text"] for o in log(out, "note")))
        n = steps_done(out)
        assert wait(both[0], lambda: steps_done(out)>n+10)
        for p in both: p.send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=30)[1] for p in both]
    finally:
        for p in both: p.kill()
    assert [p.returncode for p in both]==[0, 0] and reason(out)=="preempted", said
    steps = [o["step"] for o in log(out, "step")]
    assert steps==list(range(1, len(steps)+1)) and any("starting again" in o for o in said) # the other may only have been called back
