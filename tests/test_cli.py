"The command line from outside: help, exit codes, what is printed where, and one clear message for everything a user can fix."
import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module

import pytest
from mini import PRETRAIN, SFT, command, copy, environment, here, one_message, run, tree

from nanogpt.cli import VERBS, parse_only
from nanogpt.settings import settings

FAST = "--device cpu --dtype float32 --kernel fused --threads 1".split()

@pytest.fixture
def refused(call):
    "Runs a verb that must be refused: exit 2, one message, no result."
    def refused(*words, says=()):
        code, out, err = call(*words)
        text = one_message(err, *says)
        assert (code, out)==(2, "")
        return text
    return refused

def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

# ---- help ------------------------------------------------------------------------------------------------------------

def test_help_needs_no_torch():
    "`nanogpt --help` and a verb that does not exist answer before anything heavy is imported."
    for words in ("['--help']", "['speedrnu']", "['--version']"):
        heavy = "{'torch', 'numpy', 'tiktoken', 'datasets'} & set(sys.modules)"
        code = f"import sys; from nanogpt.cli import main; main({words}); print({heavy})"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert out.stdout.splitlines()[-1]=="set()", out.stderr

def test_usage_names_every_verb():
    "Every verb stands in the help of `nanogpt`, and no words at all are the same as --help."
    out = run("--help").stdout
    assert all(f"\n  {verb} " in out for verb in VERBS) and run().stdout==out

@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_names_every_setting(verb, call):
    "A verb's help is drawn from its settings: each flag with its meaning, its default, and its choices."
    code, out, err = call(*verb.split(), "--help")
    module, cls = VERBS[verb][0].split(".")
    cls = getattr(import_module(f"nanogpt.{module}"), cls)
    flat = " ".join(out.split())
    assert (code, err)==(0, "") and "--config FILE" in out and "Traceback" not in out
    for f in fields(cls):
        assert f"--{f.name} " in out, f.name
        assert " ".join(f.metadata["help"].split()) in flat, f.name
        if f.default is MISSING: assert "required" in flat
        for choice in f.metadata["choices"]: assert choice in flat
    for preset in getattr(cls, "presets", ()): assert preset in flat

# ---- exit codes ------------------------------------------------------------------------------------------------------

def test_exit_codes(whole, tmp_path):
    "0 done, 2 the user can fix it, 3 there is no checkpoint."
    assert run("ckpt", "latest", whole).stdout.strip()==str(whole/"ckpt/step-00000030")
    assert run("ckpt", "latest", tmp_path/"none", "--json", code=3).stdout==""
    for what in ("list", "verify"): assert here("ckpt", what, tmp_path/"none", "--json")==(3, "")
    for what in ("list", "verify", "latest"):
        assert f"there is no folder {tmp_path}/none" in run("ckpt", what, tmp_path/"none", code=3).stderr
    one_message(run("pretrain", "--sead", 3, code=2).stderr, "did you mean --seed?")
    for verb in ("speedrun", "pretrain"): # one never works in several processes, the other not without a place to meet
        one_message(run(verb, code=2, before="import os; os.environ['WORLD_SIZE']='2'").stderr, "WORLD_SIZE=2")

def test_our_own_mistake_is_not_the_users():
    "An error nobody foresaw is exit 1, with its traceback; Ctrl-C is 130, without."
    err = run("tokenizer", code=1, before="import nanogpt.cli as c\nc._run = lambda run, cfg: 1/0").stderr
    assert "ZeroDivisionError" in err and "mistake of the program" in err and "fix:" not in err
    err = run("tokenizer", code=130, before="import nanogpt.cli as c\ndef stop(run, cfg): raise KeyboardInterrupt\nc._run = stop").stderr
    assert "stopped" in err and "Traceback" not in err

def test_a_path_that_is_something_else(refused, whole, tmp_path):
    "A file where a folder is wanted is the user's mistake; a folder of runs leads to the run in it."
    file = write(tmp_path/"own.txt", "A text.\n\n"*50)
    refused("data", "--corpus", file, "--out", file, "--tokenizer", "gpt2", says=("own.txt", "another file or folder"))
    copy(whole, tmp_path/"demo/base")
    refused("generate", "--model", tmp_path/"demo", "--prompt", "x", says=(f"try --model {tmp_path/'demo/base'}",))

def test_a_reader_that_leaves(whole):
    "`nanogpt generate | head -c 1` ends without a traceback."
    words = command("generate", "--model", whole, "--prompt", "One day,", "--max_tokens", 100, "--threads", 1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as p:
        os.read(p.stdout.fileno(), 1)
        p.stdout.close()
        err = p.stderr.read().decode()
    assert p.returncode!=0 and "Traceback" not in err and "Exception" not in err

@pytest.mark.parametrize("words,near", [
    ("speedrnu", "speedrun"),
    ("pretran --steps 3", "pretrain"),
    ("ckpt lst x", "ckpt list"),
    ("bench", "bench train"),
    ("bench trian", "bench train"),
    ("pretrain --step 3", "--steps"),
    ("sft --ephocs 2", "--epochs"),
    ("generate --temprature=1", "--temperature"),
    ("eval --modle x", "--model"),
    ("pretrain --preset dmo", "--preset demo"),
    ("sft --preset doly", "--preset dolly"),
    ("speedrun --preset real", "real-small"),
    ("speedrun --recipe dmo", "demo"),
    ("data --corpus tals --tokens 99 --out {}/d", "tales"),
    ("pretrain --corpus fineweb --tokenizer gpt2 --out {}/d", "fineweb-edu"),
    ("pretrain --shape gpt3", "gpt2"),
    ("eval --model {} --tasks talse", "tales"),
    ("pretrain --steps", "--help"),
    ("pretrain extra", "--help"),
    ("sft", "--init"),
    ("generate --model x", "--prompt"),
])
def test_unknown_names_the_nearest(words, near, refused, tmp_path):
    "A verb, flag, preset, choice or corpus that does not exist names the one that was meant."
    refused(*words.format(tmp_path).split(), says=[near])
    assert not tree(tmp_path)

@pytest.mark.parametrize("words,says", [
    ("pretrain --steps many", "--steps='many' is not a whole number"),
    ("pretrain --lr fast", "--lr='fast' is not a number"),
    ("pretrain --compile maybe", "true or false"),
    ("pretrain --lr nan", "--lr=nan"),
    ("pretrain --steps -1", "--steps=-1"),
    ("pretrain --keep 1", "--keep 2"),
    ("pretrain --batch_tokens 1000", "--batch_tokens=1000 is not a multiple"),
    ("pretrain --threads -1", "--threads=-1"),
    ("pretrain --seed -1", "--seed=-1"),
    ("pretrain --dropout 2", "dropout=2"),
    ("pretrain --n_embd 17 --n_head 2", "n_embd=17"),
    ("pretrain --corpus tales:-1", "-1"),
    ("pretrain --corpus ,", "names no corpus"),
    ("pretrain --device cuda", "--device=cuda"),
    ("pretrain --corpus tales --corpus_tokens -5", "tokens=-5"),
    ("tokenizer --vocab_size 10", "10"),
    ("generate --model x --prompt x --temperature -1", "--temperature=-1"),
    ("generate --model x --prompt x --top_p 2", "--top_p=2"),
    ("generate --model x --prompt x --max_tokens 0", "--max_tokens=0"),
    ("bench generate --tokens 0", "tokens"),
    ("bench generate --tokens 5000", "5000"),
    ("bench generate --shape gpt2 --against nobody", "nobody"),
    ("bench generate --shape tiny --against transformers", "tiny"),
    ("eval --model x --limit 0", "--limit=0"),
    ("eval --model x --tasks ,", "task"),
    ("speedrun --limit -3", "--limit=-3"),
])
def test_impossible_values_name_flag_and_value(words, says, refused, shards, tmp_path):
    "A value that cannot be meant is refused with its flag, before anything is written."
    if "cuda" in words and import_module("torch").cuda.is_available(): pytest.skip("this machine has what the test says is missing")
    more = ("--out", tmp_path/"run") if words.split()[0] in ("pretrain", "speedrun") else ()
    if more and words.startswith("pretrain") and "--corpus" not in words: more += ("--data", shards)
    if words.endswith("--n_head 2") or "--dropout" in words: more += ("--seq_len", 32, "--batch_tokens", 64, "--micro_batch", 2)
    refused(*words.split(), *more, says=[says])
    assert not tree(tmp_path)

# ---- --config --------------------------------------------------------------------------------------------------------

def test_config_files(call, tmp_path):
    "TOML and JSON say the same as flags; a preset is below the file, the file below the flags."
    toml = write(tmp_path/"a.toml", 'tokenizer = "gpt2"\nprompt = "Hello world"\njson = true\n')
    js = write(tmp_path/"a.json", '{"tokenizer": "gpt2", "prompt": "Hello world", "json": true}')
    want = call("tokenizer", "--tokenizer", "gpt2", "--prompt", "Hello world", "--json")
    assert want[0]==0 and call("tokenizer", "--config", toml)==call("tokenizer", "--config", js)==want
    assert json.loads(call("tokenizer", "--config", toml, "--prompt", "Hi")[1])["pieces"]==["Hi"]
    file = write(tmp_path/"b.toml", "steps = 11\nlr = 0.5\nn_layer = 3\n")
    cfg = parse_only(["pretrain", "--preset", "demo", "--config", str(file), "--lr", "0.25"])[1]
    assert (cfg.steps, cfg.lr, cfg.n_layer, cfg.optimizer)==(11, .25, 3, "muon")

def test_the_record_of_a_run_is_a_config_file(whole, tuned, tmp_path):
    "What a run wrote down about its settings starts the same run again."
    for verb, folder in (("pretrain", whole), ("sft", tuned)):
        saved = json.loads((folder/"config.json").read_text())["settings"]
        file = write(tmp_path/f"{verb}.json", json.dumps(saved))
        assert settings(parse_only([verb, "--config", str(file)])[1])==saved

BAD_CONFIGS = {
    "none.toml": (None, "none.toml"),
    "list.json": ("[1, 2]", "list.json"),
    "number.json": ("3", "number.json"),
    "text.json": ('"steps"', "text.json"),
    "torn.json": ('{"steps": 3', "torn.json"),
    "torn.toml": ("steps = = 3", "torn.toml"),
    "bytes.json": (b'\xff\xfe\x00', "bytes.json"),
    "empty.json": ("", "empty.json"),
    "unknown.toml": ("step = 3", "did you mean --steps?"),
    "wrong.toml": ('steps = "many"', "--steps='many'"),
    "choice.json": ('{"optimizer": "sgd"}', "--optimizer='sgd'"),
    "table.toml": ('[pretrain]\nsteps = 3', "pretrain"),
    "nested.json": ('{"corpus": {"tales": 1}}', "corpus"),
    "null.json": ('{"steps": null}', "steps"),
    "latin.yaml": ("steps: 3", "latin.yaml"),
}

@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config_files_are_named(name, refused, tmp_path):
    "A settings file that is missing, broken, of another form, or with an unknown name or value is one message."
    text, says = BAD_CONFIGS[name]
    if text is not None: write(tmp_path/name, text)
    refused("pretrain", "--config", tmp_path/name, "--out", tmp_path/"run", says=[says])
    assert not (tmp_path/"run").exists()

def test_bad_config_values_of_other_kinds(refused, tmp_path):
    "A folder is no settings file; a number is no list of tasks."
    refused("pretrain", "--config", tmp_path, says=[tmp_path])
    refused("eval", "--config", write(tmp_path/"t.json", '{"model": "x", "tasks": 5}'), says=["tasks"])

# ---- bad input, from outside -----------------------------------------------------------------------------------------

WORDS = dict(PRETRAIN=" ".join(PRETRAIN), SFT=" ".join(SFT))

def untouched(tmp_path, had):
    "Only what was there before is there now; no temporary folder either."
    assert tree(tmp_path)==had and not [p for p in tmp_path.rglob(".*")]

OUTSIDE = {"missing file": ("{PRETRAIN} --corpus {tmp}/none.txt --out {tmp}/run", "none.txt"),
    "empty corpus": ("{PRETRAIN} --corpus {tmp}/empty.txt --out {tmp}/run", "empty.txt"),
    "unknown preset": ("{PRETRAIN} --preset gtp2 --out {tmp}/run", "did you mean --preset gpt2?"),
    "vocabulary and shards": ("{PRETRAIN} --data {tmp}/mixed --out {tmp}/run", "vocabulary of 400 ids"),
    "another model": ("{PRETRAIN} --data {shards} --n_layer 2 --out {tmp}/base", "of another model"),
    "context": ("{SFT} --init {whole} --seq_len 512 --batch_tokens 1024 --out {tmp}/run", "--seq_len=512"),
    "no network": ("{PRETRAIN} --corpus owner/name --out {tmp}/run", "hub is out of reach"),
    "unknown flag": ("{PRETRAIN} --data {shards} --sed 3 --out {tmp}/run", "did you mean --seed?")}

@pytest.fixture
def mess(tmp_path, shards, whole):
    "A folder with an empty file, shards beside the tokenizer of others, and a run of another shape."
    write(tmp_path/"empty.txt", "")
    copy(shards, tmp_path/"mixed")
    run("tokenizer", "--corpus", "tales", "--vocab_size", 300, "--tokenizer_bytes", 20_000, "--out", tmp_path/"other")
    (tmp_path/"other/tokenizer.json").replace(tmp_path/"mixed/tokenizer.json")
    (tmp_path/"other").rmdir()
    copy(whole, tmp_path/"base")
    return tmp_path

def test_bad_input_from_outside(mess, shards, whole):
    "Each item of the list: exit 2, nothing on stdout, one message that names the thing, and nothing left behind."
    names, had = WORDS | dict(tmp=mess, shards=shards, whole=whole), tree(mess)
    wrong = []
    for name, (line, says) in OUTSIDE.items():
        try:
            done = run(*line.format(**names).split(), code=2)
            one_message(done.stderr, says)
            assert done.stdout==""
            untouched(mess, had)
        except AssertionError as e: wrong.append(f"{name}: {e}")
    assert not wrong, "\n\n".join(wrong)

INSIDE = {"data: missing file": ("data --corpus {tmp}/none.txt --out {tmp}/d", "none.txt"),
    "data: empty corpus": ("data --corpus {tmp}/empty.txt --out {tmp}/d", "empty.txt"),
    "data: no end": ("data --corpus tales --out {tmp}/d", "--tokens"),
    "data: no tokens": ("data --corpus tales --tokens 0 --out {tmp}/d", "tokens"),
    "data: weights": ("data --corpus tales:1 --out {tmp}/d", "--tokens"),
    "data: no tokenizer": ("data --corpus tales --tokens 99 --tokenizer {tmp}/none --out {tmp}/d", "none"),
    "pretrain: no tokens": ("pretrain --corpus tales --corpus_tokens 0 --out {tmp}/run", "tokens"),
    "tokenizer: empty corpus": ("tokenizer --corpus {tmp}/empty.txt --out {tmp}/t", "empty.txt"),
    "tokenizer: missing": ("tokenizer --tokenizer {tmp}/none.json --prompt x", "none.json"),
    "pretrain: no data": ("pretrain --data {tmp}/none --out {tmp}/run", "--data="),
    "pretrain: out is a file": ("{PRETRAIN} --data {shards} --out {tmp}/empty.txt", "empty.txt"),
    "pretrain: init": ("{PRETRAIN} --data {shards} --init {tmp}/none --out {tmp}/run", "none"),
    "pretrain: init of another vocabulary": ("{PRETRAIN} --data {tmp}/small --init {whole} --out {tmp}/run", "vocabulary"),
    "pretrain: longer than init": ("{PRETRAIN} --data {shards} --init {whole} --seq_len 512 --batch_tokens 1024 --out {tmp}/run",
                                   "--seq_len=512"),
    "sft: missing file": ("{SFT} --init {whole} --corpus {tmp}/none.jsonl --out {tmp}/run", "none.jsonl"),
    "sft: empty corpus": ("{SFT} --init {whole} --corpus {tmp}/empty.txt --out {tmp}/run", "empty.txt"),
    "sft: no rows": ("{SFT} --init {whole} --rows 0 --out {tmp}/run", "rows"),
    "sft: short rows": ("{SFT} --init {whole} --seq_len 4 --micro_batch 1 --batch_tokens 4 --out {tmp}/run", "--seq_len"),
    "sft: no model": ("sft --init {tmp}/none --out {tmp}/run", "none"),
    "generate: no model": ("generate --model {tmp}/none --prompt x", "none"),
    "generate: too long": ("generate --model {whole} --prompt {long}", "256"),
    "generate: damaged": ("generate --model {tmp}/damaged --prompt x", "model.safetensors"),
    "chat: no model": ("chat --terminal --model {tmp}/none", "none"),
    "chat: no model for the page": ("chat --no_open --port 0 --model {tmp}/none --runs {tmp}", "make demo"),
    "chat: nobody named": ("chat --terminal --runs {tmp}", "nanogpt speedrun --out runs/demo"),
    "chat: no password": ("chat --host 0.0.0.0 --password_file {tmp}/none", "argon2id"),
    "eval: no model": ("eval --model {shards}", "no model"),
    "eval: no data set": ("eval --model {whole} --tasks hellaswag --limit 2", "hellaswag"),
    "ckpt: no folder": ("ckpt list", "--dir")}

@pytest.mark.parametrize("name", INSIDE)
def test_bad_input(name, refused, shards, whole, tmp_path, monkeypatch):
    "The same for every verb: one message that names the thing, and nothing left behind."
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests")))
    write(tmp_path/"empty.txt", "")
    if "small" in INSIDE[name][0]:
        run("tokenizer", "--corpus", "tales", "--vocab_size", 300, "--tokenizer_bytes", 20_000, "--out", tmp_path/"t")
        run("data", "--corpus", "tales", "--tokens", 3000, "--tokenizer", tmp_path/"t", "--out", tmp_path/"small")
    if "damaged" in name:
        f = copy(whole, tmp_path/"damaged")/"model/model.safetensors"
        data = bytearray(f.read_bytes()); data[-9] ^= 1
        f.write_bytes(data)
    had = tree(tmp_path)
    line, says = INSIDE[name]
    names = WORDS | dict(tmp=tmp_path, shards=shards, whole=whole, long="word"*2000)
    if name in ("data: no end", "data: no tokens", "pretrain: no tokens", "chat: no model for the page"): # not refused it would never end
        names = [str(w) for w in line.format(**names).split()]
        with limited(): refused(*names, says=[says])
    else: refused(*line.format(**names).split(), says=[says])
    untouched(tmp_path, had)

@contextlib.contextmanager
def limited(seconds=20):
    "A promise that something ends, not how fast."
    def late(*_): raise RuntimeError("this never ends")
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally: signal.alarm(0); signal.signal(signal.SIGALRM, old)

# ---- what programs read ----------------------------------------------------------------------------------------------

def objects(out): return [json.loads(line) for line in out.splitlines()]

def test_eval_json(tuned):
    "One object per metric on stdout: task, metric, version, value, n, and an interval that holds the value."
    done = run("eval", "--model", tuned, "--limit", 2, "--json", "--threads", 1, "--device", "cpu")
    rows = objects(done.stdout)
    assert {"val_loss", "closed_qa", "endings"} <= {o["metric"] for o in rows}
    for o in rows:
        assert {"task", "metric", "version", "value", "n", "low", "high"} <= set(o) and o["task"]=="tales" and o["n"]>0
        assert o["low"]-1e-9<=o["value"]<=o["high"]+1e-9
    text = run("eval", "--model", tuned, "--limit", 2, "--threads", 1, "--device", "cpu").stdout
    assert len(text.splitlines())==len(rows) and all(f"{o['value']:.4f}" in text for o in rows)

def test_eval_takes_a_dtype(tuned, call):
    "`nanogpt eval --tasks … --limit N --dtype float32 --json` is a line that scripts may rely on."
    assert call("eval", "--model", tuned, "--tasks", "tales", "--limit", 1, "--dtype", "float32", "--json")[0]==0

def test_generate_json(whole, tuned, call):
    "One object with the whole answer and why it ended; the streamed text is the same, and the same seed says the same."
    words = ("generate", "--model", whole, "--prompt", "One day,", "--max_tokens", 12)
    code, out, _ = call(*words, "--json")
    [o] = objects(out)
    assert code==0 and {"prompt", "text", "tokens", "reason", "chat"} <= set(o) and o["chat"] is False and o["tokens"]<=12
    assert call(*words)[1]==o["text"]+"\n"==call(*words)[1]
    for more, chat in (((), True), (("--chat", "no"), False)):
        out = call("generate", "--model", tuned, "--prompt", "Hi", "--max_tokens", 4, "--json", *more)[1]
        assert objects(out)[0]["chat"] is chat

def test_generate_reads_stdin_and_streams(whole):
    "`--prompt -` takes the text from a pipe; the answer is on stdout, the remark on stderr."
    done = run("generate", "--model", whole, "--prompt", "-", "--max_tokens", 5, "--threads", 1, input="One day, a fox")
    assert done.stdout.endswith("\n") and "max_tokens" not in done.stdout and "--max_tokens 5" in done.stderr

def test_tokenizer_json(call):
    "One object with the vocabulary's facts and the pieces of the text; a text that spells a special token stays text."
    code, out, err = call("tokenizer", "--tokenizer", "gpt2", "--prompt", "Hello <|endoftext|> world", "--json")
    [o] = objects(out)
    assert (code, err)==(0, "") and (o["name"], o["n_vocab"], len(o["fingerprint"]))==("gpt2", 50_304, 64)
    assert "".join(o["pieces"])=="Hello <|endoftext|> world" and max(o["ids"])<50_256 and len(o["ids"])==len(o["pieces"])

def test_a_vocabulary_that_is_not_kept(call, tmp_path, monkeypatch):
    "Without --out a vocabulary is learnt and lost, and that is said; one that is read, or written, is no news."
    monkeypatch.chdir(tmp_path)
    words = ("tokenizer", "--corpus", "tales", "--vocab_size", 300, "--tokenizer_bytes", 5000)
    code, out, err = call(*words)
    assert code==0 and "300 ids" in out and "nothing is saved: add --out DIR" in err and not list(tmp_path.iterdir())
    assert "nothing is saved" not in call(*words, "--out", "t")[2] and "nothing is saved" not in call("tokenizer", "--tokenizer", "t")[2]

def test_data_json(call, shards, tmp_path):
    "One object that counts what was written, per corpus; the remarks on the way are on stderr."
    code, out, err = call("data", "--corpus", "tales", "--tokens", 2000, "--tokenizer", shards, "--out", tmp_path/"d", "--json")
    [o] = objects(out)
    assert code==0 and o["train"]["tokens"]>=2000 and o["val"]["tokens"]>0 and set(o["train"]["corpora"])=={"tales"} and "train.bin" in err
    assert sorted(tree(tmp_path))==["d/tokenizer.json", "d/train.bin", "d/val.bin"]

def test_ckpt_json(call, whole, tmp_path):
    "One object per checkpoint: where it is and whether it is whole. Looking changes nothing."
    out = copy(whole, tmp_path/"run")
    newest = sorted((out/"ckpt").iterdir())[-1]
    write(newest/"config.json", "{}")
    had = tree(out)
    code, text, _ = call("ckpt", "list", out, "--json")
    rows = objects(text)
    assert code==0 and [o["valid"] for o in rows]==[True, True, False]
    assert rows[-1]["path"]==str(newest) and "config.json" in rows[-1]["error"]
    code, text, _ = call("ckpt", "latest", "--dir", out, "--json")
    assert code==0 and objects(text)[0]["path"]==rows[1]["path"]
    code, text, _ = call("ckpt", "verify", out, "--json")
    assert code==3 and objects(text)[0]["valid"] is False
    assert call("ckpt", "verify", rows[0]["path"])[0]==0 and tree(out)==had

@pytest.mark.parametrize("what,more", [("train", {"peak_share", "kernel"}), ("generate", {"prefill_seconds"})])
def test_bench_json(what, more):
    "One object with the shape, the numbers and the speed; nothing else on stdout."
    [o] = objects(run("bench", what, "--shape", "tiny", "--rounds", 1, "--batch", 1, "--tokens", 4, "--json", *FAST).stdout)
    assert {"shape", "dtype", "batch", "seconds", "tokens_per_second"} | more <= set(o)
    assert (o["shape"], o["dtype"], o["batch"])==("tiny", "float32", 1) and o["seconds"]>0 and o["tokens_per_second"]>0

RIVAL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig: vocab_size: int; block_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head = torch.nn.Embedding(cfg.vocab_size, cfg.vocab_size)
        print("a rival may print")
    def configure_optimizers(self, weight_decay, lr, betas, device): return torch.optim.AdamW(self.parameters(), lr, betas)
    def forward(self, x, y): return None, self.head(x).logsumexp(-1).mean()
"""

def test_race_beside_a_rival(tmp_path):
    "A model.py that looks like nanoGPT's is trained in turns with ours; what it prints stays away from the result."
    write(tmp_path/"model.py", RIVAL)
    words = "bench race --shapes 12m --rounds 1 --batch 1 --kernel fused --no_compile --dtype float32 --threads 1 --json".split()
    done = run(*words, "--versus", tmp_path/"model.py")
    [o] = objects(done.stdout)
    assert "a rival may print" in done.stderr and set(o["rival"])==set(o["ratio"])=={"compiled", "documented"}
    for way, ratio in o["ratio"].items():
        assert abs(ratio-o["tokens_per_second"]/o["rival"][way])<1e-9
    write(tmp_path/"broken.py", "raise OSError('not here')")
    done = run(*words, "--versus", tmp_path/"broken.py", code=2)
    assert "OSError: not here" in done.stderr and done.stderr.rstrip().endswith("fix: look at its own message above")

def test_progress_and_results_are_apart(shards, tmp_path):
    "Progress goes to stderr, the result to stdout: a pipe gets the result alone, and it says what to type next."
    done = run(*PRETRAIN, "--data", shards, "--out", tmp_path/"run", "--steps", 2)
    first, second = done.stdout.splitlines()
    assert "done after 2 steps" in first and second.startswith("next: python -m nanogpt generate --model")
    assert "loss" in done.stderr and "\r" not in done.stderr

# ---- the terminal chat -----------------------------------------------------------------------------------------------

def test_chat_streams_and_ends(whole):
    "Questions come from stdin, answers stream to stdout piece by piece, and the end of the input ends the chat."
    # an answer ends with a line's end; one inside it only makes this test ask the next question early
    words, pieces = command("chat", "--terminal", "--model", whole, "--max_tokens", 120, "--threads", 1), []
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0) as p:
        for question in (b"Who are you?\n", b"Tell me a story.\n"):
            p.stdin.write(question)
            while piece := os.read(p.stdout.fileno(), 4096):
                pieces.append(piece)
                if piece.endswith(b"\n"): break
        p.stdin.close()
        rest, err = p.stdout.read(), p.stderr.read().decode()
    assert p.returncode==0, err
    assert len(pieces)>=6
    (b"".join(pieces)+rest).decode() # whole letters only
    assert "Ask something." in err and "is not a tuned run" in err and "Traceback" not in err

def test_chat_commands(tuned):
    "/new forgets, an unknown command is named, a question that is too long is refused, and the chat goes on."
    said = "\n".join(["Hi", "/new", "/nwe", "word"*2000, "Hi", "/quit", "never asked", ""])
    done = run("chat", "--terminal", "--model", tuned, "--max_tokens", 4, "--threads", 1, input=said)
    for text in ("(a new chat)", "no command /nwe", "ask a shorter question"): assert text in done.stderr
    assert "tuned run" not in done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first and last and "Traceback" not in done.stderr
