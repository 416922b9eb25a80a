"What the lesson on data cannot show: every length against every batch, every byte of a damaged file, a full disk, real packing."
import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import nanogpt.data as data
from nanogpt.core import ConfigError, DataError
from nanogpt.data import Loader, Packed, Windows, first_fit, pack, prepare, take
from nanogpt.shard import Shard, write_shard
from nanogpt.tokenizer import Tokenizer

VOCABULARY = "5a"*32

@pytest.fixture(scope="module")
def tok(): return Tokenizer.train(["the cat sat on the mat and the hat "*20], 270)

@pytest.fixture
def running(tmp_path):
    "A shard of 151 different ids in documents of 1 to 9."
    ids, rng, rows = list(range(1000, 1151)), random.Random(0), []
    while ids: n = rng.randint(1, 9); rows.append(ids[:n]); ids = ids[n:]
    write_shard(tmp_path/"run.bin", rows, VOCABULARY, 2000)
    return Shard(tmp_path/"run.bin")

@pytest.fixture
def talks(tmp_path):
    "A shard of 60 conversations with masks; every id is different."
    rng, rows, at = random.Random(1), [], 0
    for _ in range(60):
        n, q = rng.randint(4, 30), rng.randint(1, 3)
        rows.append((list(range(at, at+n)), [0]*q+[1]*(n-q)))
        at += n
    write_shard(tmp_path/"talks.bin", rows, VOCABULARY, at, mask=True)
    return Shard(tmp_path/"talks.bin"), rows

def learnt(batch): return [t for t in batch.y.flatten().tolist() if t!=-100]

# ---- every token once ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [1, 2, 3, 10, 75, 149, 150, 151, 400])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_every_token_once_per_epoch(running, T, B):
    loader = Loader(running, T, B, seed=T)
    n = loader.windows*B  # that many batches are exactly B epochs
    seen = [[t for t in row if t!=-100] for _ in range(loader.windows) for row in loader.next().y.tolist()]
    assert len(seen)==n and loader.epoch==B
    for e in range(B):
        epoch = [t for row in seen[e*loader.windows:(e+1)*loader.windows] for t in row]
        assert sorted(epoch)==list(range(1001, 1151))

def test_targets_follow_inputs(running):
    for b in (Loader(running, 7, 4).next() for _ in range(5)):
        assert all(y in (x+1, -100) for x, y in zip(b.x.flatten().tolist(), b.y.flatten().tolist(), strict=True))

def test_one_pass_in_order_does_not_move_the_position(running):
    loader = Loader(running, 7, 4)
    assert [t for b in loader.once() for t in learnt(b)]==list(range(1001, 1151)) and loader.position==0
    shares = [[t for b in Loader(running, 7, 4, rank=r, world=3).once() for t in learnt(b)] for r in range(3)]
    assert sorted(sum(shares, []))==list(range(1001, 1151))

def test_unshuffled_is_the_order_of_the_file(running):
    loader = Loader(running, 10, 1, shuffle=False)
    assert [t for _ in range(loader.windows) for t in learnt(loader.next())]==list(range(1001, 1151))

def test_document_numbers(running):
    for x, _, doc in Windows(running, 20, docs=True):
        owner = [int(np.searchsorted(running.starts, i-1000, side="right")) for i in x if i]  # 0 fills the last window up
        assert doc[:len(owner)].tolist()==[o-owner[0] for o in owner]
    b = Loader(running, 20, 2, docs=True).next()
    assert b.doc.shape==b.x.shape and b.doc.dtype==torch.int64 and Loader(running, 20, 2).next().doc is None

# ---- resume and ranks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", range(0, 40))
def test_resume_at_every_position(running, stop):
    fresh = lambda: Loader(running, 6, 3, seed=9)
    never, first, second = fresh(), fresh(), fresh()
    want = [never.next() for _ in range(45)]
    for _ in range(stop): first.next()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.epoch==first.epoch
    for k in range(stop, 45):
        b = second.next()
        assert torch.equal(b.x, want[k].x) and torch.equal(b.y, want[k].y)

@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("B", [1, 2, 3])
def test_ranks_share_one_order(running, world, B):
    one, ranks = Loader(running, 6, B*world, seed=2), [Loader(running, 6, B, seed=2, rank=r, world=world) for r in range(world)]
    for _ in range(40):
        parts = torch.stack([r.next().y for r in ranks], 1)  # (B, world, T)
        assert torch.equal(parts.flatten(0, 1), one.next().y)
    assert len({json.dumps(r.state_dict()) for r in [one, *ranks]})==1

def test_the_number_of_ranks_may_change(running):
    a, b = Loader(running, 6, 6, seed=2), Loader(running, 6, 2, seed=2, rank=1, world=3)
    for _ in range(7): a.next(); b.next()
    c = Loader(running, 6, 6, seed=2); c.load_state_dict(b.state_dict())
    assert torch.equal(a.next().y, c.next().y)

def test_seeds_differ_and_epochs_differ(running):
    order = lambda seed: [tuple(learnt(b)) for loader in [Loader(running, 6, 1, seed=seed)] for b in (loader.next() for _ in range(75))]
    assert order(0)==order(0)!=order(1)
    n = Loader(running, 6, 1).windows
    assert order(0)[:n]!=order(0)[n:2*n]

def test_the_shuffle_is_frozen(running):
    "A state saved today must mean the same rows in ten years: these numbers are RandomState's, which never change."
    loader = Loader(running, 15, 1, seed=3)
    want = np.random.RandomState([3, 0]).permutation(loader.windows)
    assert [loader.next().x[0, 0].item()-1000 for _ in range(loader.windows)]==[15*k for k in want]

@pytest.mark.parametrize("change", [dict(seq_len=7), dict(seed=1), dict(shuffle=False)])
def test_a_state_of_another_order_is_refused(running, change):
    state = Loader(running, 6, 3).state_dict()
    settings = dict(seq_len=6, batch=3) | change
    with pytest.raises(ConfigError, match="there, "): Loader(running, **settings).load_state_dict(state)

# ---- packing ---------------------------------------------------------------------------------------------------------

def test_first_fit_is_first_fit():
    "Against the definition: look at all rows from the front."
    rng = random.Random(0)
    for _ in range(50):
        width, want, space = 20, [], []
        lengths = [rng.randint(1, width) for _ in range(rng.randint(0, 60))]
        for k, n in enumerate(lengths):
            r = next((i for i, s in enumerate(space) if s>=n), None)
            if r is None: r = len(space); space.append(width); want.append([])
            space[r] -= n; want[r].append(k)
        assert first_fit(lengths, width)==want

def test_conversations_stay_whole(talks):
    shard, rows = talks
    packed = Packed(shard, 40)
    assert sorted(c for m in packed.members for c in m)==list(range(60)) and (packed.cut, packed.dropped)==(0, 0)
    for k, members in enumerate(packed.members):
        x, y, doc = packed[k]
        at = 0
        for j, c in enumerate(members):
            ids, mask = rows[c]
            n = min(len(ids), 40-at)  # the very last id of a full row is only a target
            assert x[at:at+n].tolist()==ids[:n] and set(doc[at:at+n])=={j}
            inside = min(len(ids)-1, 40-at)
            assert y[at:at+inside].tolist()==[i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)][:inside]
            if at+len(ids)-1<40: assert y[at+len(ids)-1]==-100  # never into the next conversation
            at += len(ids)
        assert (y[at:]==-100).all() and (doc[at:]==len(members)).all()

def test_every_answer_token_once_per_epoch(talks):
    shard, rows = talks
    want = sorted(i for ids, mask in rows for i, m in zip(ids, mask, strict=True) if m)
    for T, B in ((30, 1), (40, 3), (64, 4)):
        loader = Loader(shard, T, B)
        assert sorted(t for b in loader.once() for t in learnt(b))==want
        seen = Counter(t for _ in range(loader.windows) for t in learnt(loader.next()))
        assert seen==Counter({t: B for t in want})
        assert loader.next().doc is not None

def test_too_long_is_cut_or_dropped_and_said(capsys):
    rows = [([1]*50, [0]*2+[1]*48), ([2]*50, [0]*40+[1]*10), ([3]*5, [0]*5), ([4]*5, [0, 1, 1, 1, 1])]
    packed = pack(iter(rows), 9, pad=7)
    assert (packed.cut, packed.dropped, len(packed)) == (1, 2, 2)
    assert "1 longer than a row were cut at its end, 2 with nothing to learn were dropped" in capsys.readouterr().err
    assert packed[1][0].tolist()==[4]*5+[7]*4
    with pytest.raises(DataError, match="none of 1 conversations"): pack(rows[2:3], 9)

def test_a_cut_shard_says_so_when_loaded(talks, capsys):
    loader = Loader(talks[0], 10, 2)
    assert "cut at its end" in capsys.readouterr().err and loader.rows.cut>0
    Loader(talks[0], 10, 2, rank=1, world=2)
    assert capsys.readouterr().err==""  # one process speaks for all

# ---- files -----------------------------------------------------------------------------------------------------------

def test_every_cut_is_named(running):
    good = running.path.read_bytes()
    for n in range(0, len(good), 7):
        running.path.with_name("cut.bin").write_bytes(good[:n])
        with pytest.raises(DataError, match="cut.bin"): Shard(running.path.with_name("cut.bin"))

def test_every_flipped_byte_is_found(talks):
    good, at = talks[0].path.read_bytes(), talks[0].path.with_name("bad.bin")
    for k in range(256, len(good), 101):
        at.write_bytes(good[:k]+bytes([good[k]^4])+good[k+1:])
        with pytest.raises(DataError, match="another sha256"): Shard(at).verify()

def test_other_files_are_named(running, tmp_path, tok):
    for name, content in (("text.bin", b"hello"*100), ("empty.bin", b"")):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not a shard"): Shard(tmp_path/name)
    with pytest.raises(DataError, match="none.bin cannot be read"): Shard(tmp_path/"none.bin")
    with pytest.raises(DataError, match="cannot be read"): Shard(tmp_path)
    both = r"vocabulary of 2000 ids \(fingerprint 5a5a5a5a\), the tokenizer bpe-270 has 270 ids"
    with pytest.raises(DataError, match=both): Shard(running.path, tok)

@pytest.mark.parametrize("n_vocab,width", [(65_536, 2), (65_537, 4)])
def test_width_follows_the_vocabulary(tmp_path, n_vocab, width):
    write_shard(tmp_path/"w.bin", [[0, n_vocab-1]], VOCABULARY, n_vocab)
    shard = Shard(tmp_path/"w.bin")
    assert shard.header.width==width and shard.ids.tolist()==[0, n_vocab-1]
    for bad in (-1, n_vocab):
        with pytest.raises(DataError, match=f"holds id {bad}"): write_shard(tmp_path/"x.bin", [[0], [5, bad]], VOCABULARY, n_vocab)
    assert sorted(o.name for o in tmp_path.iterdir())==["w.bin"]

def test_too_short_to_predict(tmp_path):
    write_shard(tmp_path/"one.bin", [[5]], VOCABULARY, 10)
    with pytest.raises(DataError, match="nothing can be predicted"): Windows(Shard(tmp_path/"one.bin"), 4)

def test_a_full_disk_leaves_what_was_there(tmp_path):
    "A limit on the file size stands for a full disk; the old file stays whole and no part is left."
    code = f"""
import resource, signal
from nanogpt.shard import write_shard
write_shard({str(tmp_path/'a.bin')!r}, [[1,2,3]], {VOCABULARY!r}, 10)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: write_shard({str(tmp_path/'a.bin')!r}, ([1]*1000 for _ in range(1000)), {VOCABULARY!r}, 10)
except Exception as e: print(type(e).__name__)
"""
    assert hasattr(resource, "RLIMIT_FSIZE")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert out.stdout=="DiskError\n", out.stderr
    assert os.listdir(tmp_path)==["a.bin"] and Shard(tmp_path/"a.bin").ids.tolist()==[1, 2, 3]

# ---- prepare ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def corpora(monkeypatch):
    "Toy corpora in place of the real ones; `calls` records who was asked for what."
    texts, calls = dict(many=["the cat"]*500, few=["on the mat", "sat"], none=[]), []
    def documents(name, split="train", seed=0): calls.append((name, split, seed)); return iter(texts[name])
    monkeypatch.setattr(data, "documents", documents)
    return calls

def test_shares(tok, tmp_path, corpora, capsys):
    got = prepare([("many", .75), ("few", .25)], tok, tmp_path/"d", tokens=600, val_share=.1, seed=5)
    train, val = got["train"]["corpora"], got["val"]["corpora"]
    longest = 1+max(len(tok.encode(o)) for o in ("the cat", "on the mat", "sat"))
    assert 450<=train["many"]["tokens"]<450+longest and 150<=train["few"]["tokens"]<150+longest
    assert train["few"]["passes"]>1 and "it starts again" in capsys.readouterr().err
    assert ("few", "train", 5) in corpora and ("few", "train", 6) in corpora and ("few", "test", 5) in corpora
    assert val["few"]["passes"]<=1 and sum(o["tokens"] for o in val.values())==got["val"]["tokens"]
    shard = Shard(tmp_path/"d"/"train.bin", Tokenizer.load(tmp_path/"d"/"tokenizer.json"))
    shard.verify()
    assert all(ids[0]==tok.eot and tok.eot not in ids[1:] for ids, _ in shard) and len(shard)==got["train"]["documents"]

def test_without_weights_a_corpus_is_read_once(tok, tmp_path, corpora):
    assert prepare("few", tok, tmp_path/"d")["train"]["documents"]==2
    assert prepare([("many", None), ("few", None)], tok, tmp_path/"d")["train"]["documents"]==502
    assert prepare("many", tok, tmp_path/"d", tokens=50)["train"]["tokens"]<60

def test_val_tokens(tok, tmp_path, corpora):
    assert 100<=prepare("many", tok, tmp_path/"d", tokens=600, val_tokens=100)["val"]["tokens"]<110

def test_nothing_is_left_of_a_failure(tok, tmp_path, corpora):
    for mix, kind, says in (("none", DataError, "no train text came from none"), ("many:1", ConfigError, "--tokens")):
        with pytest.raises(kind, match=says): prepare(mix, tok, tmp_path/"d")
    assert os.listdir(tmp_path)==[]

def test_take_counts_what_it_gives(tok, corpora):
    count = {}
    rows = list(take("many", "train", tok, 100, True, 0, count))
    assert count==dict(tokens=sum(map(len, rows)), documents=len(rows), passes=1) and count["tokens"]-len(rows[-1])<100<=count["tokens"]

def test_the_corpora_that_are_always_there(tok, tmp_path):
    got = prepare("tales:0.5,pydocs:0.5", tok, tmp_path/"d", tokens=20_000)
    assert got["train"]["tokens"]>=20_000 and got["val"]["tokens"]>0
    again = prepare("tales:0.5,pydocs:0.5", tok, tmp_path/"e", tokens=20_000)
    assert got==again and (tmp_path/"d"/"train.bin").read_bytes()==(tmp_path/"e"/"train.bin").read_bytes()
