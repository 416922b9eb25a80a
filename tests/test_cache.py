"The cache against the whole text for every family of weights, after anything that can happen to it; and what a step costs."
import random

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanogpt.attention import KERNELS
from nanogpt.cache import KVCache, read
from nanogpt.core import ShapeError
from nanogpt.model import GPT
from nanogpt.weights import read_config

V, T = 96, 40
LLAMA = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=64, rms_norm_eps=1e-5)
FAMILIES = dict(gpt2=dict(model_type="gpt2", vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4),
                llama=dict(model_type="llama", **LLAMA), mistral=dict(model_type="mistral", **LLAMA | dict(num_key_value_heads=1)),
                glm=dict(model_type="glm", **LLAMA, head_dim=8, partial_rotary_factor=.5, attention_bias=True))

@pytest.fixture(params=FAMILIES)
def model(request):
    "Every parameter random, biases and norms too."
    torch.manual_seed(0)
    cfg = read_config(FAMILIES[request.param])[1]
    assert cfg.kv_heads==(4 if request.param=="gpt2" else FAMILIES[request.param]["num_key_value_heads"])
    model = GPT(cfg).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=.15)
    return model

@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(1)
    with torch.no_grad(): yield

def near(a, b): assert_close(a, b, rtol=0, atol=1e-5)             # float32: a few last bits
def draw(n): return torch.randint(V, (n,)).tolist()

# ---- cached = uncached -----------------------------------------------------------------------------------------------

def test_in_pieces_and_one_by_one(model):
    idx, cache = torch.randint(V, (3, T)), KVCache(model.cfg, 3, T)
    sizes = [7, 1, 1, 12, *[1]*(T-21)]
    near(torch.cat([model(part, cache) for part in idx.split(sizes, 1)], 1), model(idx))
    assert cache.k.shape==(2, 3, model.cfg.kv_heads, T, 8)        # shared heads are kept once

@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_to_the_rows(model, seed):
    "Ragged prompts in pieces; then steps, roll backs, rows that change places, leave or are copied, in any order."
    rng = random.Random(seed)
    texts = [draw(rng.randint(1, 14)) for _ in range(4)]
    cache = KVCache(model.cfg, 4, 60)
    h = read(model, texts, cache, chunk=rng.choice((1, 3, 5, 100)))
    for b, ids in enumerate(texts): near(h[b], model.hidden(torch.tensor([ids]))[0, -1])
    for _ in range(14):
        do, B = rng.choice(("step", "step", "rollback", "reorder", "take")), len(texts)
        if do=="rollback":
            back = [rng.randint(0, min(3, len(o)-1)) for o in texts]
            cache.rollback(back)
            texts = [o[:len(o)-k] for o, k in zip(texts, back, strict=True)]
        if do=="reorder":
            rows = [rng.randrange(B) for _ in range(B-(B>2 and rng.random()<.3))]
            cache.reorder(rows)
            texts = [list(texts[r]) for r in rows]
        if do=="take":
            rows = [rng.randrange(B) for _ in range(rng.choice((B, 4)))]
            cache, texts = cache.take(torch.tensor(rows), 60), [list(texts[r]) for r in rows]
        new = [draw(rng.randint(1, 3))]*len(texts) if do=="step" else [draw(1) for _ in texts]
        logits, texts = model(torch.tensor(new), cache), [a+b for a, b in zip(texts, new, strict=True)]
        assert cache.n.tolist()==[len(o) for o in texts] and cache.top==max(map(len, texts))
        for b, ids in enumerate(texts): near(logits[b], model(torch.tensor([ids]))[0, -len(new[b]):])

@pytest.mark.parametrize("lengths", [[9, 9], [9, 5]], ids=["even", "ragged"])
def test_what_was_rolled_back_leaves_no_trace(model, lengths):
    "Whatever was guessed, and even if its keys had been enormous: the same bits afterwards."
    idx, outs = torch.randint(V, (2, 16)), []
    for guess in (torch.randint(V, (2, 4)), torch.randint(V, (2, 4)), None):
        cache = KVCache(model.cfg, 2, 20)
        model(idx[:, :9], cache)
        cache.set_lengths(lengths)
        model(torch.randint(V, (2, 4)) if guess is None else guess, cache)
        cache.rollback(4)
        if guess is None:
            for b, n in enumerate(lengths): cache.k[:, b, :, n:], cache.v[:, b, :, n:] = 1e4, -1e4
        outs.append(torch.cat([model(idx[:, 9:10], cache), model(idx[:, 10:13], cache)], 1))
    for o in outs[1:]: assert torch.equal(outs[0], o)
    for b, n in enumerate(lengths): near(outs[0][b], model(torch.cat([idx[b, :n], idx[b, 9:13]])[None])[0, -4:])

def test_refusals(model):
    cache = KVCache(model.cfg, 2, 10)
    model(torch.randint(V, (2, 4)), cache)
    for count in (5, -1, [0, 5]):
        with pytest.raises(ShapeError, match="cannot forget"): cache.rollback(count)
    with pytest.raises(ShapeError, match=r"take\(rows, length\)"): cache.reorder([0, 1, 1])
    with pytest.raises(ShapeError, match="exceed the cache's 10"): read(model, [[1]*7, [2]], cache)
    assert cache.n.tolist()==[4, 4]

# ---- what a step costs -----------------------------------------------------------------------------------------------

class Bytes(TorchDispatchMode):
    "Counts the bytes that operations write: new tensors, and what is written in place; views are free."
    def __init__(self): super().__init__(); self.made, self.largest = 0, 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f.is_view: return out
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(o, torch.Tensor): continue
            written = args[2].nbytes if f.overloadpacket.__name__=="index_put_" else o.nbytes # it returns the whole room
            self.made, self.largest = self.made+written, max(self.largest, written)
        return out

def cost(model, f):
    "Operations of a call, with attention written out, for the counter does not know the fused kernel; and bytes, with the fused one."
    kernel = lambda name: [setattr(b.attn, "kernel", KERNELS[name]) for b in model.transformer.h]
    kernel("written")
    with FlopCounterMode(display=False) as ops: f()
    kernel("fused")
    with Bytes() as bytes: f()
    return ops.get_total_flops(), bytes.made

def step_costs(model, lengths, make=KVCache):
    "For a step after n tokens, for each n: its operations, and the bytes it writes. Rows are even, or one is shorter."
    out = []
    for n in lengths:
        def once(ragged, n=n):
            cache = make(model.cfg, 2, 64)
            cache.set_lengths([n, n-ragged])
            return cost(model, lambda: (model(torch.tensor([[1], [2]]), cache), cache.rollback(1)))
        out.append([once(0), once(3)])
    return out

def growth(model, make=KVCache):
    "Operations and bytes that one more place in the text adds to a step, for rows that are even and rows that are not."
    a, b, c = step_costs(model, (10, 20, 50), make)
    slope = lambda x, y, places: [[(q-p)/places for p, q in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)]
    assert slope(a, b, 10)==slope(b, c, 30)                         # a straight line
    return slope(a, b, 10)

def test_a_step_costs_the_same_but_for_attention(model):
    "Per place in the text: one product with its key and one with its value for every head, and no byte of it is copied."
    cfg = model.cfg
    for ops, bytes in growth(model):
        assert ops==2*2*2*cfg.n_embd*cfg.n_layer                   # 2 rows; 2 products; a multiply-add is two operations
        assert bytes<=2*6*cfg.n_head*cfg.n_layer+16                # the table of who sees whom: a few bytes a head, far less than a key

class Copying(KVCache):
    "A control: what a cache costs that is put together anew for every step."
    def extend(self, layer, k, v): return *(o.clone() for o in super().extend(layer, k, v)[:2]), self.see

def test_control_a_copying_cache_is_seen(model):
    cfg = model.cfg
    assert all(bytes>=2*2*cfg.kv_heads*cfg.head_width*4*cfg.n_layer for _, bytes in growth(model, Copying))

def test_reorder_moves_only_what_differs(model):
    cache, place = KVCache(model.cfg, 1, 64), 2*2*model.cfg.kv_heads*8*4 # bytes of one place in one row, all layers
    model(torch.randint(V, (1, 30)), cache)
    beams = cache.take(torch.tensor([0]*4), 64)
    for _ in range(3): model(torch.randint(V, (4, 1)), beams)
    home = beams.k.data_ptr()
    def moved(rows):
        with Bytes() as bytes: beams.reorder(rows)
        return bytes.made
    assert moved([0, 1, 2, 3])<100                                 # nothing but a comparison
    assert 2*3*place<moved([0, 1, 2, 0])<2*3*place+2000            # one row, three places: read once and written once
    assert 0<moved([3, 1, 2, 0])<2000                              # they are the same row: nothing is left to move
    model(torch.randint(V, (4, 1)), beams)
    assert 2*2*place<moved([3, 1, 2, 0])<2*2*place+2000            # two rows, the one place in which they differ
    assert beams.k.data_ptr()==home and beams.k.size(3)==64        # in place

def test_a_long_prompt_needs_the_room_of_a_piece(model):
    "The largest tensor of a chunked prefill does not grow with the prompt, but for the table of who sees whom."
    def largest(n, chunk):
        cache = KVCache(model.cfg, 1, 64)
        with Bytes() as bytes: read(model, [draw(n)], cache, chunk)
        return bytes.largest
    table = 4*model.cfg.n_head//model.cfg.kv_heads*6*60            # bytes: a number for each query of a piece and each key
    assert largest(60, 6)<=max(largest(6, 6), table)
    assert largest(60, 6)<.5*largest(60, 60) and largest(30, 30)<largest(60, 60)
