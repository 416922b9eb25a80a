"Beam search beside transformers' on small random models, and beside slow definitions; what a search must never do."
import math
from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import pytest
import torch

from nanogpt import beam as module
from nanogpt.beam import Beam, BeamConfig, BeamSearch, beam
from nanogpt.cache import KVCache
from nanogpt.core import CheckpointError, ConfigError, DataError, ShapeError
from nanogpt.model import GPT, GPTConfig
from nanogpt.sample import SampleConfig, complete
from nanogpt.settings import parse

V, END = 40, 2

class Letters:
    "The least a search needs of a tokenizer: a letter for each id, and which ids are special."
    def __init__(self, n=V, ends=(END,)): self.n_vocab, self.specials = n, {f"<|{i}|>": i for i in ends}
    def decode(self, ids): return "".join(chr(ord("A")+int(i)) for i in ids)
    def decode_bytes(self, ids): return self.decode(ids).encode()

def toy(seed=0, tok=None, end=2.):
    "A random model with decided opinions; the end is now and then its first wish."
    torch.manual_seed(seed)
    V = (tok or Letters()).n_vocab
    model = GPT(GPTConfig(vocab_size=V, block_size=48, n_layer=2, n_head=2, n_embd=32, position="rotary"))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4) if p.dim()>1 else None
        model.lm_head.weight[END] *= end
    return model.eval()

def prompts(n, seed=0, longest=9):
    r = Random(seed)
    return [[r.randrange(3, V) for _ in range(r.randint(1, longest))] for _ in range(n)]

def found(hypotheses): return [(h.ids, h.reason) for h in hypotheses]

def close(a, b): return all(abs(x-y)<=1e-4*max(1, abs(y)) for x, y in zip(a, b, strict=True)) # float32 sums of some twenty terms

# ---- transformers ----------------------------------------------------------------------------------------------------

def pair(kind, folder, seed=0):
    "A random model of transformers whose end is now and then likely, and ours with its weights."
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")
    from nanogpt import hub
    torch.manual_seed(seed)
    common = dict(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=END)
    if kind=="gpt2": theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **common, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False))
    else: theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **common, max_position_embeddings=64, hidden_size=32, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(std=.3)
        theirs.lm_head.weight[END] *= dict(gpt2=4.5, llama=2.5)[kind] # a hidden state that likes the end likes it very much
    theirs.save_pretrained(folder)
    return theirs.eval(), hub.load_hub(folder)[1].eval()

def asked(model, prompt, cfg):
    "What transformers finds: ids, the end not among them, and scores."
    rule = dict(true=True, false=False).get(cfg.early_stopping, "never")
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False, pad_token_id=0,
        num_beams=cfg.beams, num_return_sequences=cfg.n, length_penalty=cfg.length_penalty, early_stopping=rule,
        no_repeat_ngram_size=cfg.no_repeat_ngram, repetition_penalty=cfg.repetition_penalty, max_new_tokens=cfg.max_tokens,
        min_new_tokens=cfg.min_tokens, return_dict_in_generate=True, output_scores=True)
    ids = [tuple(o[len(prompt):]) for o in out.sequences.tolist()]
    return [o[:o.index(END)] if END in o else o for o in ids], out.sequences_scores.tolist()

WIDTHS = [dict(beams=2, max_tokens=16), dict(beams=3, n=3, no_repeat_ngram=2, max_tokens=12),
          dict(beams=4, n=2, repetition_penalty=1.3, max_tokens=16),
          dict(beams=6, n=6, min_tokens=3, max_tokens=8), dict(beams=4, n=4, no_repeat_ngram=3, repetition_penalty=1.1, max_tokens=20),
          dict(beams=5, n=2, no_repeat_ngram=1, min_tokens=2, max_tokens=16)]
CASES = [BeamConfig(early_stopping=rule, length_penalty=penalty, **more)
         for rule, penalty, more in zip(["true", "false", "never"]*4, [-1., 0., 1., 2.]*3, WIDTHS*2, strict=True)]

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_same_as_transformers(kind, tmp_path):
    "Twelve settings, eight prompts of several lengths in one batch: every hypothesis, its score and its order."
    theirs, ours = pair(kind, tmp_path)
    reasons, early, many = Counter(), 0, prompts(8)
    for cfg in CASES:
        for p, mine in zip(many, beam(ours, Letters(), many, cfg), strict=True):
            ids, scores = asked(theirs, p, cfg)
            assert [h.ids for h in mine]==ids, (cfg, p)
            assert close([h.score for h in mine], scores), (cfg, p)
            reasons.update(h.reason for h in mine)
            early += mine[0].reason=="end" and len(mine[0].ids)<cfg.max_tokens-2
    assert min(reasons["end"], reasons["length"])>20 and early>15, (reasons, early) # both ways to end were met

def test_controls(tmp_path, monkeypatch):
    "What must not agree: a cache that stays as it was, another length rule, another stopping rule."
    theirs, ours = pair("gpt2", tmp_path)
    many = prompts(8)
    def agree(cfg, other=None):
        mine = beam(ours, Letters(), many, other or cfg)
        return sum([h.ids for h in o]==asked(theirs, p, cfg)[0] for p, o in zip(many, mine, strict=True))
    cfg = BeamConfig(beams=3, n=3, max_tokens=16)
    assert agree(cfg)==8
    assert agree(cfg, replace(cfg, length_penalty=0.))<8
    for rule in ("true", "never"): assert agree(cfg, replace(cfg, early_stopping=rule))<8
    own = KVCache.reorder
    monkeypatch.setattr(KVCache, "reorder", lambda cache, rows: own(cache, torch.arange(len(rows))))
    assert agree(cfg)<8

# ---- slow definitions ------------------------------------------------------------------------------------------------

@torch.no_grad()
def slow_scores(model, tok, ids, made, cfg):
    logits = model(torch.tensor([ids]))[0, -1, :tok.n_vocab].double()
    own = logits.log_softmax(-1).tolist()
    out = list(own)
    for i in set(ids): out[i] *= cfg.repetition_penalty
    n = cfg.no_repeat_ngram
    for v in range(tok.n_vocab):
        new = [*ids, v][-n:] if n else None
        if n and len(ids)>=n and any(ids[i:i+n]==new for i in range(len(ids)-n+1)): out[v] = -math.inf
    for i in tok.specials.values(): out[i] = own[i] if made>=cfg.min_tokens else -math.inf
    return out

def slowly(model, tok, prompt, cfg):
    "The whole search by its definition: no cache, no batch, no tensors; groups one after the other, as in arXiv:1610.02424."
    width, most = cfg.beams//cfg.groups, min(cfg.max_tokens, model.cfg.block_size-len(prompt)+1)
    groups = [dict(open=[((), 0.)], ended=[], over=False) for _ in range(cfg.groups)]
    for made in range(most):
        said = Counter()
        for g in groups:
            if g["over"]: continue
            every = [(s+x-cfg.diversity*said[v], s+x, (*ids, v)) for ids, s in g["open"]
                     for v, x in enumerate(slow_scores(model, tok, [*prompt, *ids], made, cfg))]
            every = sorted((o for o in every if o[1]>-math.inf), key=lambda o: -o[0])
            g["open"] = []
            for rank, (_, s, ids) in enumerate(every):
                text = tok.decode(ids)
                why = "end" if ids[-1] in tok.specials.values() else "stop" if any(o in text for o in cfg.stop) else ""
                if not why and len(ids)==most: why = "length" if most==cfg.max_tokens else "context"
                if not why and len(g["open"])<width: g["open"].append((ids, s))
                if why and rank<width: g["ended"].append((s/len(ids)**cfg.length_penalty, ids[:-1] if why=="end" else ids, why))
            said.update(ids[-1] for ids, _ in g["open"])
            g["ended"] = sorted(g["ended"], key=lambda o: -o[0])[:width]
            ahead = most if cfg.early_stopping=="never" and cfg.length_penalty>0 else made+1
            full = len(g["ended"])==width
            hope = g["open"] and (not full or cfg.early_stopping!="true" and g["open"][0][1]/ahead**cfg.length_penalty>g["ended"][-1][0])
            g["over"] = not hope
    return sorted((o for g in groups for o in g["ended"]), key=lambda o: -o[0])[:cfg.n]

SLOW = [BeamConfig(beams=3, n=3, max_tokens=12),
        BeamConfig(beams=4, n=2, max_tokens=40, early_stopping="never", length_penalty=.5, stop=("A", "LM", "Z")),
        BeamConfig(beams=4, n=4, groups=2, diversity=.5, max_tokens=10),
        BeamConfig(beams=6, n=6, groups=3, diversity=2., max_tokens=9, early_stopping="true"),
        BeamConfig(beams=4, n=4, groups=4, diversity=30., max_tokens=9, length_penalty=0., repetition_penalty=1.2,
                   no_repeat_ngram=2, min_tokens=3)]

@pytest.mark.parametrize("cfg", SLOW, ids=range(len(SLOW)))
def test_equals_the_definition_alone_and_in_every_batch(cfg):
    "Also diverse beams, for which transformers has no search of its own any more; one prompt nearly fills the context."
    tok, many = Letters(ends=(END, 1)), [*prompts(6, seed=1), [7]*45, [5]*48]
    model = toy(tok=tok)
    want = [slowly(model, tok, p, cfg) for p in many]
    for rows in (1, 12, 64):
        order = Random(rows).sample(range(len(many)), len(many))
        for k, mine in zip(order, beam(model, tok, [many[k] for k in order], cfg, rows), strict=True):
            assert found(mine)==[(ids, why) for _, ids, why in want[k]]
            assert close([h.score for h in mine], [s for s, *_ in want[k]])

def test_diversity_speaks_and_scores_stay_honest():
    "With a strong penalty the groups begin differently; a score is the model's own log-probability, whatever chose the text."
    model, tok, p = toy(end=.1), Letters(), [9, 8, 7]
    cfg = BeamConfig(beams=4, n=4, groups=4, diversity=50., max_tokens=6, length_penalty=0.)
    alike, = beam(model, tok, [p], replace(cfg, groups=1, diversity=0.))
    other, = beam(model, tok, [p], cfg)
    assert len({h.ids[0] for h in other})==4>len({h.ids[0] for h in alike})
    for h in other:
        with torch.no_grad(): logp = model(torch.tensor([[*p, *h.ids]]))[0].log_softmax(-1)
        assert close([h.score], [sum(logp[len(p)-1+i, v].item() for i, v in enumerate(h.ids))])

@pytest.mark.parametrize("penalty", [-1., 0., 1., 2.])
def test_wide_enough_finds_the_best_of_all(penalty):
    "Four letters and an end, texts of up to four tokens, every text looked at: the five best, in their order."
    tok = Letters(5)
    model = toy(tok=tok, seed=3)
    texts = [t for n in range(1, 5) for t in product(range(5), repeat=n) if END not in t[:-1] and (t[-1]==END or n==4)]
    with torch.no_grad(): logp = {t: model(torch.tensor([[3, *t]]))[0].log_softmax(-1) for t in texts}
    score = {t: sum(logp[t][i, v].item() for i, v in enumerate(t))/len(t)**penalty for t in texts}
    best = sorted(texts, key=lambda t: -score[t])[:5]
    mine, = beam(model, tok, [[3]], BeamConfig(beams=341, n=5, max_tokens=4, length_penalty=penalty, early_stopping="never"))
    assert [h.ids+(END,)*(h.reason=="end") for h in mine]==best and close([h.score for h in mine], [score[t] for t in best])
    narrow, = beam(model, tok, [[3]], BeamConfig(beams=2, max_tokens=4, length_penalty=penalty, early_stopping="never"))
    assert narrow[0].score<=mine[0].score+1e-5

# ---- beside greedy ---------------------------------------------------------------------------------------------------

def test_width_one_is_greedy():
    tok, many = Letters(), [*prompts(8, seed=2), [7]*44]
    for seed, more in enumerate((dict(), dict(stop=("A", "PQ", "T")))):
        model = toy(seed)
        cfg = BeamConfig(beams=1, max_tokens=14, **more)
        greedy = complete(model, tok, many, SampleConfig(temperature=0, max_tokens=14, **more))
        for h, o in zip(beam(model, tok, many, cfg), greedy, strict=True):
            assert (h[0].ids, h[0].text, h[0].reason)==(o.ids, o.text, o.reason)

def test_worse_than_greedy_only_where_greedy_was_pushed_out(monkeypatch):
    "A beam's sum is at least greedy's as long as greedy's text stays in it; where it was pushed out, all is possible, and it happens."
    tok, kept, lost, worse = Letters(), 0, 0, 0
    for seed in range(6):
        model = toy(seed)
        for p in prompts(6, seed=seed):
            cfg = BeamConfig(beams=2, max_tokens=8, length_penalty=0., early_stopping="never")
            one = beam(model, tok, [p], replace(cfg, beams=1))[0][0]
            seen, path = [], one.ids+(END,)*(one.reason=="end")
            class Watched(Beam):
                def push(self, found, seen=seen):
                    seen.append(set(self.open))
                    return super().push(found)
            monkeypatch.setattr(module, "Beam", Watched)
            two = beam(model, tok, [p], cfg)[0][0]
            stayed = all(path[:k] in open_ for k, open_ in enumerate(seen[:len(path)]))
            if stayed: assert two.score>=one.score-1e-5
            kept, lost, worse = kept+stayed, lost+(not stayed), worse+(two.score<one.score-1e-5)
    assert kept>5 and lost>5, (kept, lost)
    print(f"greedy's text stayed in {kept} of {kept+lost} searches; {worse} ended below greedy")

# ---- ends, limits, refusals ------------------------------------------------------------------------------------------

def test_specials_are_spared():
    "An <|end|> in a chat's prompt neither makes the end unlikely nor forbids it."
    model, tok = toy(end=.01), Letters()
    class Fixed(torch.nn.Module):
        def forward(self, h):
            scores = torch.zeros(len(h), V)
            scores[:, END] = 3.
            return scores
    model.lm_head = Fixed()
    for more in (dict(repetition_penalty=50.), dict(no_repeat_ngram=1), dict(no_repeat_ngram=2)):
        assert beam(model, tok, [[5, END, 5]], BeamConfig(beams=2, max_tokens=9, **more))[0][0].reason=="end"

def test_stuck_is_said():
    "Where every token is forbidden the search says so, and gives what it has."
    tok = Letters(4)
    mine, = beam(toy(tok=tok), tok, [[3]], BeamConfig(beams=2, n=2, max_tokens=9, min_tokens=9, no_repeat_ngram=1))
    assert {h.reason for h in mine}=={"stuck"} and {h.ids for h in mine}=={(0, 1), (1, 0)}

def test_refused_before_any_work(monkeypatch):
    model, tok = toy(), Letters()
    def never(*a, **k): raise AssertionError("work was done")
    monkeypatch.setattr(BeamSearch, "__init__", never)
    with pytest.raises(DataError, match="prompt 1 is empty"): beam(model, tok, [[3], []], BeamConfig())
    with pytest.raises(ShapeError, match="49 tokens, the context is 48"): beam(model, tok, [[3]*49], BeamConfig())
    with pytest.raises(ConfigError, match="the tokenizer has 41 ids"): beam(model, Letters(41), [[3]], BeamConfig())
    with pytest.raises(DataError, match="ids outside 0…39"): beam(model, tok, [[40]], BeamConfig())
    with pytest.raises(ConfigError, match="no token that ends"): beam(model, Letters(ends=()), [[3]], BeamConfig())
    with pytest.raises(ConfigError, match="--stop <.stop.> is no token") as e: beam(model, tok, [[3]], BeamConfig(stop=("<|stop|>",)))
    assert "<|2|>" in e.value.fix and beam(model, tok, [], BeamConfig())==[]

def test_what_does_not_fit_into_memory(monkeypatch):
    "The message names a number of beams that fits, and one more does not; prompts that do not fit together go one after the other."
    model, tok = toy(), Letters()
    monkeypatch.setattr(module, "free_bytes", lambda model: 2_000_000)
    wide = BeamConfig(beams=64)
    with pytest.raises(ConfigError, match="--beams=64 texts of 48 tokens need about 7 MB") as e: beam(model, tok, [[3]], wide)
    fits = BeamConfig(beams=int(e.value.fix.removeprefix("try --beams ")))
    assert len(beam(model, tok, [[3], [4, 5], [6]], fits))==3
    with pytest.raises(ConfigError): beam(model, tok, [[3]], replace(fits, beams=fits.beams+1))
    with pytest.raises(ConfigError, match="are free") as e: beam(model, tok, [[3]], replace(wide, groups=32, diversity=1.))
    assert "smaller --max_tokens" in e.value.fix

def test_a_broken_model_is_named():
    model = toy()
    with torch.no_grad(): model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"): beam(model.train(), Letters(), [[3]], BeamConfig())
    assert model.training

def test_flags():
    cfg = parse(BeamConfig, "--beams 6 --groups 3 --diversity 0.5 --early_stopping never --stop a,b --n 2".split())
    assert (cfg.beams, cfg.groups, cfg.early_stopping, cfg.stop)==(6, 3, "never", ("a", "b"))
    with pytest.raises(ConfigError, match="not one of true, false, never"): parse(BeamConfig, ["--early_stopping", "soon"])
