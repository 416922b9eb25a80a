"What a processor cannot show: the same numbers on a GPU, runs that go on there to the last bit, memory as it was foretold."
import json
import signal

import pytest
import torch
from mini import PRETRAIN, SFT, copy, end, log, numbers, reason, run, start, steps_done, wait

from nanogpt.attention import KERNELS
from nanogpt.cache import KVCache
from nanogpt.model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

SMALL = dict(vocab_size=320, block_size=64, n_layer=2, n_head=4, n_embd=32)
LLAMA = dict(n_kv_head=2, position="rotary", norm="rms", mlp="swiglu", bias=False, tied=False)
FAMILIES = dict(gpt2=GPTConfig(**SMALL), llama=GPTConfig(**SMALL, **LLAMA))
GPU = "--device cuda --dtype bfloat16 --threads 0".split()

def built(family):
    torch.manual_seed(0)
    return GPT(FAMILIES[family]).eval(), torch.randint(320, (3, 40))

@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_same_numbers_as_on_the_processor(family, kernel):
    "Logits and loss in float32, by both attention kernels, with and without documents in a row."
    model, x = built(family)
    want, lost = model(x), model.loss(x, x)[0]
    for b in model.cuda().transformer.h: b.attn.kernel = KERNELS[kernel]
    assert (model(x.cuda()).cpu()-want).abs().max()<1e-4 and abs(model.loss(x.cuda(), x.cuda())[0].cpu()/lost-1)<1e-5

@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_equals_uncached(family):
    "Token by token through the cache, the logits are those of the whole text."
    model, x = built(family)
    model, x = model.cuda(), x.cuda()
    cache = KVCache(model.cfg, 3, 40, model.transformer.ln_f.weight)
    parts = [model(x[:, :7], cache), *(model(x[:, k:k+1], cache) for k in range(7, 40))]
    assert (torch.cat(parts, 1)-model(x)).abs().max()<1e-4

# ---- runs ------------------------------------------------------------------------------------------------------------

def killed(words, out, at):
    "Kill -9 after so many steps, and start the same command again."
    p = start(*words, "--out", out)
    assert wait(p, lambda: steps_done(out)>=at)
    p.send_signal(signal.SIGKILL)
    p.communicate()
    assert p.returncode==-signal.SIGKILL and at<=steps_done(out)
    run(*words, "--out", out)

def same(out, whole):
    assert reason(out)==reason(whole)=="done" and numbers(out)==numbers(whole)
    assert (out/"model/model.safetensors").read_bytes()==(whole/"model/model.safetensors").read_bytes()

WIDE = "--n_head 4 --n_embd 128 --seq_len 128 --micro_batch 8 --batch_tokens 2048 --steps 60".split() # large enough for kernels that race

@pytest.mark.parametrize("how", ["--no_compile --kernel fused", "--no_compile --kernel written", "--compile --kernel fused"])
def test_killed_and_gone_on_is_never_stopped(how, shards, tmp_path):
    "Pretraining in bf16 with dropout: after kill -9 every number and every bit of the weights is that of a run that was left alone."
    words = (*PRETRAIN, *WIDE, "--data", shards, *GPU, *how.split())
    run(*words, "--out", tmp_path/"whole")
    killed(words, tmp_path/"run", 33)
    same(tmp_path/"run", tmp_path/"whole")

def test_control_forgotten_dice(shards, tmp_path):
    "The comparison can fail: forgotten dice give another rest."
    words = (*PRETRAIN, *WIDE, "--data", shards, *GPU)
    run(*words, "--out", tmp_path/"whole")
    p = start(*words, "--out", tmp_path/"run")
    assert wait(p, lambda: steps_done(tmp_path/"run")>=20)
    p.send_signal(signal.SIGTERM)
    end(p)
    n = steps_done(tmp_path/"run")
    run(*words, "--out", tmp_path/"run", before="import nanogpt.checkpoint as ck\nck.set_rng_state = lambda state: None")
    got, want = (numbers(tmp_path/o)[0] for o in ("run", "whole"))
    assert n<60 and got[:n]==want[:n] and got[n:]!=want[n:]

def test_tuned_killed_and_gone_on(shards, tmp_path):
    "Instruction tuning, whose rows hold several conversations and so a mask, goes on to the last bit too."
    run(*PRETRAIN, "--data", shards, *GPU, "--seq_len", 128, "--batch_tokens", 512, "--out", tmp_path/"base")
    words = (*SFT, "--init", tmp_path/"base", *GPU)
    run(*words, "--out", tmp_path/"whole")
    killed(words, tmp_path/"run", 8)
    same(tmp_path/"run", tmp_path/"whole")

@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")/"run"
    run(*PRETRAIN, "--data", shards, *GPU, "--out", out)
    return out

def test_from_the_gpu_to_the_processor(trained, shards, tmp_path):
    "A run goes on on another device, and says that the rest is not what it would have been."
    err = run(*PRETRAIN, "--data", shards, "--out", copy(trained, tmp_path/"run"), "--steps", 33).stderr
    assert "not bit-equal to a run never stopped" in err and "device" in err and steps_done(tmp_path/"run")==33

def spoken(trained, *more):
    words = ("--prompt", "One day", "--max_tokens", 24, "--json", *more)
    return json.loads(run("generate", "--model", trained, *words).stdout.splitlines()[-1])

def test_the_same_words(trained, tmp_path):
    "Greedy text in float32 is that of the processor, beams too; 16 bits and quantised weights write as well."
    for more in (("--temperature", 0), ("--beams", 3)):
        here, there = (spoken(trained, "--device", o, "--dtype", "float32", *more) for o in ("cpu", "cuda"))
        assert here["text"]==there["text"]
    assert spoken(trained, "--device", "cuda")["text"]
    for kind in ("int8", "int4"):
        run("quantize", "--model", trained, "--out", tmp_path/kind, "--kind", kind, "--group", 16)
        assert spoken(tmp_path/kind, "--device", "cuda")["text"]

def test_the_same_measures(trained, tmp_path):
    "Losses and choices in float32 are those of the processor."
    def asked(device):
        words = ("--tasks", "tales", "--limit", 40, "--device", device, "--dtype", "float32", "--json")
        rows = map(json.loads, run("eval", "--model", copy(trained, tmp_path/device), *words).stdout.splitlines())
        return {o["metric"]: (o["value"], o["n"]) for o in rows}
    here, there = asked("cpu"), asked("cuda")
    assert len(here)>5 and here.keys()==there.keys()
    for k, (value, n) in here.items(): assert there[k]==(pytest.approx(value, abs=1e-4), n)

@pytest.mark.parametrize("how", ["--compile", "--no_compile", "--compile --recompute", "--no_compile --optimizer muon --dtype float32"])
def test_memory_as_foretold(how):
    "GPT-2 124M, two steps of eight rows: what the device gave out, beside the prediction."
    words = "--preset gpt2 --micro_batch 8 --seq_len 1024 --batch_tokens 16384 --measure --json --device cuda".split()+how.split()
    row = json.loads(run("bench", "memory", *words).stdout.splitlines()[-1])
    assert .9<row["ratio"]<1.15, row["ratio"]

def test_one_gpu_is_not_two(shards, tmp_path):
    "More processes than GPUs are refused in words."
    if torch.cuda.device_count()>1: pytest.skip("there are several GPUs here")
    done = run("launch", "--nproc", 2, "--", *PRETRAIN, "--data", shards, *GPU, "--out", tmp_path/"run", code=2)
    assert "which has 1 GPUs" in done.stderr and not log(tmp_path/"run", "step")
