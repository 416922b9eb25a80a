"A loaded model is its file: processes that answer with the same model share the pages of its weights."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHILD = """import json, sys, torch
from nanogpt.ready import load_ready
model,_ = load_ready(sys.argv[1], "cpu", sys.argv[2])
with torch.inference_mode(): total = float(model(torch.tensor([[1,2,3]])).double().sum())
print(json.dumps(total), flush=True)
for _ in sys.stdin:
    sizes,mine = {}, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]: mine = line.rstrip().endswith("model.safetensors")
        elif mine and line.startswith(("Rss:","Pss:","Private_")):
            name,kilobytes = line.split()[:2]
            sizes[name[:-1]] = sizes.get(name[:-1], 0)+int(kilobytes)*1024
    print(json.dumps(sizes), flush=True)"""

def save(folder):
    from nanogpt.checkpoint import save_model
    from nanogpt.model import GPT, GPTConfig
    from nanogpt.tokenizer import Tokenizer
    torch.manual_seed(0)
    tok = Tokenizer.train(["the cat sat on the mat. the cat ran."]*3, 280)
    save_model(folder/"model", GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=5, n_head=4, n_embd=384)), tok) # 36 MB: not small
    return (folder/"model/model.safetensors").stat().st_size

def pair(folder, dtype, env):
    "What two processes that have both answered hold of the file, in bytes, and what they said."
    words = [sys.executable, "-c", CHILD, str(folder), dtype]
    people = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    try:
        said = [json.loads(p.stdout.readline()) for p in people]          # both have read all of it
        for p in people: print(file=p.stdin, flush=True)
        return said, [json.loads(p.stdout.readline()) for p in people]
    finally:
        for p in people: p.kill(); p.communicate()

@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell which pages are shared")
def test_processes_share_the_pages(tmp_path, env):
    "In float32 the whole file is in both, once in memory; in 16 bits (the control) nothing of it is left to share."
    size = save(tmp_path)
    said, held = pair(tmp_path, "float32", env)
    assert said[0]==said[1]
    for h in held: assert h["Rss"]>.95*size and h["Pss"]<.6*h["Rss"] and h["Private_Dirty"]==0
    _, held = pair(tmp_path, "bfloat16", env)
    for h in held: assert h.get("Pss", 0)<.05*size

def test_what_is_trained_stays_at_home(tmp_path):
    "A model that was mapped can be trained: its pages become its own, and the file keeps its sha256."
    from nanogpt.checkpoint import load_model, verify
    save(tmp_path)
    model, _ = load_model(tmp_path)
    opt = torch.optim.SGD(model.parameters(), .1)
    before = model.lm_head.weight.clone()
    loss, n = model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    (loss/n).backward()
    opt.step()
    assert not torch.equal(before, model.lm_head.weight) and model.lm_head.weight is model.transformer.wte.weight
    verify(tmp_path/"model")

def test_loading_draws_nothing(tmp_path):
    "Loading leaves the random generators as they were: numbers that come from a file need not be drawn first."
    from nanogpt.checkpoint import load_model
    save(tmp_path)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    load_model(tmp_path)
    assert torch.equal(state, torch.get_rng_state())

def test_row_alone_and_cached_in_16_bits(tmp_path):
    "With weights in 16 bits greedy text is the same with the cache as without it, and a row's does not depend on its neighbours."
    from nanogpt.knobs import SampleConfig
    from nanogpt.ready import load_ready
    from nanogpt.sample import complete
    save(tmp_path)
    model, tok = load_ready(tmp_path, "cpu", "bfloat16")
    cfg = SampleConfig(temperature=0, max_tokens=6)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]
    two, other = complete(model, tok, prompts[:2], cfg), complete(model, tok, prompts[1:], cfg)
    assert two[1].ids==other[0].ids
    for p, c in zip(prompts[:2], two, strict=True):
        with torch.inference_mode(): scores = model(torch.tensor([[*p, *c.ids]]))[0, len(p)-1:-1, :tok.n_vocab]
        chosen = scores.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        assert (scores.max(-1).values-chosen < .02*scores.std()).all()    # the best, or as good as it: roundings differ

def test_threads_take_turns():
    "One row goes around a library by a switch of the whole process: another thread's products meet it as it was."
    from threading import Thread

    from nanogpt.ready import Narrow
    torch.manual_seed(0)
    linear = Narrow(torch.nn.Linear(512, 512).bfloat16())
    x = {rows: torch.randn(rows, 512) for rows in (1, 16)}
    alone, seen = {rows: linear(o) for rows, o in x.items()}, []
    def work(rows):
        for _ in range(300): seen.append(torch.equal(linear(x[rows]), alone[rows]))
    before = torch.backends.mkldnn.enabled
    people = [Thread(target=work, args=(rows,)) for rows in (1, 16, 1, 16)]
    for t in people: t.start()
    for t in people: t.join()
    assert len(seen)==1200 and all(seen) and torch.backends.mkldnn.enabled==before

PEAK = """import json, sys, torch
from nanogpt.cache import PIECE
from nanogpt.core import peak_memory_bytes
from nanogpt.knobs import SampleConfig
from nanogpt.memory import give_back, resident_bytes
from nanogpt.model import GPT, GPTConfig
from nanogpt.quant import quantize
from nanogpt.ready import narrow, packed
from nanogpt.sample import Decoder
from nanogpt.tokenizer import Tokenizer
from nanogpt.window import batch_bytes
from random import Random
kind,rows,copy = sys.argv[1], int(sys.argv[2]), sys.argv[3]=="copy"
give_back()
tok = Tokenizer.train(["the cat sat on the mat. the cat ran."]*3, 280)
model = GPT(GPTConfig(vocab_size=4096, block_size=PIECE+4, n_layer=4, n_head=8, n_embd=512))
model = quantize(model, kind) if "int" in kind else narrow(model, getattr(torch, kind))
def go(rows, T): Decoder(model, tok, [[1+k]*(T-k) for k in range(rows)], [SampleConfig(max_tokens=4)]*rows, [Random(0)]*rows).step()
go(2, 8)                                                            # what libraries take once
before = peak_memory_bytes()
with packed(model, rows if copy else 1, 10**12): go(rows, PIECE)
print(json.dumps(dict(took=peak_memory_bytes()-before, said=batch_bytes(model, rows, PIECE+4))))"""

def took(env, *words):
    "What a batch took beside the model in a process of its own, and what was said of it, in bytes."
    words = [sys.executable, "-c", PEAK, *map(str, words)]
    return json.loads(subprocess.run(words, capture_output=True, text=True, env=env, check=True).stdout)

@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell how much was held at most")
def test_a_batch_needs_what_is_said(env):
    "The memory of reading prompts and of a step, in a process of its own; the control: keys and values alone would be far too little."
    plain, whole, copy = took(env, "bfloat16", 8, "plain"), took(env, "int8-dynamic", 6, "plain"), took(env, "bfloat16", 8, "copy")
    for o in (plain, whole): assert .6*o["said"]<o["took"]<1.1*o["said"], o
    assert plain["took"]>1.5*2*4*512*8*512*4                            # keys and values alone
    assert .8*(weights := 2*(4*12*512**2+4096*512))<copy["took"]-plain["took"]<1.5*weights # a packed copy is as large as is said
