"What the lessons on bulk data cannot show: kills at random moments, every file format, a full disk, real text, training on many shards."
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mini import PRETRAIN, command, end, environment, numbers, one_message, run, start

from nanogpt.bulk import STATE, Shards, bulk, open_shards, plan, resume
from nanogpt.core import ConfigError, DataError
from nanogpt.corpus import documents, held_out
from nanogpt.data import Loader
from nanogpt.pieces import FATES, BulkConfig, own_lines, pieces
from nanogpt.shard import Shard, write_shard
from nanogpt.tokenizer import Tokenizer, get_tokenizer

@pytest.fixture(scope="module")
def tok(): return Tokenizer.train(["the cat sat on the mat and the hat "*20], 270)

def texts(n, seed=0):
    "Documents of 1 to 200 words, no two the same."
    rng = random.Random(seed)
    words = "the cat sat on mat and hat bird in a tree \u00e9t\u00e9 \u732b".split()
    return [f"{i} "+" ".join(rng.choices(words, k=rng.randint(1, 200))) for i in range(n)]

def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(o)+"\n" for o in rows), encoding="utf-8")
    return path

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A file of some hundred pieces, with doubles far apart."
    some = texts(3000)
    for k in range(0, 3000, 97): some[k] = some[(k*31)%500]
    return write_jsonl(tmp_path_factory.mktemp("source")/"a.jsonl", [dict(text=t) for t in some])

def config(source, out, **more):
    small = dict(val_tokens=20_000, shard_tokens=60_000, piece_bytes=15_000, dedup=True, workers=2)
    return BulkConfig(corpus=str(source), out=Path(out), **small | more)

def data(folder):
    "Every file but the lock, with its content."
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.name!=".lock"}

@pytest.fixture(scope="module")
def never(source, tok, tmp_path_factory):
    "What comes out when nobody kills anything."
    out = tmp_path_factory.mktemp("never")/"d"
    bulk(config(source, out), tok)
    assert len(data(out))>8
    return out

PROGRAM = """
import sys
from pathlib import Path
from nanogpt.bulk import bulk
from nanogpt.pieces import BulkConfig
from nanogpt.tokenizer import get_tokenizer
bulk(BulkConfig(corpus=sys.argv[1], out=Path(sys.argv[2]), val_tokens=20_000, shard_tokens=60_000, piece_bytes=15_000, dedup=True,
                workers=int(sys.argv[4])), get_tokenizer(sys.argv[3]))"""

SLOW = "import os, time\ndef slow(f, old=os.fsync): time.sleep(.05); old(f)\nos.fsync = slow\n" # so that no shard comes too fast to be met

def process(source, out, tok, workers=2, before=""):
    "A process that makes the same shards; `before` is Python to run first."
    tok.save(Path(out).parent/"tokenizer.json")
    words = [str(source), str(out), str(Path(out).parent/"tokenizer.json"), str(workers)]
    return subprocess.Popen([sys.executable, "-c", before+PROGRAM, *words], env=environment(), stderr=subprocess.PIPE, text=True)

def children(pid):
    "The processes that a process has started, and that still run."
    return [int(o) for o in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]!="Z"
    except OSError: return False

needs_proc = pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")

# ---- the same bytes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_show(source, tok, never, tmp_path, workers):
    "The same bytes from one, two and three workers."
    bulk(config(source, tmp_path/"d", workers=workers), tok)
    assert data(tmp_path/"d")==data(never)

@pytest.mark.parametrize("seed", [1, 2])
def test_killed_main_process(source, tok, never, tmp_path, seed):
    "SIGKILL at random moments, again and again; in the end the bytes are those of a run that was never killed."
    rng, out, killed = random.Random(seed), tmp_path/"d", 0
    for _ in range(9):
        p = process(source, out, tok, rng.choice((1, 2)), before=SLOW)
        had, moment = len(list(out.glob("train-*.bin"))) if out.exists() else 0, rng.choice(("shard", "time"))
        until = time.time()+(rng.random()*2 if moment=="time" else 60)
        while p.poll() is None and time.time()<until:
            if moment=="shard" and len(list(out.glob("train-*.bin")))>had: time.sleep(rng.random()*.02); break
            time.sleep(.002)
        p.kill()
        p.communicate()
        if p.returncode==0: break
        killed += 1
    if p.returncode!=0: bulk(config(source, out), tok)
    assert killed>=2 and data(out)==data(never)

def test_control_a_writer_that_ignores_the_place(source, tok, never, tmp_path):
    "The comparison can fail: whoever goes on at the front after a kill doubles documents."
    p = process(source, tmp_path/"d", tok)
    while len(list((tmp_path/"d").glob("train-*.bin")))<3: time.sleep(.002)
    p.kill(); p.communicate()
    state = json.loads((tmp_path/"d"/STATE).read_text())
    assert state["shards"] and not state["done"]
    for o in state["shards"]: o["next"] = [0, 0]
    (tmp_path/"d"/STATE).write_text(json.dumps(state))
    bulk(config(source, tmp_path/"d"), tok)
    assert data(tmp_path/"d")!=data(never)

@needs_proc
def test_nobody_outlives_a_killed_main_process(source, tok, tmp_path):
    p = process(source, tmp_path/"d", tok)
    while not (tmp_path/"d"/"train-00000.bin").exists(): time.sleep(.002)
    left = children(p.pid)
    p.kill(); p.communicate()
    assert len(left)>=2
    until = time.time()+20
    while any(map(alive, left)) and time.time()<until: time.sleep(.05)
    assert not [o for o in left if alive(o)]

@needs_proc
def test_killed_worker(source, tok, never, tmp_path):
    "A worker dies: one message that says how to go on, and the same command goes on to the same bytes."
    tok.save(tmp_path/"tokenizer.json")
    words = ("data", source, "--tokenizer", tmp_path/"tokenizer.json", "--out", tmp_path/"d", "--dedup", "--workers", 2,
             "--val_tokens", "20K", "--shard_tokens", "60K", "--piece_bytes", "15K")
    p = start(*words)
    while not (tmp_path/"d"/"train-00000.bin").exists(): time.sleep(.002); assert p.poll() is None
    workers = [o for o in children(p.pid) if "spawn_main" in Path(f"/proc/{o}/cmdline").read_text()]
    os.kill(random.Random(0).choice(workers), signal.SIGKILL)
    _, err = end(p, 2)
    one_message(err, "a worker process was killed", "give the same command again")
    run(*words)
    assert data(tmp_path/"d")==data(never)

def test_full_disk_leaves_the_earlier_shards(tok, tmp_path):
    "The third shard does not fit: two are whole, and with more room the same command makes the rest, as if nothing had been."
    some = [t for t in texts(600) if not held_out(t)]+[t for t in texts(600) if held_out(t)]
    huge = next(t for k in range(99) if not held_out(t := f"{k}"+" the cat"*200_000))
    at = len(some)//2
    file = write_jsonl(tmp_path/"a.jsonl", [dict(text=t) for t in [*some[:at], huge, *some[at:]]])
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (300_000,)*2)"
    (tmp_path/"x").mkdir()
    p = process(file, tmp_path/"x/d", tok, before=full)
    _, err = p.communicate(timeout=100)
    assert p.returncode!=0 and "DiskError" in err and "could not be written" in err
    state = json.loads((tmp_path/"x/d"/STATE).read_text())
    assert state["shards"] and not state["done"] and not list((tmp_path/"x/d").glob(".*.part"))
    for o in state["shards"]: Shard(tmp_path/"x/d"/o["name"], tok).verify()
    bulk(config(file, tmp_path/"x/d"), tok)
    bulk(config(file, tmp_path/"y"), tok)
    assert data(tmp_path/"x/d")==data(tmp_path/"y")

# ---- what becomes of every row ---------------------------------------------------------------------------------------

def test_counts_add_up(tok, tmp_path):
    "Every row has one fate; the counts and the texts in the shards are those of a slow loop."
    rng, rows = random.Random(0), []
    for t in texts(500):
        row = dict(text=rng.choice((t, t, t, "the same", "  ")))
        if rng.random()<.8: row["language"] = rng.choice(("en", "fr"))
        if rng.random()<.8: row[rng.choice(("score", "int_score"))] = rng.randint(0, 5)
        rows.append(row)
    file = write_jsonl(tmp_path/"a.jsonl", rows)
    with open(file, "a") as f: f.write("no JSON\n[1]\n")
    want, kept = Counter(bad_line=2), []
    for o in rows:
        score = o.get("score", o.get("int_score"))
        if not o["text"].strip(): why = "empty"
        elif o.get("language", "en")!="en": why = "language"
        elif score is not None and score<2: why = "score"
        elif held_out(o["text"]): why = "other_split"
        else: why = "duplicate" if o["text"] in kept else "kept"
        want[why] += 1
        if why!="kept": continue
        kept.append(o["text"])
        want.update({"no_language": "language" not in o, "no_score": score is None})
    got = bulk(config(file, tmp_path/"d", language="en", min_score=2., shard_tokens=3000, piece_bytes=999), tok)
    counts = got["train"]["counts"]
    assert counts=={k: v for k, v in want.items() if v} and sum(counts.get(k, 0) for k in FATES)==len(rows)+2
    train, _ = open_shards(tmp_path/"d", tok)
    assert [tok.decode(ids[1:]) for ids, _ in train]==kept and all(ids[0]==tok.eot for ids, _ in train)

def test_tokens_stop_and_counts_stop_with_them(source, tok, tmp_path):
    "With --tokens the shards end with the document that reaches them, and only rows up to there are counted."
    got = bulk(config(source, tmp_path/"d", tokens=100_000), tok)["train"]
    train, val = open_shards(tmp_path/"d", tok)
    assert 100_000<=got["tokens"]<100_000+len(train[-1][0]) and got["documents"]==got["counts"]["kept"]==len(train)
    assert [o.header.tokens>=60_000 for o in train.shards]==[True, False]
    assert all(held_out(tok.decode(ids[1:])) for ids, _ in val) and not any(held_out(tok.decode(ids[1:])) for ids, _ in train)

def test_formats(tok, tmp_path):
    "The same rows as .jsonl, .jsonl.gz, .parquet and .parquet.gz, or spread over a folder of them, are the same bytes."
    from pyarrow import Table, parquet
    rows = [dict(text=t, other=1) for t in texts(400)]
    a = write_jsonl(tmp_path/"1"/"a.jsonl", rows)
    for k in (2, 3, 4): (tmp_path/str(k)).mkdir()
    (tmp_path/"2"/"a.jsonl.gz").write_bytes(gzip.compress(a.read_bytes()))
    parquet.write_table(Table.from_pylist(rows), tmp_path/"3"/"a.parquet", row_group_size=70)
    (tmp_path/"4"/"c.parquet.gz").write_bytes(gzip.compress((tmp_path/"3"/"a.parquet").read_bytes()))
    write_jsonl(tmp_path/"5"/"a.jsonl", rows[:100])
    (tmp_path/"5"/"b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(o)+"\n" for o in rows[100:250]).encode()))
    parquet.write_table(Table.from_pylist(rows[250:]), tmp_path/"5"/"c.parquet")
    shards = []
    for k in range(1, 6):
        bulk(config(tmp_path/str(k), tmp_path/f"out{k}", dedup=False, shard_tokens=20_000, workers=1), tok)
        shards.append({k: v for k, v in data(tmp_path/f"out{k}").items() if k!=STATE})
    assert len(shards[0])>3 and all(o==shards[0] for o in shards)

def test_own_lines_every_cut():
    "Every size of piece over every small text gives every line once."
    for data in (b"", b"\n", b"a", b"a\n", b"\n\na\n\n", b"ab\ncde\n\nf"):
        want = data.split(b"\n")[:-1] if data.endswith(b"\n") or not data else data.split(b"\n")
        for size in range(1, len(data)+2): assert sum((own_lines(data, a, a+size) for a in range(0, len(data), size)), [])==want

# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [dict(dedup=False), dict(shard_tokens=50_000), dict(tokens=9), dict(piece_bytes=9), dict(language="en")])
def test_other_settings_are_refused(source, tok, never, tmp_path, change):
    shutil.copytree(never, tmp_path/"d")
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* there"): bulk(config(source, tmp_path/"d", **change), tok)
    assert data(tmp_path/"d")==data(never)

def test_another_source_vocabulary_or_shard_is_refused(source, tok, never, tmp_path):
    out = shutil.copytree(never, tmp_path/"d")
    other = write_jsonl(tmp_path/"a.jsonl", [dict(text=t) for t in texts(10)])
    with pytest.raises(ConfigError, match="another source"): bulk(config(other, out), tok)
    with pytest.raises(ConfigError, match="another tokenizer"): bulk(config(source, out), Tokenizer.gpt2())
    shutil.copy(out/"train-00001.bin", out/"train-00000.bin")
    with pytest.raises(DataError, match="is not the shard"): resume(out, plan(config(source, out), tok))
    write_shard(tmp_path/"e"/"train.bin", [[1]], tok.fingerprint, tok.n_vocab)
    with pytest.raises(ConfigError, match=r"train\.bin of another command"): bulk(config(source, tmp_path/"e"), tok)

def test_nothing_to_train_on(tok, tmp_path):
    file = write_jsonl(tmp_path/"a.jsonl", [dict(text=t, score=1) for t in texts(50)])
    with pytest.raises(DataError, match="no held-out text .* 50 rows: 50 score"): bulk(config(file, tmp_path/"d", min_score=3.), tok)
    file = write_jsonl(tmp_path/"b.jsonl", [dict(text=t) for t in texts(200) if held_out(t)])
    with pytest.raises(DataError, match="no text to train on"): bulk(config(file, tmp_path/"e"), tok)

def test_hub_without_network(tmp_path):
    "The known message, from the main process, and no shard."
    before = "import os; os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'"
    done = run("data", "fineweb-edu", "--tokens", "10B", "--out", tmp_path/"d", code=2, before=before)
    one_message(done.stderr, "must come from the hub, and the hub is out of reach", "set NANOGPT_DATA")
    assert not list((tmp_path/"d").glob("*.bin"))

def test_options_of_one_corpus_need_one_corpus(tmp_path):
    done = run("data", "tales:0.5,pydocs:0.5", "--tokens", "1K", "--dedup", "--out", tmp_path/"d", code=2)
    one_message(done.stderr, "--dedup works on one corpus without a weight")

# ---- files of datatrove ----------------------------------------------------------------------------------------------

def datatrove(path, some, tok, width=2, ends_with=True):
    "The layout of datatrove's TokenizedFile: ids, the places behind the documents, and three lines about them."
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[*tok.encode(t), *[tok.eot]*ends_with] for t in some]
    np.array(sum(rows, []), f"<u{width}").tofile(path)
    np.cumsum([len(o) for o in rows]).astype("<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"{tok.name}|{width}\n{sum(map(len, rows))}\n1 kT")

@pytest.mark.parametrize("width", [2, 4])
def test_datatrove_gives_the_same_shards(tok, tmp_path, width):
    "Two tokenised files make the bytes that their texts make: same split, same doubles, same borders."
    some = texts(400)
    some[300:320] = some[:20]
    file = write_jsonl(tmp_path/"a.jsonl", [dict(text=t) for t in some])
    datatrove(tmp_path/"ds/00000_00000_shuffled.ds", some[:150], tok, width)
    datatrove(tmp_path/"ds/00001_00000_shuffled.ds", some[150:], tok, width)
    bulk(config(file, tmp_path/"t", shard_tokens=20_000), tok)
    got = bulk(config(file, tmp_path/"d", shard_tokens=20_000, datatrove=tmp_path/"ds"), tok)
    assert got["train"]["counts"]["duplicate"] and "no_end" not in got["train"]["counts"]
    assert {k: v for k, v in data(tmp_path/"d").items() if k!=STATE}=={k: v for k, v in data(tmp_path/"t").items() if k!=STATE}

def test_datatrove_without_ends_is_counted(tok, tmp_path):
    datatrove(tmp_path/"ds/a.ds", texts(100), tok, ends_with=False)
    got = bulk(config("x", tmp_path/"d", datatrove=tmp_path/"ds"), tok)["train"]["counts"]
    assert got["no_end"]==got["kept"]

def test_damaged_datatrove_is_refused(tok, tmp_path):
    file = tmp_path/"ds/a.ds"
    datatrove(file, texts(50), tok)
    attempt = lambda t=tok: bulk(config("x", tmp_path/"d", datatrove=tmp_path/"ds", workers=1), t)
    with pytest.raises(DataError, match="not with gpt2"): attempt(Tokenizer.gpt2())
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="does not fit"): attempt()
    Path(f"{file}.index").unlink()
    with pytest.raises(DataError, match="index cannot be read"): attempt()
    shutil.rmtree(tmp_path/"ds"); (tmp_path/"ds").mkdir()
    with pytest.raises(DataError, match="holds no .ds file"): attempt()

# ---- training on many shards -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [1, 7, 64, 5000])
def test_many_shards_are_one(never, tok, tmp_path, T):
    "Every window of every length is that of one file, across all borders; so is a state, in both directions."
    many, _ = open_shards(never, tok)
    assert isinstance(many, Shards) and len(many.shards)>3
    write_shard(tmp_path/"one.bin", (ids for ids, _ in many), tok.fingerprint, tok.n_vocab)
    one = Shard(tmp_path/"one.bin", tok)
    assert (many.starts==one.starts).all() and len(many)==len(one)
    a, b = Loader(many, T, 3, docs=True), Loader(one, T, 3, docs=True)
    borders = [e//T+d for e in many.ids.ends for d in (-1, 0)]
    for k in [*borders, *range(0, a.windows, max(1, a.windows//200))]:
        for x, y in zip(a.rows[min(k, a.windows-1)], b.rows[min(k, a.windows-1)], strict=True): assert (x==y).all()
    for _ in range(5): a.next(); b.next()
    state = a.state_dict()
    assert {k: v for k, v in state.items() if k!="data"}=={k: v for k, v in b.state_dict().items() if k!="data"}
    with pytest.raises(ConfigError, match="data="): b.load_state_dict(state)

def test_pretraining_on_many_shards(never, tok, tmp_path):
    "A run on many shards logs the numbers of a run on one file; an unfinished folder is refused."
    many, _ = open_shards(never, tok)
    one = tmp_path/"one"
    write_shard(one/"train.bin", (ids for ids, _ in many), tok.fingerprint, tok.n_vocab)
    for name in ("val.bin", "tokenizer.json"): shutil.copy(never/name, one/name)
    for name, where in (("a", never), ("b", one)): run(*PRETRAIN, "--data", where, "--out", tmp_path/name)
    assert numbers(tmp_path/"a")==numbers(tmp_path/"b") and numbers(tmp_path/"a")[0]
    part = shutil.copytree(never, tmp_path/"part")
    state = json.loads((part/STATE).read_text())
    (part/STATE).write_text(json.dumps(state | dict(done=False)))
    one_message(run(*PRETRAIN, "--data", part, "--out", tmp_path/"c", code=2).stderr, "is not finished")

# ---- real text -------------------------------------------------------------------------------------------------------

def test_fineweb_edu(data_home, tmp_path):
    "The FineWeb-Edu sample with GPT-2's vocabulary: as many tokens as tiktoken itself counts, and an end-of-text per document."
    import tiktoken

    from nanogpt.tokenizer import PATTERN, gpt2_ranks
    bare = tiktoken.Encoding("bare", pat_str=PATTERN, mergeable_ranks=gpt2_ranks(), special_tokens={})
    want = {s: [len(bare.encode_ordinary(t)) for t in documents("fineweb-edu", s)] for s in ("train", "test")}
    got = bulk(BulkConfig(corpus="fineweb-edu", out=tmp_path/"d", shard_tokens=50_000, workers=2), get_tokenizer("gpt2"))
    for part, split in (("train", "train"), ("val", "test")):
        assert (got[part]["tokens"], got[part]["documents"])==(sum(want[split])+len(want[split]), len(want[split]))
    assert got["train"]["shards"]>=3

def test_hub_rows_go_the_same_way(tok, tmp_path, monkeypatch):
    "A stream of the hub, played by a function: the shards are those of the same rows in a file."
    import nanogpt.bulk as b
    import nanogpt.pieces as p
    rows = [dict(text=t, language="en", score=3.1, url="x") for t in texts(2500)]
    monkeypatch.setattr(p, "_hub", lambda where, split: iter(rows))
    monkeypatch.setattr(b, "locate", lambda name: ("HuggingFaceFW/fineweb-edu", "sample-10BT", {}))
    assert [len(o[1]) for o in pieces(("a", "b", {}))]==[1000, 1000, 500]
    bulk(config("fineweb-edu", tmp_path/"h", language="en"), tok)
    monkeypatch.undo()
    bulk(config(write_jsonl(tmp_path/"a.jsonl", rows), tmp_path/"f", language="en"), tok)
    assert {k: v for k, v in data(tmp_path/"h").items() if k!=STATE}=={k: v for k, v in data(tmp_path/"f").items() if k!=STATE}

def test_command_line_words():
    "`data fineweb-edu --tokens 10B` is understood; a command that only looks prints no progress."
    from nanogpt.cli import parse_only
    run_it, cfg = parse_only("data fineweb-edu --tokens 10B --shard_tokens 1.5M --out d".split())
    assert (run_it.__name__, cfg.corpus, cfg.tokens, cfg.shard_tokens, cfg.one())==("run_data", "fineweb-edu", 10**10, 1_500_000, True)
    assert command("data")[-1]=="data"
