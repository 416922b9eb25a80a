"Guessing ahead changes the speed and nothing else: exactly on a toy vocabulary, token for token where no dice are thrown."
import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from nanogpt import speculate as module
from nanogpt.core import CheckpointError, ConfigError, DataError, ShapeError
from nanogpt.knobs import SampleConfig, warp
from nanogpt.model import GPT, GPTConfig
from nanogpt.sample import complete
from nanogpt.speculate import Draft, Lookup, chance, residual, rounds, speculate, stream_ahead
from nanogpt.tokenizer import Tokenizer

# ---- the same distribution, by trying every course of the dice ----------------------------------------------------------

class Script:
    "Dice that follow a script; at its end they take the first way there is, and put the others on the list."
    def __init__(self, script, todo): self.script, self.todo, self.done, self.weight = script, todo, [], 1.
    def pick(self, probs):
        ways = [i for i, p in enumerate(probs) if p>0]
        if len(self.done)==len(self.script):
            self.todo += [[*self.done, i] for i in ways[1:]]
            self.script = [*self.script, ways[0]]
        self.done.append(self.script[len(self.done)])
        self.weight *= probs[self.done[-1]]
        return self.done[-1]
    def coin(self, chance): return bool(self.pick([1-chance, chance]))
    def draw(self, p): return self.pick(p.tolist())

def every_course(run):
    "Text → its probability."
    todo, out = [[]], {}
    while todo:
        dice = Script(todo.pop(), todo)
        text = run(dice)
        out[text] = out.get(text, 0)+dice.weight
    return out

def opinions(seed, V=3):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=1, n_embd=4, tied=False)).eval()
    for p in model.parameters(): torch.nn.init.normal_(p)
    return model

TOY, START, PLAIN = SimpleNamespace(n_vocab=3, specials={}), [0, 1, 0], SampleConfig(temperature=1., max_tokens=3)
CASES = dict(draft=(2, {}), lookup=(2, {}), knobs=(2, dict(temperature=1.3, top_k=2, repetition_penalty=1.5)), one=(1, dict(top_p=.8)))

@torch.no_grad()
def truth(model, cfg):
    "The probability of every text of three tokens by its definition."
    out = {}
    for text in product(range(3), repeat=3):
        out[text], ids = 1., list(START)
        for t in text:
            seen = torch.tensor([[i in ids for i in range(3)]])
            out[text] *= warp(model(torch.tensor([ids]))[:, -1], cfg, seen).softmax(-1)[0, t].item()
            ids.append(t)
    return out

def written(case):
    "The distribution of what `rounds` writes, and the model's own."
    model, pupil, (ahead, knobs) = opinions(1), opinions(2), CASES[case]
    cfg = replace(PLAIN, **knobs)
    def run(dice):
        draft = Lookup(2) if case=="lookup" else Draft(pupil, 8)
        return tuple(i for new, _ in rounds(model, draft, TOY, START, cfg, ahead, dice) for i in new)
    return every_course(run), truth(model, cfg)

def distance(got, want): return max(abs(got.get(text, 0)-p) for text, p in want.items())

@pytest.mark.parametrize("case", CASES)
def test_every_text_has_exactly_its_own_probability(case):
    got, want = written(case)
    assert set(got)<=set(want) and abs(sum(got.values())-1)<1e-5
    assert distance(got, want)<1e-5                              # float32, a product of some dozen factors

@pytest.mark.parametrize("name,wrong", [("chance", lambda p, q: torch.ones_like(p)), ("residual", lambda p, q: p),
                                        ("chance", lambda p, q: (p>=q).float())], ids=["accept always", "drawn from p", "all or nothing"])
def test_control_a_wrong_rule_is_seen(monkeypatch, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    assert distance(*written("draft"))>.01

def test_the_two_rules():
    torch.manual_seed(0)
    for _ in range(200):
        p, q = (torch.randn(2, 7)*4).double().softmax(-1)
        kept = q*chance(p, q)
        torch.testing.assert_close(kept+(1-kept.sum())*residual(p, q), p)
        torch.testing.assert_close(kept, torch.minimum(p, q))
        assert torch.equal(residual(p, p), p) and chance(p, p).eq(1).all()

# ---- the same tokens where no dice are thrown -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tok(): return Tokenizer.train(["the cat sat on the mat and the naïve rat ran. 猫 "*9], 300)

def toy(tok, seed=0, **more):
    "A random model with decided opinions, so that greedy has no near ties."
    torch.manual_seed(seed)
    shape = dict(vocab_size=tok.n_vocab+4, block_size=48, n_layer=2, n_head=2, n_embd=32, position="rotary") | more
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters(): p.data.mul_(4) if p.dim()>1 else None
    return model

def noisy(model, noise):
    "Nearly the same model: it is right often, and often not."
    near = GPT(model.cfg).eval()
    near.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    for p in near.parameters(): p.data.add_(torch.randn_like(p)*noise*p.std()) if p.dim()>1 else None
    return near

def same(a, b): assert (a.text, a.ids, a.reason)==(b.text, b.ids, b.reason)

KNOBS = [{}, dict(repetition_penalty=1.3), dict(repetition_penalty=.7), dict(stop=("a", "e c")), dict(max_tokens=1), dict(max_tokens=2)]

@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_greedy_is_complete(tok, knobs):
    model, rng = toy(tok), random.Random(2)
    drafts = dict(itself=model, near=noisy(model, .2), far=toy(tok, 9, n_layer=1), short=toy(tok, 8, block_size=20), lookup=Lookup(3))
    cfg, stood = SampleConfig(**dict(temperature=0, max_tokens=24) | knobs), {}
    for n in (1, 30, 47, 48):                                    # also at the edge of the context
        ids = [rng.randrange(tok.eot) for _ in range(n)]
        want = complete(model, tok, [ids], cfg)[0]
        for name, draft in drafts.items():
            for ahead in (1, 4) if n==30 else (4,):
                got = speculate(model, draft, tok, ids, cfg, ahead)
                same(got, want)
                stood[name] = stood.get(name, 0)+got.accepted
                assert 0<=got.accepted<=got.proposed<=got.rounds*ahead and got.rounds<=len(got.ids)+1
                assert "".join(stream_ahead(model, draft, tok, ids, cfg, ahead))==want.text
    if cfg.max_tokens==24 and not cfg.stop: assert stood["itself"]>stood["near"]>stood["far"], stood

def test_right_guesses_save_passes(tok, monkeypatch):
    "A draft that is always right: as many passes as there are groups of five, and one for the prompt."
    model, ids = toy(tok), [5, 6, 7]
    model.lm_head.weight.data[tok.eot:] = 0                          # never ends by itself
    cfg, calls, hidden = SampleConfig(temperature=0, max_tokens=20), [], model.hidden
    twin = noisy(model, 0)
    monkeypatch.setattr(model, "hidden", lambda idx, past=None: calls.append(idx.size(1)) or hidden(idx, past))
    got = speculate(model, twin, tok, ids, cfg)
    assert (got.proposed, got.accepted, got.rounds)==(16, 16, 4) and calls==[2, 5, 5, 5, 5]
    assert got.said()=="16 of 16 guesses accepted, 5.0 ids in each of 4 rounds"
    calls.clear()
    complete(model, tok, [ids], cfg)
    assert len(calls)==20

def test_lookup_finds_what_is_quoted(tok):
    "A text that repeats itself is guessed without a model."
    model = toy(tok)
    model.lm_head.weight.data[tok.eot:] = 0
    cfg = SampleConfig(temperature=0, max_tokens=40, repetition_penalty=.2)    # below 1: it goes in circles
    got = speculate(model, Lookup(2), tok, [1, 2], cfg)
    assert got.accepted>=10 and got.rounds<=30

WILD = [dict(temperature=1.), dict(temperature=1.4, top_k=20, top_p=.9, repetition_penalty=1.2, stop=("th", "c"))]

@pytest.mark.parametrize("knobs", WILD, ids=str)
def test_dice_start_from_the_seed(tok, knobs):
    model = toy(tok)
    near, cfg = noisy(model, .1), SampleConfig(max_tokens=20, **knobs)
    a, b = (speculate(model, near, tok, [1, 2, 3], cfg) for _ in range(2))
    assert a==b and a.text=="".join(stream_ahead(model, near, tok, [1, 2, 3], cfg))
    assert len({speculate(model, near, tok, [1, 2, 3], replace(cfg, seed=s)).ids for s in range(5)})>1

def test_models_are_left_as_they_were(tok):
    model = toy(tok).bfloat16().train()
    near, cfg = noisy(toy(tok), .1).train(), SampleConfig(temperature=0, max_tokens=20)
    model.lm_head.weight.data[tok.eot:] = 0
    half = stream_ahead(model, near, tok, [1], cfg)
    assert next(half)
    half.close()
    assert model.training and near.training and not torch.is_inference_mode_enabled()
    assert all(p.grad is None for p in model.parameters())

def test_refusals(tok):
    model, cfg = toy(tok), SampleConfig(max_tokens=3)
    with pytest.raises(ConfigError, match="another vocabulary"): speculate(model, toy(tok, vocab_size=900), tok, [1], cfg)
    with pytest.raises(ConfigError, match="another vocabulary"): speculate(model, toy(tok, vocab_size=tok.n_vocab-1), tok, [1], cfg)
    with pytest.raises(ConfigError, match="one prompt, here are 2"): stream_ahead(model, Lookup(), tok, [[1], [2]], cfg)
    with pytest.raises(ConfigError, match="try ahead=4"): stream_ahead(model, Lookup(), tok, [1], cfg, 0)
    with pytest.raises(DataError, match="is empty"): stream_ahead(model, Lookup(), tok, [], cfg)
    with pytest.raises(ShapeError, match="49 tokens, the context is 48"): stream_ahead(model, Lookup(), tok, [1]*49, cfg)
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"): speculate(model, Lookup(), tok, [1, 2], cfg)
