"What the lessons on generating cannot show: kills of a real process, the command line from outside, every item of bad input."
import io
import json
import random

import pytest
import torch
from mini import one_message, start, tree, wait

from nanogpt import batch
from nanogpt.beam import BeamConfig, beam
from nanogpt.checkpoint import model_tensors, save_folder, save_model
from nanogpt.cli import main
from nanogpt.core import write_json
from nanogpt.model import GPT, GPTConfig
from nanogpt.settings import settings
from nanogpt.tokenizer import Tokenizer
from nanogpt.vocab import from_hub

def toy(tok, block_size=64):
    "A random model with decided opinions."
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tok.n_vocab, block_size=block_size, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters(): p.mul_(4) if p.dim()>1 else None
    return model.eval()

@pytest.fixture(scope="module")
def tok(): return Tokenizer.train(["the cat sat on the mat and the naïve rat ran. 猫 "*9], 300)

@pytest.fixture(scope="module")
def home(tok, tmp_path_factory):
    "A folder with a model in it."
    home = tmp_path_factory.mktemp("models")
    save_model(home/"m", toy(tok), tok)
    return home

@pytest.fixture
def call(capsys, monkeypatch, home):
    "`nanogpt generate` with that model, in this process; gives exit code, stdout and stderr."
    for name in ("NANOGPT_DATA", "WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    def call(*words, model="m", stdin=None):
        capsys.readouterr()
        if stdin is not None: monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return (main(["generate", "--model", str(home/model), *map(str, words)]), *capsys.readouterr())
    return call

def wishes(path, n=40, seed=0):
    "Rows of every kind: settings of their own, conversations no base model takes, slips, blank lines, a prompt that comes again."
    rng, words = random.Random(seed), "the cat sat on mat and rat ran".split()
    rows = []
    for k in range(n):
        row = dict(prompt=" ".join(rng.choices(words, k=rng.randint(1, 9))), id=rng.choice((k, f"row {k}", None)))
        if k%5==1: row |= dict(seed=rng.randrange(9), temperature=rng.choice((0, 1.5)), max_tokens=rng.randint(1, 9))
        if k%7==2: row["prompt"] = "the cat"
        if k%11==3: row["temprature"] = 1
        rows.append(json.dumps(row))
    rows[n//2:n//2] = ["", '{"prompt": "the', '{"prompt": ""}', json.dumps(dict(prompt="the cat "*60)),
                       '{"messages": [{"role": "user", "content": "Hi"}]}']
    path.write_text("\n".join(rows)+"\n", encoding="utf-8")
    return path

def objects(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

# ---- a file of prompts -----------------------------------------------------------------------------------------------

FILE = "--batch 4 --max_tokens 12 --temperature 1.2 --threads 1 --device cpu".split()

@pytest.fixture
def never(call, tmp_path):
    "The prompts, and the answers of a run that nobody stopped."
    prompts, out = wishes(tmp_path/"prompts.jsonl"), tmp_path/"never.jsonl"
    code, said, err = call("--prompts", prompts, "--out", out, *FILE, "--json")
    rows = objects(out)
    assert code==3 and json.loads(said)["rows"]==len(rows)==44 and json.loads(said)["bad"]==sum("error" in o for o in rows)==8
    assert "44 of 44 rows" in err and "tokens/s" in err and "8 bad" in err
    return prompts, out

SLOW = "import os, time\ndef slow(f, old=os.fsync): time.sleep(.05); old(f)\nos.fsync = slow" # so that no batch comes too fast to be met

def test_killed_and_typed_again(call, never, home, tmp_path):
    "kill -9 of the process, twice, and the last line torn as well: in the end the bytes are those of a run that nobody stopped."
    prompts, whole = never
    out, lines, killed = tmp_path/"out.jsonl", lambda: out.read_bytes().count(b"\n") if out.exists() else 0, 0
    for least in (4, 16):
        p = start("generate", "--model", home/"m", "--prompts", prompts, "--out", out, *FILE, before=SLOW)
        assert wait(p, lambda least=least: lines()>least), p.stderr.read()
        p.kill()
        err = p.communicate()[1]
        assert p.returncode==-9 and ("going on after" in err)==(killed>0)
        killed += 1
        assert least<lines()<44 and whole.read_bytes().startswith(out.read_bytes())
        out.write_bytes(out.read_bytes()[:-7]) # what a kill in the middle of a write leaves
    code, said, err = call("--prompts", prompts, "--out", out, *FILE)
    assert code==3 and "44 rows" in said and "going on after 1" in err and killed==2 and out.read_bytes()==whole.read_bytes()
    assert "whole already" in call("--prompts", prompts, "--out", out, *FILE)[2] and out.read_bytes()==whole.read_bytes()

def test_control_whoever_believes_a_torn_line(call, never, tmp_path, monkeypatch):
    "The comparison can fail: a rule that takes a line without its end for a row glues the next answer to it."
    prompts, whole = never
    data = whole.read_bytes()
    (tmp_path/"out.jsonl").write_bytes(data[:data.index(b"\n", 900)])
    batch.plan_file(whole).rename(batch.plan_file(tmp_path/"out.jsonl"))
    def careless(lines, total, batch): lines = list(lines); return len(lines), len(b"".join(lines))
    monkeypatch.setattr(batch, "kept", careless)
    call("--prompts", prompts, "--out", tmp_path/"out.jsonl", *FILE)
    assert len((tmp_path/"out.jsonl").read_bytes())==len(data)-1

@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_size_of_a_batch_does_not_show(call, never, tmp_path, size):
    prompts, whole = never
    call("--prompts", prompts, "--out", tmp_path/"out.jsonl", *FILE, "--batch", size)
    assert (tmp_path/"out.jsonl").read_bytes()==whole.read_bytes()

def test_a_row_is_what_a_command_with_its_settings_gives(call, never):
    "Also for a prompt that comes several times; every line of the file that is not blank has its answer, in order, with its id."
    prompts, whole = never
    lines = prompts.read_text(encoding="utf-8").split("\n")
    answers = objects(whole)
    assert [o["line"] for o in answers]==[n for n, line in enumerate(lines, 1) if line.strip()]
    good = [(json.loads(lines[o["line"]-1]), o) for o in answers if "error" not in o]
    for row, o in good: assert o.get("id")==row.get("id") and ("id" in o)==("id" in row)
    for row, o in [good[1], *[g for g in good if g[0]["prompt"]=="the cat"][:2]]:
        own = [w for k, v in row.items() if k not in ("prompt", "id") for w in (f"--{k}", v)]
        alone = json.loads(call("--prompt", row["prompt"], *FILE, "--json", *own)[1])
        assert (alone["text"], alone["tokens"], alone["reason"])==(o["text"], o["tokens"], o["reason"])

def test_bad_rows_are_named_by_line(call, never, tmp_path):
    prompts, whole = never
    err = call("--prompts", prompts, "--out", tmp_path/"out.jsonl", *FILE)[2]
    bad = [o for o in objects(whole) if "error" in o]
    for o in bad: assert f"{prompts}:{o['line']}: {o['error']}" in err and o["fix"]
    says = ("temprature", "no JSON", "is empty", "the context is 64", "tuned on conversations")
    assert all(any(text in o["error"] for o in bad) for text in says)

@pytest.mark.parametrize("change,says", [
    (["--seed", 1], "seed=0 there, seed=1 now"),
    (["--max_tokens", 13], "max_tokens=12 there, max_tokens=13 now"),
    (["--prompts", "other.jsonl"], "another prompts"),
    (["--model", "other"], "another model"),
])
def test_another_command_is_refused(call, never, home, tok, tmp_path, change, says):
    "A file that holds the answers of one command never gets those of another, and is left as it is."
    prompts, whole = never
    if "other" in change: save_model(home/"other", toy(tok, 96), tok)
    (tmp_path/"other.jsonl").write_text('{"prompt": "the rat"}\n')
    had = tree(tmp_path)
    change = [{"other": home/"other", "other.jsonl": tmp_path/"other.jsonl"}.get(w, w) for w in change]
    code, out, err = call("--prompts", prompts, "--out", whole, *FILE, *change)
    one_message(err, says, "another --out")
    assert (code, out)==(2, "") and tree(tmp_path)==had

def test_somebody_elses_file_and_two_at_once(call, never, tmp_path):
    prompts, whole = never
    (tmp_path/"notes.txt").write_text("mine\n")
    assert call("--prompts", prompts, "--out", tmp_path/"notes.txt", *FILE)[0]==2 and (tmp_path/"notes.txt").read_text()=="mine\n"
    assert call("--prompts", prompts, "--out", prompts, *FILE)[0]==2
    with batch.claimed(tmp_path/"out.jsonl", {}):
        one_message(call("--prompts", prompts, "--out", tmp_path/"out.jsonl", *FILE)[2], "another process is writing")

# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def odd(home, tok):
    "A model with weights that are no numbers, and one whose vocabulary names no end."
    def broken(folder):
        from safetensors.torch import save_file
        model = toy(tok)
        with torch.no_grad(): model.transformer.ln_f.weight[3] = float("nan")
        save_file(model_tensors(model), folder/"model.safetensors")
        write_json(folder/"config.json", dict(model_type="nanogpt", **settings(model.cfg)))
        tok.save(folder/"tokenizer.json")
    save_folder(home/"nan", broken)
    from nanogpt.vocab import spell_bytes
    letters = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100)), *map(chr, range(256, 324))]
    assert len({spell_bytes(o) for o in letters})==256
    endless = from_hub(dict(model=dict(type="BPE", vocab={o: k for k, o in enumerate(letters)}, merges=[]),
                            pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False)))
    save_model(home/"endless", toy(endless), endless)
    (home/"p.jsonl").write_text('{"prompt": "the cat"}\n')
    return home

BAD = {"no prompt": ("", "--prompt"),
    "empty": ("--prompt ''", "the prompt is empty"),
    "too long": ("--prompt LONG", "the context is 64"),
    "no end": ("--model {home}/endless --prompt x", "has no end token"),
    "top_p": ("--prompt x --top_p 0", "--top_p=0"),
    "temperature": ("--prompt x --temperature -1", "--temperature=-1"),
    "nan": ("--model {home}/nan --prompt x", "not finite"),
    "nan, streamed": ("--model {home}/nan --prompt x --stream yes", "not finite"),
    "two ways": ("--prompt x --prompts {home}/p.jsonl", "--prompt and --prompts do not fit"),
    "a file streams": ("--prompts {home}/p.jsonl --out {home}/o.jsonl --stream yes", "--stream yes and --prompts do not fit"),
    "nowhere to": ("--prompts {home}/p.jsonl", "--prompts needs --out"),
    "no file": ("--prompt x --out {home}/o.jsonl", "--out needs --prompts"),
    "missing file": ("--prompts {home}/none.jsonl --out {home}/o.jsonl", "none.jsonl"),
    "system": ("--prompt x --system y", "--system is for conversations"),
    "batch": ("--prompt x --batch 0", "--batch=0"),
    "unknown stop": ("--prompt x --stop '<|done|>'", "--stop <|done|> is no token"),
    "n do not fit": ("--prompt x --n 1000000000", "lower --n"),
    "beams do not fit": ("--prompt x --beams 1000000000", "--beams"),
    "rows do not fit": ("--prompts {home}/p.jsonl --out {home}/o.jsonl --n 1000000000", "lower --n"),
    "more than the beams": ("--prompt x --beams 2 --n 3", "--n=3"),
    "nan, searched": ("--model {home}/nan --prompt x --beams 3", "not finite"),
    "nan, guessed ahead": ("--model {home}/nan --draft {home}/m --prompt x", "not finite"),
    "another vocabulary guesses": ("--prompt x --draft {home}/endless", "another vocabulary"),
    "several stream": ("--prompt x --n 2 --stream yes", "--stream yes and --n do not fit"),
    "a search streams": ("--prompt x --beams 2 --stream yes", "--stream yes and --beams do not fit"),
    "a search with dice": ("--prompt x --beams 2 --top_p 0.5", "--beams and --top_p do not fit"),
    "groups without beams": ("--prompt x --groups 2 --diversity 1", "--groups needs --beams"),
    "guesses for several": ("--prompt x --lookup 2 --n 2", "--lookup and --n do not fit"),
    "guesses for a file": ("--prompts {home}/p.jsonl --out {home}/o.jsonl --draft {home}/m", "--draft and --prompts do not fit"),
    "guesses with rules": ("--prompt x --lookup 2 --no_repeat_ngram 3", "--lookup and --no_repeat_ngram do not fit"),
    "who guesses": ("--prompt x --ahead 3", "--ahead needs --draft or --lookup"),
    "unread": ("--prompt x --logprobs 2", "--logprobs needs --json")}

@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, odd, capsys):
    "Exit 2, nothing on stdout, one message that names the thing and a fix; nothing is left behind."
    import shlex
    line, says = BAD[name]
    words = [{"LONG": "the cat "*60}.get(w, w) for w in shlex.split(line.format(home=odd))]
    had = tree(odd)
    code = main(["generate", *([] if "--model" in words else ["--model", str(odd/"m")]), *words])
    out, err = capsys.readouterr()
    one_message(err, says)
    assert (code, out)==(2, "") and tree(odd)==had

def test_flags_that_clash_are_refused_before_the_model_is_looked_for(capsys):
    assert main("generate --model nowhere --prompt x --prompts y".split())==2
    one_message(capsys.readouterr().err, "--prompt and --prompts do not fit")

def test_a_model_without_end_may_be_given_one(call, odd):
    code, out, err = call("--prompt", "x", "--stop", "e", "--json", model="endless")
    assert code==0 and "e" not in json.loads(out)["text"]

def test_control_good_input(call, odd):
    "The same models and flags without the slip."
    assert call("--prompt", "x", "--top_p", .5, "--temperature", 0)[0]==0

# ---- several answers, a search, guesses ------------------------------------------------------------------------------

def test_several_answers(call):
    "The first of several is the one that comes alone; to people they are shown with their numbers."
    words = ("--prompt", "the cat", "--max_tokens", 9)
    one, several = (json.loads(call(*words, *more, "--json")[1]) for more in ((), ("--n", 3)))
    assert len(several["answers"])==3 and len({o["text"] for o in several["answers"]})>1
    assert all(several[k]==several["answers"][0][k]==one[k] for k in ("text", "tokens", "reason"))
    shown = call(*words, "--n", 3)[1]
    assert [f"[{k}] {o['text']}" in shown for k, o in enumerate(several["answers"], 1)]==[True]*3

def test_a_search_is_the_lessons_search(call, tok):
    words = ("--prompt", "the cat", "--beams", 4, "--n", 3, "--max_tokens", 8, "--length_penalty", 0.5, "--no_repeat_ngram", 2)
    cfg = BeamConfig(beams=4, n=3, max_tokens=8, length_penalty=.5, no_repeat_ngram=2)
    found, = beam(toy(tok), tok, [[tok.eot, *tok.encode("the cat")]], cfg)
    said = json.loads(call(*words, "--json")[1])["answers"]
    assert [(o["text"], o["reason"]) for o in said]==[(o.text, o.reason) for o in found]
    scores = [round(o.score, 4) for o in found]
    assert [round(o["score"], 4) for o in said]==scores==sorted(scores, reverse=True)

def test_a_search_through_a_file(call, tmp_path):
    "Rows may change the search too; the size of a batch does not show, and a setting of dice is a bad row."
    rows = [dict(prompt="the cat"), dict(prompt="the rat ran", beams=3, n=2)]
    rows += [dict(prompt="a mat", length_penalty=0), dict(prompt="a", top_p=.5)]
    (tmp_path/"p.jsonl").write_text("".join(json.dumps(o)+"\n" for o in rows))
    for size in (1, 9):
        words = ("--prompts", tmp_path/"p.jsonl", "--out", tmp_path/f"{size}.jsonl", "--beams", 2, "--max_tokens", 6, "--batch", size)
        assert call(*words)[0]==3
    answers = objects(tmp_path/"1.jsonl")
    assert (tmp_path/"1.jsonl").read_bytes()==(tmp_path/"9.jsonl").read_bytes() and len(answers[1]["answers"])==2
    assert "score" in answers[0] and "unknown name 'top_p'" in answers[3]["error"]

@pytest.mark.parametrize("how", [("--lookup", 2), ("--draft", "m"), ("--draft", "m", "--ahead", 2, "--stream", "yes")], ids=str)
def test_guesses_change_nothing(call, home, how):
    "Greedy, the same text; the counts are told on stderr, and in the object."
    words = ("--prompt", "the cat sat on the", "--temperature", 0, "--max_tokens", 20)
    how = [home/"m" if w=="m" else w for w in how]
    plain, (code, out, err) = call(*words)[1], call(*words, *how)
    assert code==0 and out==plain and "guesses accepted" in err
    last = json.loads(call(*words, *how, "--json")[1].splitlines()[-1])
    assert last["text"]+"\n"==plain and last["rounds"]>0 and last["accepted"]<=last["proposed"]

def test_log_probabilities(call):
    said = json.loads(call("--prompt", "the cat", "--temperature", 0, "--max_tokens", 9, "--logprobs", 3, "--json")[1])
    assert len(said["logprobs"])==said["tokens"]>0 and "".join(o["text"] for o in said["logprobs"])==said["text"]
    for o in said["logprobs"]:
        best = o["top"][0]
        assert o["logprob"]<=0 and len(o["top"])==3 and (best["id"], best["text"], best["logprob"])==(o["id"], o["text"], o["logprob"])

def test_a_full_context_slides_if_it_may(call):
    "A prompt that is too long is read from its end, and what was forgotten is told."
    words = ("--prompt", "the cat "*60, "--max_tokens", 5, "--overflow", "slide")
    said, (code, out, err) = json.loads(call(*words, "--json")[1]), call(*words)
    assert code==0 and said["dropped"]>0 and f"the {said['dropped']} oldest tokens" in err and out==said["text"]+"\n"

# ---- one prompt ------------------------------------------------------------------------------------------------------

def test_stdin_streams_and_objects(call):
    "A pipe may be empty; what is streamed, joined, is the text of the object."
    whole = json.loads(call("--prompt", "the cat", "--json")[1])
    assert call("--prompt", "-", stdin="the cat")[1]==call("--prompt", "the cat", "--stream", "no")[1]==whole["text"]+"\n"
    *pieces, last = map(json.loads, call("--prompt", "-", "--json", "--stream", "yes", stdin="the cat")[1].splitlines())
    assert last==whole and "".join(o["piece"] for o in pieces)==whole["text"] and len(pieces)>1
    for nothing in ("", "\n"): assert call("--prompt", "-", stdin=nothing)[0]==2

def test_help_is_in_groups(capsys):
    main(["generate", "--help"])
    out = capsys.readouterr().out
    order = ("\n  --model ", "\n  --prompts ", "How to choose the next token", "\n  --temperature ", "Where to compute", "\n  --device ")
    assert all(text in out for text in order) and [*map(out.index, order)]==sorted(map(out.index, order))
