"Contrastive search beside its formula on models of transformers, read again from the start for every candidate; and what it must never do."
import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch
from test_beam import END, Letters, V, pair, prompts, toy

from nanogpt import contrast as module
from nanogpt import window
from nanogpt.cache import KVCache
from nanogpt.checkpoint import save_model
from nanogpt.cli import main
from nanogpt.contrast import ContrastConfig, contrast, stream_contrast
from nanogpt.core import CheckpointError, ConfigError, DataError, ShapeError
from nanogpt.model import GPT, GPTConfig
from nanogpt.sample import complete
from nanogpt.tokenizer import Tokenizer

def found(answers): return [(o.ids, o.reason, o.text) for o in answers]

# ---- transformers ----------------------------------------------------------------------------------------------------

def unsure(kind, folder):
    "A random model of transformers and ours with its weights, neither so sure of a token that nothing else could count."
    theirs, ours = pair(kind, folder)
    for head in (theirs.lm_head, ours.lm_head): head.weight.data.mul_(.2)
    return theirs, ours

@torch.no_grad()
def slowly(theirs, prompt, cfg):
    "The definition (arXiv:2202.06417 §4.2) on a model of transformers, whose own search is no longer part of it: no cache, no batch."
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
    rules = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty)])
    if cfg.no_repeat_ngram: rules.append(NoRepeatNGramLogitsProcessor(cfg.no_repeat_ngram))
    def read(ids):
        out = theirs(torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(theirs.lm_head(out.hidden_states[-1]), out.logits)  # behind the last norm: what the head is given
        return out.logits[0, -1], out.hidden_states[-1][0]
    ids, made = list(prompt), []
    while len(made)<cfg.max_tokens:
        logits, past = read(ids)
        scores = rules(torch.tensor([ids]), logits[None].clone())[0]
        if len(made)<cfg.min_tokens: scores[END] = -math.inf
        probs, worth = scores.softmax(-1), {}
        for v in probs.topk(cfg.top_k).indices.tolist():
            if not probs[v]: continue
            new = read([*ids, v])[1][-1]
            near = max(torch.cosine_similarity(new, h, dim=0).item() for h in past)
            worth[v] = (1-cfg.contrast)*probs[v].item()-cfg.contrast*near
        best = max(worth, key=worth.get)
        if best==END: return tuple(made), "end"
        ids, made = [*ids, best], [*made, best]
    return tuple(made), "length"

CASES = [ContrastConfig(contrast=a, top_k=k, max_tokens=n, **more) for a, k, n, more in (
    (.6, 4, 16, {}), (.2, 2, 16, {}), (.4, 8, 12, dict(repetition_penalty=1.3)), (.9, 5, 12, dict(no_repeat_ngram=2)),
    (1., 3, 10, dict(min_tokens=4)), (.1, V, 8, dict(repetition_penalty=1.1, no_repeat_ngram=1, min_tokens=2)), (0., 4, 16, {}))]

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_same_as_the_formula_on_transformers(kind, tmp_path):
    "Seven settings, six prompts of several lengths in one batch: every token, and why it ended."
    theirs, ours = unsure(kind, tmp_path)
    many, reasons, other = prompts(6), set(), 0
    for cfg in CASES:
        mine = contrast(ours, Letters(), many, cfg)
        assert [(o.ids, o.reason) for o in mine]==[slowly(theirs, p, cfg) for p in many], cfg
        reasons |= {o.reason for o in mine}
        other += sum(a.ids!=b.ids for a, b in zip(mine, contrast(ours, Letters(), many, replace(cfg, contrast=0.)), strict=True))
    assert reasons=={"end", "length"} and other>15, (reasons, other)                   # both ways to end; α was felt

WRONG = {
    "mean": ("similarity", lambda a, b: (torch.nn.functional.normalize(a, dim=-1)@torch.nn.functional.normalize(b, dim=-1).mT).mean(-1)),
    "not normalised": ("similarity", lambda a, b: (a@b.mT).amax(-1)),
    "the newest alone": ("similarity", lambda a, b: torch.cosine_similarity(a, b[:, -1:], dim=-1)),
    "itself": ("similarity", lambda a, b: torch.ones(a.shape[:2])),
    "logarithm": ("contrast_score", lambda p, s, a: (1-a)*p.log()-a*s),
}

@pytest.mark.parametrize("wrong", [*WRONG, "cache"])
def test_controls(tmp_path, monkeypatch, wrong):
    "What must not agree with the formula: five other formulas, and a cache whose rows stay as they were."
    theirs, ours = unsure("gpt2", tmp_path)
    many, cfg = prompts(4), ContrastConfig(max_tokens=12, min_tokens=12)
    def agree(): return sum(o.ids==slowly(theirs, p, cfg)[0] for p, o in zip(many, contrast(ours, Letters(), many, cfg), strict=True))
    assert agree()==4
    own = KVCache.reorder
    if wrong=="cache": monkeypatch.setattr(KVCache, "reorder", lambda cache, rows: own(cache, torch.arange(len(rows))))
    else: monkeypatch.setattr(module, *WRONG[wrong])
    assert agree()<4

# ---- beside greedy, alone and in batches -------------------------------------------------------------------------------

RULES = [dict(), dict(repetition_penalty=1.3), dict(stop=("A", "PQ", "T")), dict(no_repeat_ngram=2, min_tokens=5),
         dict(bad_words=("B", "CD")), dict(logit_bias=("E:2", "F:-inf")), dict(frequency_penalty=.7, presence_penalty=.2)]

class Words(Letters):
    "Letters that can be encoded too."
    def encode(self, text): return [ord(c)-ord("A") for c in text]

@pytest.mark.parametrize("more", RULES, ids=str)
def test_without_contrast_it_is_greedy(more):
    "With every rule of the sampler: α = 0, or one candidate, is what `complete` gives at temperature 0; α = 0.6 is something else."
    model, tok, many = toy(), Words(), prompts(8, seed=2)
    cfg = ContrastConfig(contrast=0., max_tokens=14, **more)
    want = found(complete(model, tok, many, replace(cfg.rules(), top_k=None)))
    assert found(contrast(model, tok, many, cfg))==want
    assert found(contrast(model, tok, many, replace(cfg, contrast=.6, top_k=1)))==want
    assert found(contrast(model, tok, many, replace(cfg, contrast=.6)))!=want

def test_a_neighbour_changes_nothing():
    "Prompts of all lengths up to the context, in any order and any batch, and streamed."
    model, tok = toy(end=1.3), Words()
    many = [*prompts(9, seed=1), [7]*40, [5]*47]
    for cfg in (ContrastConfig(max_tokens=20), ContrastConfig(contrast=.3, top_k=7, max_tokens=20, no_repeat_ngram=2, stop=("A", "LM"))):
        alone = [contrast(model, tok, [p], cfg)[0] for p in many]
        reasons = {o.reason for o in alone}
        assert reasons>={"length", "context"} and (len(alone[-1].ids), alone[-1].reason)==(1, "context")
        for rows in (1, 20, 64):
            order = Random(rows).sample(range(len(many)), len(many))
            for k, o in zip(order, contrast(model, tok, [many[k] for k in order], cfg, rows), strict=True): assert o==alone[k]
        for p, o in zip(many, alone, strict=True): assert "".join(stream_contrast(model, tok, p, cfg))==o.text
    assert contrast(model, tok, [], cfg)==[]

def test_as_long_as_the_context_allows():
    "A limit far beyond the context costs no memory; every prompt, short or long, goes on until its own context is full."
    model, tok, many = toy(end=.01), Words(), [[3], [4, 5, 6]*15, [7]*20]
    cfg = ContrastConfig(max_tokens=10**9)
    done = contrast(model, tok, many, cfg)
    assert [len(p)+len(o.ids) for p, o in zip(many, done, strict=True)]==[48]*3 and {o.reason for o in done}=={"context"}
    assert done==[contrast(model, tok, [p], cfg)[0] for p in many]

def test_what_is_forbidden_never_wins():
    "A forbidden token would be new indeed; with fewer allowed than tried, it is not taken. Where none is left that is said."
    tok = Words(8)
    model = toy(tok=tok)
    cfg = ContrastConfig(contrast=1., top_k=8, max_tokens=4, min_tokens=4, no_repeat_ngram=1, logit_bias=("A:-inf", "B:-inf"))
    done, = contrast(model, tok, [[3]], cfg)
    assert sorted(done.ids)==[4, 5, 6, 7]
    with pytest.raises(ConfigError, match="forbid every token"): contrast(model, tok, [[3]], replace(cfg, max_tokens=5, min_tokens=5))

# ---- refusals, and what is left behind -----------------------------------------------------------------------------------

def test_refused_before_any_work(monkeypatch):
    model, tok = toy(), Words()
    def never(*a, **k): raise AssertionError("work was done")
    monkeypatch.setattr(module, "_begin", never)
    for call in (lambda p: contrast(model, tok, [[3], p], ContrastConfig()), lambda p: stream_contrast(model, tok, p, ContrastConfig())):
        with pytest.raises(DataError, match="is empty"): call([])
        with pytest.raises(ShapeError, match="49 tokens, the context is 48"): call([3]*49)
        with pytest.raises(ShapeError, match="48 tokens, the context is 48: no place") as e: call([3]*48)
        assert e.value.fix=="shorten it"
        with pytest.raises(DataError, match="ids outside 0…39"): call([40])
    with pytest.raises(ConfigError, match="--stop <.stop.> is no token"): contrast(model, tok, [[3]], ContrastConfig(stop=("<|stop|>",)))

def test_what_does_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(window, "resident_bytes", lambda: 0)
    model, tok = toy(), Words()
    monkeypatch.setattr(window, "machine_memory", lambda device: window.batch_bytes(model, 3, 48))
    with pytest.raises(ConfigError, match="40 answers of up to 48 tokens") as e: contrast(model, tok, [[3]], ContrastConfig(top_k=99))
    assert "smaller --top_k" in e.value.fix
    with pytest.raises(ConfigError, match="are free"): contrast(model, tok, [[3]], ContrastConfig(top_k=4))
    assert contrast(model, tok, [[3]], ContrastConfig(top_k=3))[0].reason

def test_the_model_is_left_as_it_was():
    model, tok, cfg = toy(end=.01).train(), Words(), ContrastConfig(max_tokens=20)
    half = stream_contrast(model, tok, [1], cfg)
    assert next(half) and not model.training
    half.close()
    assert model.training and not torch.is_inference_mode_enabled()
    with torch.no_grad(): model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"): contrast(model, tok, [[3]], cfg)
    assert model.training

# ---- the command -------------------------------------------------------------------------------------------------------

@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    "`nanogpt generate` with a random model, in this process; gives exit code, stdout and stderr."
    for name in ("NANOGPT_DATA", "WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    tok = Tokenizer.train(["the cat sat on the mat and the naïve rat ran. 猫 "*9], 300)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    for p in model.parameters(): p.data.mul_(4) if p.dim()>1 else None
    save_model(tmp_path/"m", model, tok)
    def call(*words):
        capsys.readouterr()
        code = main(["generate", "--model", str(tmp_path/"m"), "--dtype", "float32", "--device", "cpu", *map(str, words)])
        return (code, *capsys.readouterr())
    call.model, call.tok = model, tok
    return call

def test_the_command_says_what_the_function_says(call, tmp_path):
    "As text, as JSON, in pieces, and for the rows of a file, each with its own settings."
    tok, said = call.tok, "the cat"
    def want(text, **more): return contrast(call.model, tok, [[tok.eot, *tok.encode(text)]], ContrastConfig(**dict(max_tokens=9) | more))[0]
    code, out, err = call("--prompt", said, "--max_tokens", 9, "--contrast", .6)
    assert code==0 and out.rstrip("\n")==want(said).text.rstrip("\n") and "cut at --max_tokens 9" in err
    more = ("--max_tokens", 9, "--json")
    one = json.loads(call("--prompt", said, "--contrast", .3, "--top_k", 7, "--repetition_penalty", 1.2, *more)[1])
    assert one["text"]==want(said, contrast=.3, top_k=7, repetition_penalty=1.2).text
    pieces = [json.loads(o) for o in call("--prompt", said, "--contrast", .6, "--stream", "yes", *more)[1].splitlines()]
    assert "".join(o["piece"] for o in pieces[:-1])==pieces[-1]["text"]==want(said).text
    rows = [dict(prompt=said), dict(prompt="on the mat", contrast=.2), dict(prompt=said, top_k=8), dict(prompt="a rat", temperature=1),
            dict(prompt="the "*70), dict(prompt=said, contrast=2)]
    (tmp_path/"in.jsonl").write_text("".join(json.dumps(o)+"\n" for o in rows))
    assert call("--prompts", tmp_path/"in.jsonl", "--out", tmp_path/"out.jsonl", "--max_tokens", 9, "--contrast", .6)[0]==3
    got = [json.loads(o) for o in (tmp_path/"out.jsonl").read_text().splitlines()]
    assert [o.get("text") for o in got]==[want(said).text, want("on the mat", contrast=.2).text, want(said, top_k=8).text, None, None, None]
    for o, says in zip(got[3:], ("temperature", "one more is to be tried", "--contrast=2"), strict=True): assert says in o["error"]

@pytest.mark.parametrize("words,says", [
    ("--contrast 1.5", ("--contrast=1.5 is not from 0 to 1", "try --contrast 0.6")),
    ("--contrast -1", ("--contrast=-1.0", "try --contrast 0.6")),
    ("--contrast nan", ("--contrast=nan", "try --contrast 0.6")), ("--contrast=", ("--contrast",)), ("--contrast soon", ("--contrast",)),
    ("--contrast 0.6 --top_k 0", ("--top_k=0", "try --top_k 4")),
    ("--contrast 0.6 --beams 4", ("--beams and --contrast", "one of the two")),
    ("--contrast 0.6 --temperature 0.5", ("--contrast and --temperature do not fit", "leave --temperature out")),
    ("--contrast 0.6 --lookup 3", ("--lookup and --contrast", "leave --lookup out")),
    ("--contrast 0.6 --draft m", ("--draft and --contrast",)),
    *((f"--contrast 0.6 --{o}", (f"--contrast and --{o.split()[0]}",))
      for o in ("top_p .9", "min_p .1", "seed 3", "n 2", "overflow slide")),
    ("--contrast 0.6 --json --logprobs 2", ("--contrast and --logprobs",))])
def test_refused_in_words(call, words, says):
    code, out, err = call("--prompt", "x", *words.split())
    assert code==2 and out=="" and len(err.splitlines())<=2 and all(o in err for o in says), err
