"Instruction tuning: packed and padded are alone, every answer token weighs the same, and a run that stops early does so at the same step."
import json
import shutil
import signal
from dataclasses import replace
from itertools import islice
from types import MethodType

import numpy as np
import pytest
import torch
from mini import KEYS, SFT, copy, end, log, numbers, one_message, reason, run, start, steps_done, wait
from test_dist import group, near
from torch._dynamo.utils import counters
from torch.testing import assert_close

from nanogpt.attention import Documents
from nanogpt.bulk import open_shards
from nanogpt.checkpoint import load_model, save_model
from nanogpt.core import ConfigError, pick_device, read_json, seed
from nanogpt.corpus import rows
from nanogpt.data import Loader, Packed
from nanogpt.hub import save_hub
from nanogpt.model import GPT, GPTConfig
from nanogpt.sft import Padded, PaddedLoader, SFTConfig, by_length, tune
from nanogpt.shard import Shard, write_shard
from nanogpt.tokenizer import Tokenizer, get_tokenizer
from nanogpt.trainer import FitConfig, Trainer

V = 300

def made(path, sizes, answers=None):
    "A shard of conversations of random ids: how long each is, and how many of its last tokens are learned."
    rng = np.random.RandomState(0)
    answers = answers or [rng.randint(1, n-1) for n in sizes]
    rows = [(rng.randint(0, V, n), [0]*(n-a)+[1]*a) for n, a in zip(sizes, answers, strict=True)]
    write_shard(path, rows, "5a"*32, V, mask=True)
    return Shard(path)

@pytest.fixture
def talks(tmp_path):
    "Forty-eight conversations of 3 to 60 tokens."
    return made(tmp_path/"talks.bin", np.random.RandomState(1).randint(3, 61, 48).tolist())

SHAPES = dict(learned=dict(position="learned"), rotary=dict(position="rotary", norm="rms", mlp="swiglu", n_kv_head=1))

def a_model(**more):
    seed(0)
    return GPT(GPTConfig(vocab_size=V, block_size=64, n_layer=2, n_head=2, n_embd=32, init_std=.2, **more))

def learned(model, batches, past=Documents):
    "Loss per answer token and its gradient, of all batches together."
    model.zero_grad()
    losses = [model.loss(b.x, b.y, None if b.doc is None or past is None else past(b.doc)) for b in batches]
    (loss := sum(s for s, _ in losses)/sum(n for _, n in losses)).backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

def epoch(loader):
    "The batches of the first epoch; the last may be smaller, where the loader would read on into the second."
    n, B = loader.windows, loader.batch
    return [loader.read([loader._place(p) for p in range(i, min(i+B, n))]) for i in range(0, n, B)]

def alone(shard, T):
    "Each conversation in a batch of its own, without packing, padding or mask."
    rows = Padded(shard, T)
    return [type("Row", (), dict(x=torch.tensor(x)[None], y=torch.tensor(y)[None], doc=None)) for x, y in rows]

class RunsOn(Documents):
    "Nobody sees a neighbour, but the positions are not reset."
    def positions(self, B, T, device): return torch.arange(T, device=device).expand(B, T)

# ---- packed = padded = alone -----------------------------------------------------------------------------------------

# The sums are added in another order, so float32 is not bit-equal; the controls miss by a hundred times as much.
LOSS, GRAD = 1e-5, dict(atol=5e-6, rtol=1e-4)

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [60, 40], ids=["whole", "some cut"])
def test_packed_and_padded_are_alone(talks, shape, T):
    "All conversations once: packed, padded or each alone, the loss and every gradient are the same."
    model = a_model(**SHAPES[shape])
    loss, grad = learned(model, alone(talks, T))
    for loader in (Loader(talks, T, 1), PaddedLoader(talks, T, 4, span=2)):
        got, same = learned(model, epoch(loader))
        assert abs(got-loss)<LOSS
        assert_close(same, grad, **GRAD)

@pytest.mark.parametrize("shape,past", [("learned", None), ("rotary", None), ("learned", RunsOn)], ids=["causal", "rotary", "not reset"])
def test_control_plain_packing_is_not_alone(talks, shape, past):
    "The comparison can fail: when conversations see their neighbours, or learned positions run on, loss and gradient are others."
    model = a_model(**SHAPES[shape])
    loss, grad = learned(model, alone(talks, 60))
    got, other = learned(model, epoch(Loader(talks, 60, 1)), past)
    assert abs(got-loss)>100*LOSS and (other-grad).abs().max()>1e-3

def test_control_learned_padding_is_not_alone(talks):
    "The comparison can fail: if padding were a target, the loss would be another."
    model = a_model()
    batches = epoch(PaddedLoader(talks, 60, 4, span=2))
    for b in batches: b.y[(b.x==0)] = 0
    assert abs(learned(model, batches)[0]-learned(model, alone(talks, 60))[0])>100*LOSS

# ---- the padded loader -----------------------------------------------------------------------------------------------

def places(loader, n): return [loader._place(p) for p in range(n)]

@pytest.mark.parametrize("n,batch,span", [(48, 4, 64), (45, 4, 3), (47, 8, 1), (5, 8, 2), (1, 3, 2)])
def test_each_row_once_per_epoch(tmp_path, n, batch, span):
    "Whatever fits or not: every epoch reads each row once, in another order, and batches hold rows that were sorted together."
    shard = made(tmp_path/"some.bin", np.random.RandomState(n).randint(3, 61, n).tolist())
    loader = PaddedLoader(shard, 64, batch, span=span)
    order = places(loader, 5*n)
    epochs = [order[e*n:(e+1)*n] for e in range(5)]
    assert all(sorted(o)==list(range(n)) for o in epochs) and (n<9 or epochs[0]!=epochs[1])
    assert places(PaddedLoader(shard, 64, batch, seed=1, span=span), n)!=epochs[0] or n<9

def test_little_is_wasted_in_later_epochs_too(tmp_path):
    "Batches run on over the end of an epoch, and still hold rows of one length: but for the batch at the seam, the waste stays small."
    shard = made(tmp_path/"some.bin", np.random.RandomState(3).randint(3, 257, 403).tolist())
    loader = PaddedLoader(shard, 256, 8)
    def waste(n): return 1-sum(loader.rows.lengths[k] for k in places(loader, 403*3)[:n*8])/sum(loader.next().x.numel() for _ in range(n))
    assert waste(150)<.12
    loader = PaddedLoader(shard, 256, 8, span=1)            # a control: batches of what comes
    assert waste(150)>.3

def test_what_is_said_of_padding_is_so(tmp_path, capsys):
    "The share that is said and the rows that are cut or dropped are those of the first epoch's batches."
    shard = made(tmp_path/"some.bin", np.random.RandomState(3).randint(3, 80, 64).tolist()+[90]*4, None)
    loader = PaddedLoader(shard, 64, 4)
    said, packed = capsys.readouterr().err, Packed(shard, 64)
    batches = epoch(loader)
    used = sum(loader.rows.lengths)/sum(b.x.numel() for b in batches)
    assert f"some.bin: 68 conversations, each padded to the longest of its batch of 4 ({used:.0%} used)" in said
    assert f"{packed.cut} longer than a row were cut at its end, {packed.dropped} with nothing to learn were dropped" in said
    assert packed.cut and len(loader.rows)==68-packed.dropped and max(b.x.size(1) for b in batches)==64

@pytest.mark.parametrize("world,batch", [(2, 4), (4, 2), (3, 4), (1, 6)])
def test_another_world_or_batch_goes_on_with_the_same_rows(talks, world, batch):
    "A state says in which order it is a place: more processes or a smaller batch read on in it."
    one = PaddedLoader(talks, 64, 4, span=2)
    for _ in range(6): one.next()
    many = [PaddedLoader(talks, 64, batch, rank=r, world=world, span=2) for r in range(world)]
    for o in many: o.load_state_dict(one.state_dict())
    got = [tuple(t for t in row.tolist() if t!=-100) for _ in range(2) for o in many for row in o.next().y]
    want = [tuple(t for t in row.tolist() if t!=-100) for _ in range(8) for row in one.next().y]
    assert got==want[:len(got)]

def test_a_packed_state_is_refused(talks):
    "A run that was packed cannot go on padded: its place is one in another order."
    with pytest.raises(ValueError, match="another order"): PaddedLoader(talks, 64, 4).load_state_dict(Loader(talks, 64, 4).state_dict())
    with pytest.raises(ValueError, match="another order"): Loader(talks, 64, 4).load_state_dict(PaddedLoader(talks, 64, 4).state_dict())

def test_by_length_takes_any_numbers():
    assert by_length([1, 1, 1], [2, 0, 1], 2, 2)==[[2, 0], [1]] and by_length([], [], 4, 2)==[]

# ---- loss ÷ valid tokens ---------------------------------------------------------------------------------------------

@pytest.fixture
def uneven(tmp_path):
    "Conversations of 60 tokens: of every fourth 58 are learned, of the others one or two."
    return made(tmp_path/"uneven.bin", [60]*16, [58 if k%4==0 else 1+k%2 for k in range(16)])

def trained(shard, micro_batch, cheat=False, kind=PaddedLoader, steps=2):
    "Log lines of some steps of eight rows each, read in passes of `micro_batch`."
    cfg = FitConfig(seq_len=64, micro_batch=micro_batch, batch_tokens=8*64, steps=steps, warmup_steps=0, device="cpu", dtype="float32")
    seed(0)
    model = a_model()
    if cheat: # each pass gives its mean, weighed as if all passes had as many targets
        def means(self, x, y, past=None, old=GPT.loss):
            loss, n = old(self, x, y, past)
            return loss/n*cheat, n
        model.loss = MethodType(means, model)
    t = Trainer(model, kind(shard, 64, micro_batch), cfg, None)
    t.loader._place = lambda p: p%16 # the same rows in every step, whatever the passes are
    return [t.step() for _ in range(steps)]

@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_passes_of_unequal_counts_are_one_batch(uneven, micro_batch):
    "One pass of eight rows, or eight of one with between 1 and 58 targets: the same loss and gradient, before and after an update."
    for a, b in zip(trained(uneven, 8), trained(uneven, micro_batch), strict=True):
        assert abs(a["loss"]-b["loss"])<1e-6 and abs(a["grad_norm"]-b["grad_norm"])<1e-5

def test_control_a_mean_of_means(uneven):
    "The comparison can fail: the mean of eight passes' means is far from the mean over all targets."
    n = sum(58 if k%4==0 else 1+k%2 for k in range(8))
    one, many = trained(uneven, 8), trained(uneven, 1, cheat=n/8)
    assert abs(one[0]["loss"]-many[0]["loss"])>1e-2 and abs(one[0]["grad_norm"]-many[0]["grad_norm"])>1e-2

@pytest.fixture(scope="module")
def plain(whole, tmp_path_factory):
    "A model without dropout, whose numbers would differ between processes, with the vocabulary of `whole`."
    tok, out = Tokenizer.load(whole/"tokenizer.json"), tmp_path_factory.mktemp("plain")
    seed(0)
    save_model(out/"model", GPT(replace(a_model().cfg, vocab_size=tok.n_vocab, block_size=128)), tok)
    return out

def test_two_processes_are_one_when_padded(plain, tmp_path):
    "The processes read batches of other widths and other counts, and log what one process logs; as many ids are counted as were read."
    words = (*SFT, "--init", plain, "--pack", "no", "--steps", 4)
    run(*words, "--out", tmp_path/"one")
    group(2, *words, "--out", tmp_path/"two")
    one, two = (log(tmp_path/o, "step") for o in ("one", "two"))
    near(one, two)
    read = np.diff([o["tokens"] for o in one])
    assert len(set(read))>1 and max(read)<512, "padded steps read fewer ids than --batch_tokens, each its own number"

# ---- --data, padded --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prepared(whole, tmp_path_factory):
    "A file of instructions as shards of conversations, three or more to train on, as plain text; the vocabulary is that of `whole`."
    home = tmp_path_factory.mktemp("prepared")
    (home/"d.jsonl").write_text("".join(json.dumps(o)+"\n" for o in islice(rows("tales"), 120)))
    words = f"--split .8 --form plain --max_tokens 255 --shard_rows 20 --tokenizer {whole} --out {home/'set'}".split()
    run("data", "instruct", f"dolly={home/'d.jsonl'}", *words)
    assert len(list((home/"set").glob("train-*.bin")))>=3
    return home/"set"

def test_prepared_padded_is_alone(prepared, whole):
    "Several shards as one: padded, their conversations have the loss and the gradient that each has alone."
    shards, _ = open_shards(prepared, tok := get_tokenizer(whole))
    seed(0)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=128, n_layer=2, n_head=2, n_embd=32, init_std=.2))
    loss, grad = learned(model, alone(shards, 127))
    got, same = learned(model, epoch(PaddedLoader(shards, 127, 4, span=2)))
    assert abs(got-loss)<LOSS
    assert_close(same, grad, **GRAD)

def test_prepared_padded_goes_on_exactly(prepared, whole, tmp_path):
    "`sft --data DIR --pack no`, from the shards to the chat: killed and given again, it ends as a run never stopped."
    words = (*SFT, "--init", whole, "--data", prepared, "--pack", "no")
    err = run(*words, "--out", tmp_path/"never").stderr
    assert "conversations, each padded to the longest of its batch of 2" in err and not (tmp_path/"never/data").exists()
    read = np.diff([o["tokens"] for o in log(tmp_path/"never", "step")])
    assert len(set(read))>3 and max(read)<512, "padded steps read fewer ids than --batch_tokens, each its own number"
    assert read_json(tmp_path/"never/template.json")["form"]=="plain"
    p = start(*words, "--out", tmp_path/"run")
    assert wait(p, lambda: steps_done(tmp_path/"run")>=7)
    p.kill()
    end(p, -signal.SIGKILL)
    run(*words, "--out", tmp_path/"run")
    assert numbers(tmp_path/"run")==numbers(tmp_path/"never") and len(numbers(tmp_path/"run")[0])==20
    assert (tmp_path/"run/model/model.safetensors").read_bytes()==(tmp_path/"never/model/model.safetensors").read_bytes()

# ---- --compile, padded -----------------------------------------------------------------------------------------------

COMPILER = pytest.mark.skipif(not pick_device("cpu").compiles, reason="torch.compile needs a C++ compiler, and there is none here")
OWN_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning") # of the compiler's own modules

def padded(plain, out, steps, **more):
    "The steps of a small padded tuning in this process, where the graphs of the compiler can be counted."
    tune(SFTConfig(init=plain, out=out, rows=60, val_rows=4, pack="no", seq_len=128, micro_batch=2, batch_tokens=256, steps=steps,
                   eval_every=0, save_every=0, device="cpu", dtype="float32", threads=1, **more))
    return log(out, "step")

def graphs(monkeypatch, backend, **force):
    "From now on what is compiled is compiled by this backend; a function that says how many graphs there were, and how many breaks."
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: compile_(f, **given | force, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    return lambda: (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))

@COMPILER
@OWN_WARNINGS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]) # the second writes C++: a minute
def test_padded_compiled_is_padded(plain, tmp_path, monkeypatch, backend):
    "Compiled, a padded run has the losses and gradients of an uncompiled one; one graph serves batches of any width."
    want = padded(plain, tmp_path/"plain", 8, compile=False, kernel="fused")
    count = graphs(monkeypatch, backend)
    got = padded(plain, tmp_path/"compiled", 8)
    assert len(set(np.diff([0, *(o["tokens"] for o in got)])))>3 and count()==(1, 0)
    for a, b in zip(got, want, strict=True):
        assert a["ids_sha"]==b["ids_sha"] and abs(a["loss"]-b["loss"])<1e-4 and abs(a["grad_norm"]-b["grad_norm"])<1e-3*b["grad_norm"]
    assert any("attention kernel fused" in o["text"] for o in log(tmp_path/"compiled", "note"))

@COMPILER
@OWN_WARNINGS
def test_control_a_graph_for_every_width(plain, tmp_path, monkeypatch):
    "The count can fail: a compiler that is not told that widths change makes a graph for each."
    count = graphs(monkeypatch, "eager", dynamic=False)
    got = padded(plain, tmp_path/"run", 4)
    assert count()[0]==len(set(np.diff([0, *(o["tokens"] for o in got)])))>1

def test_a_kernel_of_one_width_is_refused(whole, tmp_path):
    "The written kernel is a loop over strips of a row, so it would be compiled for every width; uncompiled it may serve."
    words = ("sft", "--init", whole, "--pack", "no", "--kernel", "written", "--out", tmp_path/"run")
    one_message(run(*words, code=2).stderr, "--kernel=written is compiled anew for every width", "--no_compile")
    assert not (tmp_path/"run").exists()
    SFTConfig(init=whole, pack="no", kernel="written", compile=False)
    with pytest.raises(ConfigError, match="try --kernel fused"): SFTConfig(init=whole, pack="no", kernel="written")

# ---- stopped, and stopped early --------------------------------------------------------------------------------------

EARLY = (*SFT, *"--rows 6 --val_rows 12 --steps 60 --lr 0.1 --warmup_steps 0 --eval_every 3 --save_every 2 --keep 2 --patience 2".split())

@pytest.fixture(scope="module", params=["yes", "no"])
def early(request, whole, tmp_path_factory):
    "A tuning that learns six conversations by heart and stops early; its words without --out."
    out = tmp_path_factory.mktemp("early")/"run"
    words = (*EARLY, "--init", whole, "--pack", request.param)
    said = run(*words, "--out", out)
    return out, words, said

def test_it_stops_early_and_keeps_the_best(early):
    "Done after two evaluations without a better one; the best checkpoint is there, its weights are the result, and both are said."
    out, _, said = early
    looks = [(o["val_loss"], o["step"]) for o in log(out, "eval")]
    best, at = min(looks)
    assert reason(out)=="done" and [s for _, s in looks][-3:]==[at, at+3, at+6] and steps_done(out)==at+6<60
    note = next(o for o in log(out, "note") if "stopped early" in o["text"])
    assert note["step"]==at+6 and f"after step {at+6} of 60: 2 evaluations without a lower" in note["text"] and note["text"] in said.stderr
    assert f"The model is that of step {at}, whose validation loss of {best:.4f} was the lowest" in note["text"]
    assert (out/"model/model.safetensors").read_bytes()[-999:]==(out/f"ckpt/step-{at:08d}/model.safetensors").read_bytes()[-999:]
    assert (out/"model/model.safetensors").read_bytes()[-999:]!=(out/f"ckpt/step-{at+6:08d}/model.safetensors").read_bytes()[-999:]

def test_killed_it_ends_the_same(early, tmp_path):
    "Killed while it waits, padded or packed: the run that goes on has the same numbers, the same last step and the same model."
    out, words, _ = early
    p = start(*words, "--out", tmp_path/"run")
    assert wait(p, lambda: steps_done(tmp_path/"run")>=steps_done(out)-3)
    p.kill()
    end(p, -signal.SIGKILL)
    assert steps_done(tmp_path/"run")<steps_done(out), "it was not killed in its middle: this test tests less than it says"
    run(*words, "--out", tmp_path/"run")
    assert numbers(tmp_path/"run")==numbers(out) and reason(tmp_path/"run")=="done"
    assert (tmp_path/"run/model/model.safetensors").read_bytes()==(out/"model/model.safetensors").read_bytes()

def test_control_a_wait_that_is_forgotten(early, tmp_path):
    "The comparison can fail: a run that forgets how long it has waited stops later."
    out, words, _ = early
    again = copy(out, tmp_path/"run")
    *_, before, last = sorted((again/"ckpt").glob("step-*"))
    shutil.rmtree(last)
    assert read_json(before/"state.json")["waited"]==1
    forget = "import nanogpt.run as r\nold = r.resume_run\ndef resume(t, path): old(t, path); t.waited = 0\nr.resume_run = resume"
    run(*words, "--out", again, before=forget)
    assert steps_done(again)>steps_done(out)

def test_asked_again_it_does_not_go_on_but_with_more_patience(early, tmp_path):
    "The same command changes nothing; with more patience the run goes on, step by step as it would have."
    out, words, _ = early
    again = copy(out, tmp_path/"run")
    run(*words, "--out", again)
    assert numbers(again)==numbers(out) and (again/"model/model.safetensors").read_bytes()==(out/"model/model.safetensors").read_bytes()
    err = run(*words, "--out", again, "--patience", 3).stderr
    assert steps_done(again)>=steps_done(out)+3 and "not bit-equal" not in err

# ---- what it starts from, what it says -------------------------------------------------------------------------------

FEW = "--rows 12 --val_rows 4 --steps 1 --seq_len 64 --batch_tokens 128".split()

def test_init_takes_a_run_a_folder_and_a_name(plain, tmp_path):
    "The same model as a run and, in Hugging Face layout, as a folder and as a name: the same first loss, and --help says all three."
    model, tok = load_model(plain)
    save_hub(tmp_path/"home/models/given", model, tok)
    named = f"import os\nos.environ['NANOGPT_DATA'] = {str(tmp_path/'home')!r}"
    ways = [(plain, ""), (tmp_path/"home/models/given", ""), ("given", named)]
    for k, (init, before) in enumerate(ways): run(*SFT, *FEW, "--init", init, "--out", tmp_path/f"{k}", before=before, cwd=tmp_path)
    first = [[o[k] for k in KEYS] for i in range(3) for o in log(tmp_path/f"{i}", "step")]
    assert first[0]==first[1]==first[2]
    told = " ".join(run("sft", "--help").stdout.split())
    assert all(o in told for o in ("a run, a folder in Hugging Face layout, or a name on the hub (gpt2)", "--patience", "--pack"))

def test_a_name_that_is_nowhere(tmp_path):
    err = run(*SFT, "--init", "nobody/nothing", "--out", tmp_path/"run", code=2, cwd=tmp_path).stderr
    one_message(err, "there is no folder nobody/nothing")
    assert not (tmp_path/"run").exists()

@pytest.mark.parametrize("pack", ["yes", "no"])
def test_what_is_cut_or_dropped_is_said_and_logged(whole, tmp_path, pack):
    "Conversations longer than a row are cut, those without a token to learn are dropped; both counts are on stderr and in the log."
    out = tmp_path/"run"
    err = run(*SFT, *FEW, "--rows", 40, "--init", whole, "--pack", pack, "--out", out).stderr
    rows = Packed(Shard(out/"data/train.bin"), 64)
    assert rows.cut and rows.dropped
    text = f"{rows.cut} longer than a row were cut at its end, {rows.dropped} with nothing to learn were dropped"
    assert text in err and any(text in o["text"] and "% used" in o["text"] for o in log(out, "note"))

def test_presets():
    "For GPT-2 the rate is small and the epochs are three; on two cores a run may stop early."
    dolly, small = (SFTConfig.presets[k]() for k in ("dolly", "dolly-small"))
    assert (dolly.lr, dolly.epochs, str(dolly.init), dolly.corpus, dolly.patience)==(1e-5, 3, "gpt2", "dolly", 0)
    assert small.patience and str(small.init)=="runs/real-base" and small.corpus=="dolly"
