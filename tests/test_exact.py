"Stopped anywhere and resumed equals never stopped: inside the warm-up, mid-epoch, at an epoch's edge, with dropout and accumulation."
import json
import os
import shutil

import pytest
import torch
from mini import KEYS, copy, log

from nanogpt import checkpoint as ck
from nanogpt import run as runs
from nanogpt.core import DivergedError, read_json, seed, write_json
from nanogpt.data import Loader
from nanogpt.model import GPT, GPTConfig
from nanogpt.shard import Shard, write_shard
from nanogpt.tokenizer import Tokenizer
from nanogpt.trainer import FitConfig

WARM, EDGE, STEPS = 5, 12, 27 # the rate climbs for 5 steps, an epoch has 12, the run ends in the third one
CUTS = (3, WARM, 8, EDGE-1, EDGE, 2*EDGE, STEPS-1)

@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    "No power is cut here, and hundreds of checkpoints are saved: their bytes need not reach the disk."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", lambda handle: None)
        yield

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Twelve steps of two passes of two rows, and some held-out rows: what the tests below train on."
    home, T = tmp_path_factory.mktemp("exact"), 16
    tok = Tokenizer.train(["the cat sat on the mat. the dog ran to the cat."]*9, 300)
    text = [k*k%23 for k in range(EDGE*4*T+1)] # something can be learnt
    for name, part in (("train", text), ("val", text[:T*6+1])): write_shard(home/f"{name}.bin", [part], tok.fingerprint, tok.n_vocab)
    return home, tok

def config(out, **more):
    base = dict(steps=STEPS, warmup_steps=WARM, seq_len=16, micro_batch=2, batch_tokens=64, lr=1e-2, eval_every=4, eval_batches=3,
                save_every=1, keep=99, compile=False, kernel="fused", dtype="float32", device="cpu")
    return FitConfig(out=out, **base | more)

def train(data, out, start=0, **more):
    "A run to its end, from a fresh model; `start` is only what the generators hold before."
    home, tok = data
    cfg = config(out, **more)
    seed(start)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=.2))
    rows = {k: Loader(Shard(home/f"{k}.bin", tok), cfg.seq_len, cfg.micro_batch, seed=cfg.seed) for k in ("train", "val")}
    return runs.fit(model, rows["train"], cfg, tok, rows["val"])

@pytest.fixture(scope="module")
def never(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("never")/"run"
    train(data, out)
    return out

def stopped(never, to, step):
    "A copy of a finished run, as if it had been stopped after a step."
    name = f"ckpt/step-{step:08d}"
    copy(never/name, to/name)
    for o in ("log.jsonl", "config.json", "tokenizer.json"): shutil.copy(never/o, to)
    return to

def story(out, after=0):
    "What must not depend on a stop: every step's and every evaluation's numbers, all that each later checkpoint holds, and the weights."
    states = [read_json(p/"state.json") for p in ck.checkpoints(out) if int(p.name[5:])>after]
    for o in states: del o["seconds"]
    looks = [(o["step"], o["val_loss"], o["n"]) for o in log(out, "eval")]
    return [tuple(o[k] for k in KEYS) for o in log(out, "step")], looks, states, (out/"model/model.safetensors").read_bytes()

def test_the_cuts_are_where_they_should_be(never):
    "One cut lies inside the warm-up, one in the middle of an epoch, one exactly at an epoch's edge; dropout and two passes a step are on."
    rows, place = log(never, "step"), lambda n: read_json(never/f"ckpt/step-{n:08d}/state.json")["loader"]
    assert [o["lr"]<1e-2 for o in rows[:WARM+1]]==[True]*(WARM-1)+[False]*2
    assert [place(n)["position"]%place(n)["windows"] for n in (EDGE-1, EDGE, 2*EDGE)]==[(EDGE-1)*4, 0, 0]
    assert read_json(never/"config.json")["model"]["dropout"]==.2 and config(never).accum()==2
    assert len(log(never, "eval"))==7 and rows[-1]["loss"]<rows[0]["loss"]

@pytest.mark.parametrize("cut", CUTS)
def test_resumed_equals_never_stopped(cut, data, never, tmp_path, capsys):
    "The rest of the run has the same losses, rates, gradients, ids, evaluations, best step, state and weights."
    out = stopped(never, tmp_path/"run", cut)
    train(data, out, start=99)
    assert story(out, cut)==story(never, cut)
    err = capsys.readouterr().err
    assert f"going on after step {cut} of {STEPS}" in err and "not bit-equal" not in err

FORGET = {"dice": lambda t: torch.manual_seed(5), "place": lambda t: t.loader.load_state_dict(t.loader.state_dict() | dict(position=0)),
          "optimiser": lambda t: [opt.state.clear() for opt in t.opts], "schedule": lambda t: setattr(t, "done", t.done-1),
          "best": lambda t: t.best.clear()}

@pytest.mark.parametrize("part", FORGET)
def test_control_something_is_forgotten(part, data, never, tmp_path, monkeypatch):
    "The comparison can fail: whatever is forgotten on the way back is seen."
    def forgetful(t, path, old=runs.resume_run): old(t, path); FORGET[part](t)
    monkeypatch.setattr(runs, "resume_run", forgetful)
    cut = EDGE+1
    out = stopped(never, tmp_path/"run", cut)
    train(data, out)
    (steps, _, states, _), (want, _, right, _) = story(out, cut), story(never, cut)
    if part=="best": assert steps==want and states[0]["best"]!=right[0]["best"] # only what is remembered of evaluations is lost
    else: assert steps[:cut-1]==want[:cut-1] and steps[cut:]!=want[cut:]

@pytest.mark.parametrize("name,value", [("threads", 17), ("world", 2), ("versions", dict(torch="1.0"))])
def test_another_machine_is_named(name, value, data, never, tmp_path, capsys):
    "The number of threads, of processes and the version of torch are recorded; where one of them differs, equality is no longer promised."
    out = stopped(never, tmp_path/"run", STEPS-1)
    had = read_json(out/"config.json")
    assert had["threads"]==torch.get_num_threads() and had["world"]==1 and had["versions"]["torch"]==torch.__version__
    write_json(out/"config.json", had | {name: value})
    train(data, out)
    assert f"not bit-equal to a run never stopped: {name}\n" in capsys.readouterr().err

# ---- numbers that are not finite, and leaps --------------------------------------------------------------------------

def poison(monkeypatch, steps, by):
    "Multiply the loss of some steps."
    from nanogpt.trainer import Trainer
    def loss(self, *batch, old=Trainer._loss):
        total, n = old(self, *batch)
        return total*(by if self.model.training and self.done+1 in steps else 1), n
    monkeypatch.setattr(Trainer, "_loss", loss)

def notes(out, word): return [o["step"] for o in log(out, "note") if word in o["text"]]

def test_weights_that_overflow_are_not_saved(data, never, tmp_path):
    "A rate that blows the weights up: the save refuses and names the tensor; the checkpoint before is whole and goes on."
    out = stopped(never, tmp_path/"run", 6)
    with pytest.raises(DivergedError, match="weight holds numbers that are not finite: nothing was saved"): train(data, out, lr=1e39)
    end = read_json(out/"exit.json")
    assert (end["reason"], end["step"])==("diverged", 7) and "weight holds numbers" in end["error"] and "lower --lr" in end["error"]
    assert [p.name for p in (out/"ckpt").iterdir()]==["step-00000006"] and ck.latest(out) and not (out/"model").exists()
    write_json(out/"config.json", read_json(never/"config.json"))
    train(data, out)
    assert story(out, 6)==story(never, 6)

@pytest.mark.parametrize("beside", [False, True], ids=["between steps", "beside them"])
def test_memory_that_is_not_finite_is_not_saved(beside, data, never, tmp_path, monkeypatch):
    "The optimiser's memory counts too; beside the steps, the refusal comes at the next save. The checkpoint before goes on."
    out = stopped(never, tmp_path/"run", 6)
    def rotten(t, path, old=runs.resume_run):
        old(t, path)
        next(iter(t.opts[0].state.values()))["exp_avg_sq"].view(-1)[0] = float("inf") # a step divides by it: the weights stay finite
    with monkeypatch.context() as m:
        m.setattr(runs, "resume_run", rotten)
        with pytest.raises(DivergedError, match="exp_avg_sq holds numbers"): train(data, out, save_async=beside)
    assert read_json(out/"exit.json")["reason"]=="diverged" and [p.name for p in (out/"ckpt").iterdir()]==["step-00000006"]
    train(data, out)
    assert story(out, 6)==story(never, 6)

def test_control_saved_without_a_look(data, never, tmp_path, monkeypatch):
    "Without the look, the bad weights are saved, and only three lost steps end the run: the tests above test something."
    def blind(tensors, path, metadata=None): ck.save_file(tensors, path, metadata=metadata)
    monkeypatch.setattr(ck, "save_tensors", blind)
    out = stopped(never, tmp_path/"run", 6)
    with pytest.raises(DivergedError, match="three times"): train(data, out, lr=1e39)
    weights = ck.load_file(ck.latest(out)/"model.safetensors")
    assert ck.latest(out).name!="step-00000006" and not all(w.isfinite().all() for w in weights.values())

def test_steps_that_are_skipped(data, tmp_path, monkeypatch):
    "A skipped step is said, two of them before a stop count as two after it, and three in a row end the run."
    poison(monkeypatch, (8, 9), float("nan"))
    out = tmp_path/"run"
    train(data, out)
    assert notes(out, "was skipped")==[8, 9] and [o["skipped"] for o in log(out, "step")][6:10]==[0, 1, 2, 0]
    poison(monkeypatch, (10,), float("nan"))
    again = stopped(out, tmp_path/"again", 9)
    with pytest.raises(DivergedError, match="three times, last at step 10"): train(data, again)
    assert read_json(again/"exit.json")["reason"]=="diverged" and ck.latest(again).name=="step-00000009"

def test_a_leap_of_the_loss_is_logged(data, tmp_path, monkeypatch, capsys):
    "One strange step among 44 is named, in the log and on stderr, by a run never stopped and by one stopped just before it."
    poison(monkeypatch, (40,), 5.)
    whole = tmp_path/"whole"
    train(data, whole, steps=44)
    assert notes(whole, "is a spike")==[40] and "step 40: the loss" in capsys.readouterr().err
    out = stopped(whole, tmp_path/"run", 39)
    train(data, out, steps=44)
    assert notes(out, "is a spike")==[40] and story(out, 39)==story(whole, 39)
    state = whole/"ckpt/step-00000039/state.json"
    assert len(json.loads(state.read_text())["recent"])==32

def test_control_the_window_is_forgotten(data, tmp_path, monkeypatch):
    "Were the last losses not part of the state, the resumed run would miss the leap."
    poison(monkeypatch, (40,), 5.)
    train(data, tmp_path/"whole", steps=44)
    out = stopped(tmp_path/"whole", tmp_path/"run", 39)
    def forgetful(t, path, old=runs.resume_run): old(t, path); t.recent = []
    monkeypatch.setattr(runs, "resume_run", forgetful)
    train(data, out, steps=44)
    assert notes(out, "is a spike")==[]

def test_a_checkpoint_from_before(data, never, tmp_path):
    "A state without the later parts, as older versions wrote it, still goes on."
    out = stopped(never, tmp_path/"run", 5)
    def age(tmp):
        for o in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"):
            shutil.copy(never/"ckpt/step-00000005"/o, tmp)
        state = read_json(tmp/"state.json")
        write_json(tmp/"state.json", {k: v for k, v in state.items() if k not in ("best", "recent")} | dict(rng=state["rng"][0]))
    ck.save_folder(out/"ckpt/step-00000005", age)
    train(data, out)
    assert story(out)[0]==story(never)[0]
