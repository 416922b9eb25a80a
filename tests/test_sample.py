"What the lessons on templates, sampling and the terminal cannot show: a large vocabulary, other processes, a real Ctrl-C."
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt import knobs, rules
from nanogpt.cache import KVCache
from nanogpt.core import CheckpointError, ConfigError, DataError
from nanogpt.corpus import conversations
from nanogpt.knobs import Knobs, SampleConfig, choose, top_p, warp
from nanogpt.model import GPT, GPTConfig
from nanogpt.sample import complete, generate, stream, streams
from nanogpt.settings import parse, settings
from nanogpt.template import Template, shard_rows
from nanogpt.terminal import Chat, chat_terminal
from nanogpt.tokenizer import Tokenizer
from nanogpt.window import Window, batch_bytes, staying

@pytest.fixture(scope="module")
def tok(): return Tokenizer.train(["the cat sat on the mat and the naïve rat ran. 猫 "*9], 300)

def toy(tok, position="rotary", seed=0, **more):
    "A random model with decided opinions: its scores are spread wide, so that greedy has no near ties."
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(vocab_size=tok.n_vocab+4, block_size=48, n_layer=2, n_head=2, n_embd=32, position=position) | more))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4) if p.dim()>1 else None
    return model.eval()

def prompts(tok, n, rng): return [[rng.randrange(tok.eot) for _ in range(rng.randint(1, 30))] for _ in range(n)]

def rules_slowly(scores, cfg, tok, ids, out):
    "Everything that is said of the scores before the dice, token by token."
    special = set(tok.specials.values())
    text = lambda some: b"".join(b"" if i in special else tok.decode_bytes([i]) for i in some)
    for push in cfg.logit_bias: scores[int(push.split(":")[0])] += float(push.split(":")[1])
    for i in set(ids)-special:
        if cfg.repetition_penalty!=1: scores[i] = scores[i]/cfg.repetition_penalty if scores[i]>0 else scores[i]*cfg.repetition_penalty
    for i, c in Counter(out).items(): scores[i] -= c*cfg.frequency_penalty+cfg.presence_penalty
    n = cfg.no_repeat_ngram
    grams = {tuple(ids[k:k+n]) for k in range(len(ids)-n+1)} if n else ()
    tail = text(ids[max((k+1 for k, i in enumerate(ids) if i in special), default=0):])
    for i in range(tok.n_vocab):
        gram = (*ids[len(ids)-n+1:], i)
        if gram in grams and not special & set(gram): scores[i] = -torch.inf
        for word in map(str.encode, cfg.bad_words):
            if word in (tail[-len(word)+1:] if len(word)>1 else b"")+text([i]): scores[i] = -torch.inf
        if i in special and len(out)<cfg.min_tokens: scores[i] = -torch.inf
    return scores

@torch.no_grad()
def slowly(model, tok, ids, cfg, dice):
    "The whole sampler by its definition: no cache, no batch, one sorted list a token."
    ids, out, block = list(ids), [], model.cfg.block_size
    window = list(ids)
    while len(out)<cfg.max_tokens and (len(window)<=block or cfg.overflow=="slide"):
        if len(window)>block: window = window[-staying(block):]
        scores = rules_slowly(model(torch.tensor([window]))[0, -1, :tok.n_vocab].double(), cfg, tok, ids, out)
        if cfg.temperature==0: best = int(scores.argmax())
        else:
            scores = scores/cfg.temperature
            rank = scores.argsort(descending=True).tolist()[:cfg.top_k]
            probs, mass, kept = scores[rank].softmax(0).tolist(), 0., set()
            for i, q in zip(rank, probs, strict=True):
                kept.add(i)
                mass += q
                if mass>=(cfg.top_p or 2): break
            kept = {i for i in kept if scores[i].exp()>=(cfg.min_p or 0)*scores.max().exp()}
            weights = [float(scores[i].exp()) if i in kept else 0. for i in range(tok.n_vocab)]
            best, dart = 0, dice.random()*sum(weights)
            while dart>=weights[best]: dart -= weights[best]; best += 1
        if best in tok.specials.values(): break
        for o in (ids, out, window): o.append(best)
    return tuple(out)

KNOBS = [dict(temperature=0), dict(temperature=0, repetition_penalty=1.3), dict(), dict(temperature=1.3, top_k=7),
         dict(temperature=1., top_p=.6), dict(temperature=1.2, top_k=30, top_p=.9, repetition_penalty=1.2),
         dict(temperature=1.3, min_p=.2, overflow="slide"), 
         dict(temperature=1., frequency_penalty=3., presence_penalty=2., min_tokens=25, overflow="slide"),
         dict(temperature=0, no_repeat_ngram=2), dict(temperature=1.2, bad_words=("a", "he "), logit_bias=("97:-inf", "98:6.5"))]

# ---- one sampler -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_equals_the_definition_alone_and_in_every_batch(tok, knobs, position):
    model, rng = toy(tok, position), random.Random(3)
    cfg, asked = SampleConfig(max_tokens=30, **knobs), prompts(tok, 9, random.Random(4))
    alone = [complete(model, tok, [p], cfg)[0] for p in asked]
    for p, o in zip(asked, alone, strict=True):
        assert o.ids==slowly(model, tok, p, cfg, random.Random(f"0 0 {tuple(p)}"))
        assert o.text==tok.decode(o.ids)
    for rows in (2, 5, 64):
        order = rng.sample(range(9), 9)
        batch = complete(model, tok, [asked[k] for k in order], cfg, rows=rows)
        assert batch==[alone[k] for k in order]

def test_each_row_has_its_own_settings(tok):
    "All settings in one batch, several answers to some prompts: every answer is the one it would be alone."
    model, asked = toy(tok), prompts(tok, len(KNOBS), random.Random(8))
    cfgs = [SampleConfig(max_tokens=10+3*k, seed=k%3, n=1+k%2*bool(o.get("temperature", 1)), **o) for k, o in enumerate(KNOBS)]
    alone = [o for p, c in zip(asked, cfgs, strict=True) for o in complete(model, tok, [p], c)]
    for rows in (4, 64): assert complete(model, tok, asked, cfgs, rows=rows)==alone
    order = random.Random(1).sample(range(len(asked)), len(asked))
    mixed = complete(model, tok, [asked[k] for k in order], [cfgs[k] for k in order])
    at = lambda k: sum(c.n for c in cfgs[:k])
    assert mixed==[o for k in order for o in alone[at(k):at(k)+cfgs[k].n]]
    several = streams(model, tok, asked, cfgs)
    text = [""]*len(alone)
    for k, letters in several: text[k] += letters
    assert text==[o.text for o in alone]

def test_many_answers_to_one_prompt_have_the_models_own_frequencies(tok):
    model, n, ask = toy(tok), 3000, [1, 2, 3]
    with torch.no_grad():
        for p in model.parameters(): p.mul_(.6)
        q = (model(torch.tensor([ask]))[0, -1, :tok.n_vocab].double()/.8).softmax(0)
    got = Counter(o.ids[0] if o.ids else None for o in complete(model, tok, [ask]*n, SampleConfig(max_tokens=1), rows=1000))
    for i in q.topk(8).indices.tolist():  # five standard deviations
        if i not in tok.specials.values(): assert abs(got[i]/n-q[i])<5*(q[i]*(1-q[i])/n)**.5

def test_large_vocabulary_keeps_the_smallest_set():
    torch.manual_seed(0)
    for spread in (.5, 3., 12.):
        wide = torch.randn(2, 50304)*spread
        for p in (.05, .5, .95):
            probs, at = wide.double().softmax(-1).sort(-1, descending=True)
            for row in range(2):
                size = int((probs[row].cumsum(0)<p).sum())+1
                kept = top_p(wide, p)[row].isfinite()
                assert abs(int(kept.sum())-size)<=max(1, size//2000)  # float32 sums of thousands of terms round at the border
                assert kept[at[row, :size-size//2000-1]].all()

def test_a_dart_never_hits_what_has_no_chance():
    torch.manual_seed(0)
    for _ in range(200):
        scores = warp(torch.randn(3, 4000)*8, SampleConfig(temperature=1.5, top_k=3))
        u = torch.tensor([[0.], [random.random()], [1-2**-53]], dtype=torch.float64)
        assert scores.gather(1, choose(scores, u)[:, None]).isfinite().all()

# ---- every step, beside transformers' --------------------------------------------------------------------------------

def processors():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")
    from transformers.generation import logits_process
    return logits_process

def table(said, V):
    counts = torch.zeros(len(said), V)
    return counts.scatter_add_(1, said, torch.ones_like(said, dtype=counts.dtype))

STEPS = {
    "temperature": (lambda x, said, v: knobs.temperature(x, v), "TemperatureLogitsWarper", (.5, .9, 1.7)),
    "top_k": (lambda x, said, v: knobs.top_k(x, v), "TopKLogitsWarper", (1, 5, 40)),
    "top_p": (lambda x, said, v: knobs.top_p(x, v), "TopPLogitsWarper", (.05, .6, .95)),
    "min_p": (lambda x, said, v: knobs.min_p(x, v), "MinPLogitsWarper", (.01, .2, .9)),
    "repetition_penalty": (lambda x, said, v: rules.repetition_penalty(x, table(said, x.size(1))>0, v),
                           "RepetitionPenaltyLogitsProcessor", (.7, 1.2, 3.)),
    "no_repeat_ngram": (lambda x, said, v: rules.no_repeat_ngram(x, said, v), "NoRepeatNGramLogitsProcessor", (1, 2, 3)),
}

@pytest.mark.parametrize("name", STEPS)
def test_step_equals_transformers(name):
    "On random scores of both signs and random pasts with repeats; and all settings at once, as a column."
    ours, theirs, values = STEPS[name]
    theirs, g = getattr(processors(), theirs), torch.Generator().manual_seed(0)
    for spread in (.5, 3., 10.):
        x = torch.randn(3, 60, generator=g, dtype=torch.float64)*spread
        said = torch.randint(0, 6, (3, 25), generator=g)
        assert (x<0).any() and (x>0).any()
        for v in values: torch.testing.assert_close(ours(x, said, v), theirs(v)(said, x.clone()), rtol=1e-12, atol=1e-12)
        rows = [theirs(v)(said[i:i+1], x[i:i+1].clone()) for i, v in enumerate(values)]
        column = torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)[:, None]
        torch.testing.assert_close(ours(x, said, column), torch.cat(rows), rtol=1e-12, atol=1e-12)
    wrong = theirs(values[0])(said, x.clone())
    assert not torch.equal(ours(x, said, values[1]), wrong)  # the comparison can fail

def test_plain_division_is_not_transformers_penalty():
    "The control: the usual mistake with negative scores does not pass."
    x, said = torch.tensor([[2., -2., 1.]]), torch.tensor([[0, 1]])
    right = processors().RepetitionPenaltyLogitsProcessor(2.)(said, x.clone())
    assert right.tolist()==[[1., -4., 1.]] and not torch.equal(torch.where(table(said, 3)>0, x/2, x), right)

def test_all_knobs_equal_transformers_chain():
    "Bytes as vocabulary: then a bad word is one row of ids, and whole answers go through both chains, step by step."
    P, tok = processors(), Tokenizer.train(["."], 261)
    special, rng = sorted(tok.specials.values()), random.Random(0)
    g, prompt = torch.Generator().manual_seed(0), list(b"abcabd")
    cfg = SampleConfig(temperature=.8, top_k=50, top_p=.9, min_p=.01, repetition_penalty=1.3, no_repeat_ngram=3,
                       bad_words=("ab", "c", "dab"), min_tokens=5, logit_bias=("98:1.5", "e:-inf"))
    theirs = P.LogitsProcessorList([
        P.SequenceBiasLogitsProcessor({(98,): 1.5, (101,): -torch.inf}), P.RepetitionPenaltyLogitsProcessor(1.3),
        P.NoRepeatNGramLogitsProcessor(3), P.NoBadWordsLogitsProcessor([list(o.encode()) for o in cfg.bad_words]),
        P.MinNewTokensLengthLogitsProcessor(len(prompt), 5, special, device="cpu"),
        P.TemperatureLogitsWarper(.8), P.TopKLogitsWarper(50), P.TopPLogitsWarper(.9), P.MinPLogitsWarper(.01)])
    ours, ids, ended = Knobs([cfg], [prompt], tok), list(prompt), set()
    for step in range(25):
        x = torch.randn(1, 261, generator=g)*3
        x[0, special] += 8
        mine, right = ours(x), theirs(torch.tensor([ids]), x.clone())
        assert torch.equal(mine.isfinite(), right.isfinite()), step
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        ended.add((step<5, bool(mine[0, special].isfinite().any())))
        ids.append(rng.choice(list(b"abcdef")))
        ours.push(torch.tensor(ids[-1:]))
    assert ended=={(True, False), (False, True)}  # no end before five tokens, and then it may

def test_frequency_and_presence_count_the_answer_alone(tok):
    "By the published formula: c·frequency, and presence where c > 0; the prompt is not counted."
    cfg = SampleConfig(temperature=1., frequency_penalty=.7, presence_penalty=-.3)
    k, x = Knobs([cfg], [[5, 5, 6]], tok), torch.randn(1, tok.n_vocab)
    assert torch.equal(k(x), x)
    for i in (7, 5, 7): k.push(torch.tensor([i]))
    want = x.clone()
    want[0, 7] -= 2*.7-.3
    want[0, 5] -= .7-.3
    torch.testing.assert_close(k(x), want)

def test_a_bad_word_never_comes_wherever_tokens_end(tok):
    "What forbids one row of ids lets the same letters through in other pieces; a ban on bytes does not."
    word = "the cat"
    ids = tok.encode(word)
    other = list(word.encode())  # the same text, byte by byte
    assert ids!=other and tok.decode(other)==word
    x = torch.zeros(1, tok.n_vocab)
    rest = processors().NoBadWordsLogitsProcessor([ids])(torch.tensor([other[:-1]]), x.clone())
    assert rest[0, other[-1]]==0
    assert Knobs([SampleConfig(temperature=1., bad_words=(word,))], [other[:-1]], tok)(x)[0, other[-1]]==-torch.inf
    model = toy(tok)
    for words in (("a",), ("e", "t"), ("he", " c", "na")):
        for o in complete(model, tok, [[7], [97, 98]]*4, SampleConfig(temperature=1.5, max_tokens=30, bad_words=words)):
            assert not any(w in o.text for w in words), (words, o.text)

def test_neutral_knobs_cost_nothing(tok):
    x = torch.randn(2, tok.n_vocab)
    for cfg in (SampleConfig(temperature=1.), SampleConfig(temperature=0)):
        k = Knobs([cfg]*2, [[1], [2]], tok)
        assert k(x) is x and k.seen is k.counts is k.said is k.bias is None and not k.words
    assert Knobs([SampleConfig(temperature=0), SampleConfig()], [[1], [2]], tok)(x) is not x

# ---- what the loop promises ------------------------------------------------------------------------------------------

def test_logprobs_are_the_models_own(tok):
    "Read once more without a cache: the same numbers, whatever the knobs."
    model, asked = toy(tok), prompts(tok, 4, random.Random(2))
    with torch.no_grad(): model.lm_head.weight.mul_(.3)
    for more in (dict(), dict(temperature=0), dict(top_k=2, repetition_penalty=2., bad_words=("a",))):
        for p, o in zip(asked, complete(model, tok, asked, SampleConfig(max_tokens=15, logprobs=2, **more)), strict=True):
            with torch.no_grad(): logs = model(torch.tensor([[*p, *o.ids]]))[0, len(p)-1:, :tok.n_vocab].log_softmax(-1)
            assert len(o.logprobs)==len(o.ids)
            for (own, best), i, row in zip(o.logprobs, o.ids, logs, strict=False):
                assert abs(own-row[i])<1e-3 and [j for j, _ in best]==row.topk(2).indices.tolist()

def test_too_much_for_the_memory_is_refused_before_work(tok, monkeypatch):
    from nanogpt import sample, window
    model = toy(tok)
    need = batch_bytes(model, 8, 31)
    monkeypatch.setattr(window, "resident_bytes", lambda: 10**9)
    monkeypatch.setattr(sample, "Decoder", None)  # nothing may begin
    monkeypatch.setattr(window, "machine_memory", lambda device: 10**9+need-1)
    cfg = SampleConfig(max_tokens=30, n=8)
    with pytest.raises(ConfigError, match="8 answers of up to 31 tokens") as e: complete(model, tok, [[1]], cfg)
    assert "rows=7" in e.value.fix
    with pytest.raises(TypeError): complete(model, tok, [[1]], cfg, rows=7)  # that many fit: work begins

def test_memory_left_over_from_others_does_no_harm(tok, monkeypatch):
    "A cache is made of memory as it comes; with NaN in it, the places that a short row has not written yet must not matter."
    model, asked = toy(tok), [[1], [2]*20, [3]*7]
    cfg = SampleConfig(max_tokens=20, temperature=1.)
    fine = complete(model, tok, asked, cfg)
    empty = torch.empty
    def dirty(*size, **more):
        t = empty(*size, **more)
        return t.fill_(float("nan")) if t.is_floating_point() else t
    monkeypatch.setattr(torch, "empty", dirty)
    assert complete(model, tok, asked, cfg)==fine

def test_a_full_context_ends_its_own_row_only(tok):
    model, cfg = toy(tok, seed=1), SampleConfig(max_tokens=40, temperature=1.)
    asked = [[1]*48, [1]*47, [2]*30, [3], [4]*44]
    out = complete(model, tok, asked, cfg)
    for p, o in zip(asked, out, strict=True):
        assert o==complete(model, tok, [p], cfg)[0]
        if o.reason=="context": assert len(p)+len(o.ids)==49  # the last one is never read again
        if o.reason=="length": assert len(o.ids)==40
    assert out[0].reason in ("context", "end") and out[0].ids[1:]==()

def test_stream_joined_is_generate_with_stops_and_broken_letters(tok):
    rng = random.Random(0)
    for seed in range(4):
        model = toy(tok, seed=seed)
        for stop in ((), ("a",), ("th", "e c"), ("\ufffd",), ("xyzzy", "zz")):
            cfg = SampleConfig(max_tokens=25, temperature=1.4, stop=stop, seed=seed)
            p = prompts(tok, 1, rng)[0]
            text, = generate(model, tok, [p], cfg)
            parts = list(stream(model, tok, p, cfg))
            assert "".join(parts)==text and not any(s in text for s in stop)
            free, = generate(model, tok, [p], replace(cfg, stop=()))
            assert free.startswith(text)

def test_specials_are_never_penalised(tok):
    "A chat's prompt is full of <|end|>; a penalty on it would make answers endless."
    model, end = toy(tok), tok.specials["<|end|>"]
    scores = torch.zeros(1, tok.n_vocab)
    scores[0, 7], scores[0, end] = 1., 2.
    class Fixed(torch.nn.Module):
        def forward(self, h): return scores.expand(len(h), -1)
    model.lm_head = Fixed()
    cfg = SampleConfig(temperature=0, max_tokens=9, repetition_penalty=50.)
    assert complete(model, tok, [[end, 5]], cfg)[0].ids==()

def test_the_same_text_in_another_process(tok, tmp_path, env):
    tok.save(tmp_path/"tokenizer.json")
    code = f"""
import json, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_sample import toy
from nanogpt.knobs import SampleConfig
from nanogpt.sample import generate
from nanogpt.tokenizer import Tokenizer
tok = Tokenizer.load({str(tmp_path/'tokenizer.json')!r})
print(json.dumps(generate(toy(tok), tok, [[1, 2], [3]], SampleConfig(temperature=1., max_tokens=20))))"""
    outs = [subprocess.run([sys.executable, "-c", code], env=env | {"PYTHONHASHSEED": s}, capture_output=True, text=True) for s in "12"]
    here = generate(toy(tok), tok, [[1, 2], [3]], SampleConfig(temperature=1., max_tokens=20))
    assert [json.loads(o.stdout or "null") for o in outs]==[here, here], outs[0].stderr

def test_bfloat16_and_leftovers(tok):
    model = toy(tok).bfloat16().train()
    out = complete(model, tok, [[1], [2]*9], SampleConfig(max_tokens=5))
    assert len(out)==2 and model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad(): model.lm_head.weight[tok.eot:] = 0  # never the best: the answer goes on
    half = stream(model, tok, [1], SampleConfig(temperature=0))
    assert next(half)
    half.close()
    assert model.training and not torch.is_inference_mode_enabled()

def test_refusals(tok):
    model = toy(tok)
    cfg = SampleConfig(max_tokens=3)
    with pytest.raises(DataError, match="prompt 1 is empty"): complete(model, tok, [[1], []], cfg)
    with pytest.raises(ValueError, match="49 tokens, the context is 48"): stream(model, tok, [1]*49, cfg)
    with pytest.raises(ConfigError, match="the tokenizer has"): generate(model, Tokenizer.gpt2(), [[1]], cfg)
    odd = replace(cfg, stop=("<|user>", "<|usr|>"))
    with pytest.raises(ConfigError, match="no token of this vocabulary") as e: stream(model, tok, [1], odd)
    assert "<|user|>" in e.value.fix
    with pytest.raises(ConfigError, match="is 3 tokens"): complete(model, tok, [[1]], replace(cfg, logit_bias=("qzx:1",)))
    with pytest.raises(ConfigError, match="2 prompts but 1 settings"): complete(model, tok, [[1], [2]], [cfg])
    assert len(complete(model, tok, [[1]*49], replace(cfg, overflow="slide"))[0].ids)<=3
    endless = type(tok)(tok.ranks, tok.n_vocab, tok.recipe)
    endless.specials = {}
    with pytest.raises(ConfigError, match="no token that ends an answer"): complete(model, endless, [[1]], cfg)
    with torch.no_grad(): model.lm_head.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="scores are not finite after 0 tokens"): generate(model, tok, [[1]], cfg)
    with torch.no_grad(): model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"): generate(model, tok, [[1]], cfg)

def test_settings_are_flags():
    cfg = parse(SampleConfig, ["--temperature=0", "--top_k", "5", "--top_p", "none", "--stop", "a,b"])
    assert (cfg.temperature, cfg.top_k, cfg.top_p, cfg.stop)==(0., 5, None, ("a", "b"))
    assert parse(SampleConfig, [f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in settings(cfg).items()])==cfg
    with pytest.raises(ConfigError, match="try --temperature 0.8"): parse(SampleConfig, ["--temperature=-1"])

# ---- templates on real rows ------------------------------------------------------------------------------------------

def test_all_of_dolly_becomes_rows(data_home, capsys):
    tok = Tokenizer.gpt2()
    template = Template(tok)
    talks = list(islice(conversations("dolly"), 3000))
    rows = list(shard_rows(talks, template))
    left = capsys.readouterr().err
    assert len(rows)>.99*len(talks) and (len(rows)==len(talks) or f"of {len(talks):,} conversations" in left)
    for ids, mask in rows[:200]:
        learnt = [i for i, m in zip(ids, mask, strict=True) if m]
        assert learnt.count(template.end)==1 and learnt[-1]==template.end and ids.count(template.marks["assistant"])==1

# ---- a long prompt -----------------------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    "The bytes of the largest tensor that is made."
    def __init__(self):
        super().__init__()
        self.bytes = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        made = out if isinstance(out, (tuple, list)) else [out]
        self.bytes = max(self.bytes, *(o.nbytes for o in made if isinstance(o, torch.Tensor)), 0)
        return out

@torch.inference_mode()
def test_a_long_prompt_is_read_in_bounded_room():
    "The largest tensor belongs to a piece of 512 tokens; the control, which reads all at once, needs several times as much."
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=4000, n_layer=1, n_head=2, n_embd=128, position="rotary")).eval()
    text = torch.randint(50, (3990,)).tolist()
    with Largest() as pieces: h = Window(model, [text], [10]).h
    with Largest() as at_once: whole = model.hidden(torch.tensor([text]), KVCache(model.cfg, 1, like=model.lm_head.weight))[:,-1]
    assert 3*pieces.bytes<at_once.bytes
    torch.testing.assert_close(h, whole, rtol=1e-4, atol=1e-5)

# ---- the terminal, in a process of its own ---------------------------------------------------------------------------

TALK = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler) # whoever started the tests may have it ignored
sys.path.insert(0, {tests!r})
from test_sample import toy
from nanogpt.knobs import SampleConfig
from nanogpt.terminal import chat_terminal
from nanogpt.tokenizer import Tokenizer
tok = Tokenizer.load({path!r})
model = toy(tok, block_size=400)
with torch.no_grad(): model.lm_head.weight[tok.eot:] = 0  # never ends by itself
hidden = model.hidden
model.hidden = lambda *a: (time.sleep({wait}), hidden(*a))[1]
print(len(chat_terminal(model, tok, SampleConfig(max_tokens={n}, temperature=1.))), "messages")
"""

def terminal(tok, tmp_path, env, wait, n):
    tok.save(tmp_path/"tokenizer.json")
    code = TALK.format(tests=os.path.dirname(__file__), path=str(tmp_path/"tokenizer.json"), wait=wait, n=n)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)

def test_terminal_reads_lines_until_the_end(tok, tmp_path, env):
    with terminal(tok, tmp_path, env, 0, 5) as p: out, err = p.communicate(b"hello\n\n/new\nhello\nonce more\n", timeout=120)
    assert p.returncode==0, err.decode()
    assert out.rstrip().endswith(b"4 messages")
    for said in (b"Ask something", b"(a new chat)", b"(cut after max_tokens=5)"): assert said in err
    assert b"Ask something" not in out

@pytest.mark.skipif(os.name=="nt", reason="SIGINT cannot be sent to one process there")
def test_ctrl_c_stops_the_answer_and_not_the_chat(tok, tmp_path, env):
    with terminal(tok, tmp_path, env, .05, 300) as p:
        p.stdin.write(b"tell me a long story\n")
        p.stdin.flush()
        assert p.stdout.read(1)  # it streams: a first letter is here long before the end
        time.sleep(.3)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(b"/quit\n", timeout=120)
    assert p.returncode==0, err.decode()
    assert b"(stopped)" in err and out.rstrip().endswith(b"2 messages")

def test_terminal_drops_the_oldest_and_says_so(tok, capsys):
    model = toy(tok, block_size=96)
    left = chat_terminal(model, tok, SampleConfig(max_tokens=8, temperature=1.), ["the cat sat"]*12, system="the rat")
    err = capsys.readouterr().err
    assert "oldest messages no longer fit the context of 96 tokens" in err
    assert left[0]==dict(role="system", content="the rat")
    chat = Chat(model, tok, SampleConfig(), system=" ")
    with pytest.raises(DataError, match="shorter question"): next(chat.ask("cat "*400))
    assert chat.messages==[]
