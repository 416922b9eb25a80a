"Our numbers beside those that others publish: lm-evaluation-harness runs on the same model and the same items, in a process of its own."
import importlib.util
import json
import subprocess
import sys
from itertools import islice
from random import Random

import pytest
import torch
from mini import environment, one_message, run

from nanogpt.checkpoint import load_model, save_model
from nanogpt.choice import arc, choice_metrics, completion, harness, judge
from nanogpt.core import pick_device
from nanogpt.corpus import choices, documents, records
from nanogpt.evals import score
from nanogpt.model import GPT, GPTConfig
from nanogpt.pace import one_by_one, together
from nanogpt.suite import last_word, last_words, measure
from nanogpt.template import Template
from nanogpt.tokenizer import Tokenizer

# The harness itself makes the requests and counts; only what a token costs comes from our model, one request at a time.
CHILD = """
import json, sys
from pathlib import Path
import torch, lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from nanogpt.checkpoint import load_model
home = Path(sys.argv[1])
model,tok = load_model(home/"model")
class Ours(TemplateLM):
    eot_token_id = tok.eot
    def tok_encode(self, string, add_special_tokens=None, **more): return tok.encode(string)
    def _loglikelihood_tokens(self, requests, **more):
        out = []
        for _,p,c in requests:
            x = torch.tensor([(p+c)[-model.cfg.block_size-1:]])
            with torch.inference_mode(): lp = model(x[:,:-1])[0,-len(c):].log_softmax(-1)
            want = x[0,-len(c):]
            out.append((lp.gather(-1, want[:,None]).sum().item(), bool((lp.argmax(-1)==want).all())))
        return out
    loglikelihood_rolling = generate_until = None
there = Path(lm_eval.__file__).parent/"tasks"
for name,where,split in (("hellaswag","hellaswag","validation"), ("arc_easy","arc","test"), ("lambada_openai","lambada","test")):
    (home/f"{name}.yaml").write_text(f"include: {there/where/name}.yaml\\ndataset_path: json\\ndataset_name: null\\ntraining_split: null\\n"
        f"validation_split: {split if split!='test' else 'null'}\\ntest_split: {split if split=='test' else 'null'}\\n"
        f"dataset_kwargs:\\n  data_files:\\n    {split}: {home/name}.jsonl\\n")
tasks = ["hellaswag", "arc_easy", "lambada_openai"]
manager = TaskManager(include_path=str(home), include_defaults=False)
got = lm_eval.simple_evaluate(Ours(), tasks=tasks, task_manager=manager, bootstrap_iters=0)
lls = {t: [[r[0] for r in o["filtered_resps"]] for o in sorted(got["samples"][t], key=lambda o: o["doc_id"])] for t in tasks}
print(json.dumps(dict(results={t: {k.split(",")[0]: v for k,v in got["results"][t].items()} for t in tasks}, lls=lls)))
"""

@pytest.fixture(scope="module")
def tiny():
    "A small model with enough training to hold opinions, and its tokenizer."
    torch.manual_seed(0)
    texts = list(islice(documents("tales"), 300))
    tok = Tokenizer.train(texts, 500)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=192, n_layer=2, n_head=2, n_embd=32, position="rotary"))
    ids, opt = torch.tensor([i for t in texts for i in tok.encode(t)]), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        rows = ids[torch.randint(len(ids)-49, (8, 1))+torch.arange(49)]
        loss, n = model.loss(rows[:, :-1], rows[:, 1:])
        (loss/n).backward(); opt.step(); opt.zero_grad()
    return model.eval(), tok

def own_rows(n=40):
    "Rows in the hub's columns, made of tales: with marks, double spaces, halves, and more or fewer answers."
    rng, out = Random(5), {"hellaswag": [], "arc_easy": [], "lambada_openai": []}
    for c, text in zip(islice(choices("tales", "test"), n), documents("tales", "test"), strict=False):
        a, _, b = c["ctx"].rpartition(". ")
        ends = [e+rng.choice(("", " [step] And so on.", "  It  was late.", " [title] Then home.")) for e in c["endings"]]
        cut = dict(ctx_a=f"[header] {a}.", ctx_b=b.lower(), ctx=f"[header] {a}. {b.lower()}")
        about = rng.choice(("Telling a tale", "Walking  home"))
        out["hellaswag"].append(dict(cut, ind=len(out["hellaswag"]), activity_label=about, endings=ends, label=str(c["label"])))
        k = rng.choice((3, 4))
        out["arc_easy"].append(dict(id=str(k), question=a[-200:]+"?", answerKey="ABCD"[rng.randrange(k)],
                                    choices=dict(text=c["endings"][:k], label=list("ABCD"[:k]))))
        out["lambada_openai"].append(dict(text=text.rstrip(".\n\"")))
    return out

def ours(model, tok, rows):
    "The same metrics from our side, and the log-probabilities of every ending."
    hella, ask, last = [[f(r) for r in rows[k]] for k, f in (("hellaswag", harness), ("arc_easy", arc), ("lambada_openai", last_word))]
    norm = dict(sum="acc", char="acc_norm")
    results = {"hellaswag": choice_metrics(model, tok, "hellaswag", hella, norm),
               "arc_easy": choice_metrics(model, tok, "arc_easy", ask, norm),
               "lambada_openai": last_words(model, tok, last, "lambada")}
    lls = {k: [[s.logprob for s in some] for some in judge(model, tok, items)]
           for k, items in (("hellaswag", hella), ("arc_easy", ask), ("lambada_openai", last))}
    return {k: {m["metric"]: m["value"] for m in v} for k, v in results.items()}, lls

def theirs(home, model, tok, rows):
    if importlib.util.find_spec("lm_eval") is None: pytest.skip("lm_eval is not installed: pip install -e '.[dev]' brings it")
    save_model(home/"model", model, tok)
    for name, some in rows.items(): (home/f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    env = environment(HF_HOME=str(home/"hub"), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run([sys.executable, "-c", CHILD, home], capture_output=True, text=True, encoding="utf-8", env=env, timeout=200)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_harness_equality(tiny, tmp_path):
    "HellaSwag, ARC and LAMBADA as lm-evaluation-harness builds and counts them: equal metrics, log-probabilities within rounding."
    rows = own_rows()
    got, lls = ours(*tiny, rows)
    want = theirs(tmp_path, *tiny, rows)
    for task, metrics in got.items():
        for name, value in metrics.items(): assert value==pytest.approx(want["results"][task][name], rel=1e-5), (task, name)
        for a, b in zip(lls[task], want["lls"][task], strict=True): assert a==pytest.approx(b, abs=1e-3)
    # controls: on these items the other readings do give other numbers, so equality says something
    other = choice_metrics(*tiny, "x", [harness(r) for r in rows["hellaswag"]], dict(token="token"), start=(tiny[1].eot,))
    assert other[0]["value"]!=pytest.approx(want["results"]["hellaswag"]["acc_norm"])
    raw = judge(*tiny, [completion(r) for r in rows["hellaswag"]])
    assert [[s.logprob for s in four] for four in raw][0]!=pytest.approx(want["lls"]["hellaswag"][0], abs=1e-3)

def test_harness_equality_on_real_items(tiny, tmp_path, data_home):
    "The same on a few dozen real items."
    few = {k: list(islice(records(data_home/"eval"/f), 30)) for k, f in
           (("hellaswag", "hellaswag_val.jsonl.gz"), ("arc_easy", "arc_easy.jsonl"), ("lambada_openai", "lambada_openai.jsonl"))}
    rows = dict(hellaswag=[dict(r, ctx_a=r["ctx"], ctx_b="") for r in few["hellaswag"]],
                arc_easy=[dict(question=r["query"].removeprefix("Question: "), answerKey=str(r["gold"]),
                               choices=dict(text=r["choices"], label=[str(i) for i in range(len(r["choices"]))])) for r in few["arc_easy"]],
                lambada_openai=[dict(text=f"{r['context']} {r['continuation']}") for r in few["lambada_openai"]])
    got, lls = ours(*tiny, rows)
    assert got["arc_easy"]==ours(*tiny, rows | dict(arc_easy=few["arc_easy"]))[0]["arc_easy"] # the file's columns are the hub's
    want = theirs(tmp_path, *tiny, rows)
    for task, metrics in got.items():
        for name, value in metrics.items(): assert value==pytest.approx(want["results"][task][name], rel=1e-4), (task, name)
        for a, b in zip(lls[task], want["lls"][task], strict=True): assert a==pytest.approx(b, abs=1e-3)

# ---- the script that asks one at a time --------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [dict(), dict(position="rotary", n_head=4, n_kv_head=2, norm="rms", mlp="swiglu"), dict(qk_norm=True)])
def test_same_choices_as_one_by_one(more):
    "In float32 the choices by sum and by mean are those of the script, on every item, whatever the model is made of."
    torch.manual_seed(0)
    rng = Random(1)
    model = GPT(GPTConfig(vocab_size=300, block_size=96, n_layer=2, n_embd=32, **dict(n_head=2) | more)).eval()
    def ids(n): return [rng.randrange(300) for _ in range(n)]
    asked = [(ids(rng.randint(1, 60)), [ids(rng.randint(1, 30)) for _ in range(rng.choice((2, 4)))]) for _ in range(150)]
    want = one_by_one(model, asked)
    assert together(model, asked)==want
    assert len(set(want))>4 and any(a!=b for a, b in want) # all places are chosen, and the two rules are not one
    spoiled = [(text[:-1]+[0], ends) if len(text)>1 else (text, ends) for text, ends in asked]
    assert together(model, spoiled)!=want # control: another last word is noticed

def test_a_prompt_is_read_once(monkeypatch):
    "Of four endings the prompt goes through the model a single time, and the head sees the endings alone."
    model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    read, looked, hidden = [], [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, past=None: (read.append(idx.numel()), hidden(idx, past))[1])
    model.lm_head.register_forward_pre_hook(lambda m, args: looked.append(args[0].shape[0]))
    score(model, [([1]*20, [2]*5)]*4)
    assert sum(read)==20+4*4 and sum(looked)==4*5

@pytest.mark.long # half a minute of compiling
@pytest.mark.filterwarnings("ignore::DeprecationWarning") # of the compiler's own modules
@pytest.mark.skipif(not pick_device("cpu").compiles, reason="torch.compile needs a C++ compiler, and there is none here")
def test_compiled_scores_are_the_same():
    "A compiled model gives the scores of the plain one."
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=64, n_layer=1, n_head=2, n_embd=16)).eval()
    pairs = [(list(range(n)), list(range(k, k+n//3))) for n in (9, 14, 20) for k in (1, 2, 3)]
    want = [s.each for s in score(model, pairs)]
    model.hidden = torch.compile(model.hidden, dynamic=True)
    for a, b in zip(score(model, pairs), want, strict=True): assert a.each==pytest.approx(b, abs=1e-4)

# ---- the suite -------------------------------------------------------------------------------------------------------------

def test_suite_says_what_is_missing(whole):
    "Without real data and without network, `--suite all` measures what is here and names each task that is not, with the way to get it."
    done = run("eval", "--model", whole, "--suite", "all", "--limit", 2, "--threads", 1, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"tales", "text:pydocs", "stories", "quality"}=={r["task"] for r in rows}
    for r in rows: assert {"task", "metric", "version", "value", "n", "seed", "low", "high"} <= set(r) and r["low"]<=r["value"]<=r["high"]
    for name in ("hellaswag", "arc_easy", "arc_challenge", "lambada", "dolly"): assert f"{name}: not available here" in done.stderr
    assert "NANOGPT_DATA" in done.stderr
    one_message(run("eval", "--model", whole, "--tasks", "lambada", code=2).stderr, "NANOGPT_DATA")

def test_real_items(whole, data_home, monkeypatch):
    "Every real task reads its file, and a model of chance is at chance."
    monkeypatch.setenv("NANOGPT_DATA", str(data_home))
    model, tok = load_model(whole)
    rows = measure(model, Template(tok), ("hellaswag", "arc_easy", "arc_challenge", "lambada"), limit=60)
    by = {(r["task"], r["metric"]): r for r in rows}
    assert {m for t, m in by if t=="hellaswag"}=={"acc", "acc_norm", "acc_completion", "acc_norm_completion"}
    assert by["lambada", "perplexity"]["value"]>1 and by["lambada", "acc"]["n"]==60
    for r in rows:
        if "chance" in r: assert r["low"]-.1<r["chance"]<r["high"]+.1 and .2<r["chance"]<.3
