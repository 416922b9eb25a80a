"What the lessons on tokenizers cannot show: real English by the megabyte, all of Unicode, and OpenAI's own files."
import gzip
import hashlib
import os
import random
import subprocess
import sys
import time
import unicodedata
from importlib.resources import files
from pathlib import Path

import pytest
import regex
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from nanogpt.bpe import BPE, PATTERN, train_bpe
from nanogpt.core import DataError
from nanogpt.tokenizer import GPT2_SHA256, SPECIALS, Streamer, Tokenizer, get_tokenizer, ranks_text

DATA = Path(os.environ.get("NANOGPT_DATA", "none"))
needs = lambda path: pytest.mark.skipif(not (DATA/path).exists(), reason=f"set NANOGPT_DATA to a folder with {path}")
LETTERS = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs")]  # all that have a name
PROSE = "The cat's nine lives: it sat, didn't it? 1,234 times.\n\n  naïve 猫猫, 🐈 and e\u0301.\t\"We'll see,\" said Tom. "

@pytest.fixture(scope="module")
def gpt2(): return Tokenizer.gpt2()

@pytest.fixture(scope="module")
def own(): return Tokenizer.train([PROSE*3, "the cat sat on the mat and the hat "*20], 400)

@pytest.fixture(scope="module")
def theirs():
    "GPT-2 as tiktoken builds it, from OpenAI's two files."
    at = [str(DATA/"tokenizer"/o) for o in ("vocab.bpe", "encoder.json")]
    ranks = data_gym_to_mergeable_bpe_ranks(*at)
    return tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})

def soup(rng, n): return "".join(rng.choice([rng.choice(LETTERS), rng.choice(" \n\t'sx9.é猫"), " the", "'ll", "  "]) for _ in range(n))

# ---- training --------------------------------------------------------------------------------------------------------

def slow_train(text, n):
    "Byte-pair encoding by its definition: count all pairs anew before each merge."
    words, merges = [tuple(w.encode()) for w in regex.findall(PATTERN, text)], []
    while len(merges)<n:
        counts = {}
        for w in words:
            for p in zip(w, w[1:], strict=False): counts[p] = counts.get(p, 0)+1
        best = min(counts, key=lambda p: (-counts[p], p), default=None)
        if best is None or counts[best]<2: break
        new, merges = 256+len(merges), [*merges, best]
        for k, w in enumerate(words):
            out, i = [], 0
            while i<len(w): joins = w[i:i+2]==best; out.append(new if joins else w[i]); i += 1+joins
            words[k] = tuple(out)
    return merges

@pytest.mark.parametrize("seed", range(6))
def test_same_merges_as_the_definition(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(["ab", "ba", "aaa", " a", "猫", "'s", " ", "x\n"], k=600))
    assert train_bpe([text], 256+80).merges==slow_train(text, 80)

def test_ties_and_order_do_not_matter():
    texts = [f" {a}{b}" for a in "abcd" for b in "efgh"]*2  # every pair occurs equally often
    some = train_bpe(texts, 300).merges
    assert some==train_bpe(texts[::-1], 300).merges==slow_train("".join(texts), 44)
    assert some[0]==(ord(" "), ord("a"))  # the smallest of all pairs

def test_training_is_the_same_in_another_process():
    code = "from nanogpt.bpe import train_bpe; print(train_bpe(['the cat sat on the mat and the rat ran '*9], 300).merges)"
    run = lambda s: subprocess.run([sys.executable, "-c", code], env=os.environ|{"PYTHONHASHSEED": s}, capture_output=True, text=True)
    outs = {run(s).stdout for s in "123"}
    assert len(outs)==1 and len(outs.pop())>20

@needs("text/austen")
def test_4096_ids_from_four_megabytes_in_eight_seconds():
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((DATA/"text"/"austen").glob("*.txt")))
    start = time.process_time()
    bpe = train_bpe([text], 4096)
    seconds = time.process_time()-start  # of this process: a busy neighbour does not count
    assert bpe.n_vocab==4096 and len(text)>3_900_000
    assert seconds<8, f"{seconds:.1f} s"
    assert bpe.decode(bpe.encode(text[:50_000]))==text[:50_000]

# ---- the split: Python's engine and Rust's ---------------------------------------------------------------------------

def test_both_engines_split_alike(own):
    bpe, rng = BPE(own.recipe["merges"]), random.Random(0)
    for _ in range(300):
        text = soup(rng, 80)
        assert own.encode(text)==bpe.encode(text)
        assert own.decode(own.encode(text))==text

@pytest.mark.parametrize("part", [r"\s", r"\p{L}", r"\p{N}"])
def test_both_engines_know_the_same_letters(part):
    rust = tiktoken.Encoding("class", pat_str=part, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    find = regex.compile(part)
    assert [c for c in LETTERS if bool(find.match(c))!=bool(rust.encode_ordinary(c))]==[]

@pytest.mark.parametrize("text", [" "*200_000, "a"*20_000, "\n"*50_000+"x", "9"*5000, "🐈"*3000, "'"*9999])
def test_long_runs(own, gpt2, text):
    for tok in (own, gpt2): assert tok.decode(tok.encode(text))==text

# ---- GPT-2 -----------------------------------------------------------------------------------------------------------

def test_packaged_merges_are_openais():
    packed = (files("nanogpt")/"gpt2.bpe.gz").read_bytes()
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest()==GPT2_SHA256 and GPT2_SHA256.startswith("1ce1664773c5")
    assert packed[4:8]==bytes(4)  # no time inside: the same bytes whenever it is made
    assert "Copyright (c) 2019 OpenAI" in (files("nanogpt")/"gpt2.LICENSE").read_text()

def test_ranks_are_tiktokens(gpt2): assert hashlib.sha256(ranks_text(gpt2.ranks)).hexdigest().startswith("306cd27f03c1")

@needs("tokenizer/vocab.bpe")
def test_package_holds_the_published_file():
    assert gzip.decompress((files("nanogpt")/"gpt2.bpe.gz").read_bytes())==(DATA/"tokenizer"/"vocab.bpe").read_bytes()

@needs("tokenizer/encoder.json")
def test_ids_equal_tiktokens(gpt2, theirs):
    rng = random.Random(1)
    assert gpt2.ranks==theirs._mergeable_ranks
    for text in [PROSE*20, *(soup(rng, 120) for _ in range(300))]: assert gpt2.encode(text)==theirs.encode_ordinary(text)

@needs("text")
@needs("tokenizer/encoder.json")
def test_ids_equal_tiktokens_on_real_text(gpt2, theirs):
    for name in ("text/tinyshakespeare.txt", "text/fineweb_edu_sample.txt", "text/enwiki_gensim_100.jsonl"):
        text = (DATA/name).read_text(encoding="utf-8")
        assert gpt2.encode(text)==theirs.encode_ordinary(text), name

def test_loading_gpt2_is_not_felt():
    start = time.process_time()
    Tokenizer.gpt2()
    assert time.process_time()-start<1

# ---- special tokens and ids that are no text -------------------------------------------------------------------------

@pytest.mark.parametrize("mark", SPECIALS)
def test_no_text_forges_a_special_token(own, gpt2, mark):
    for tok in (own, gpt2):
        for text in (mark, mark+"x", "x"+mark, f"x{mark}y", f" {mark} ", mark*3, mark[1:], mark+"\n"+mark, "é"+mark+"猫"):
            for ids in (tok.encode(text), tok.encode_batch([text])[0]):
                assert not set(ids) & set(tok.specials.values())
                assert tok.decode(ids)==text

def test_ids_of_the_specials(own, gpt2):
    assert gpt2.specials==dict(zip(SPECIALS, range(50256, 50261), strict=True)) and gpt2.n_vocab==50304
    assert own.specials==dict(zip(SPECIALS, range(own.n_vocab-5, own.n_vocab), strict=True))
    for tok in (own, gpt2):
        for mark, i in tok.specials.items(): assert tok.decode([i])==mark and tok.decode([65, i], skip_specials=True)==tok.decode([65])
    assert gpt2.decode(range(50261, 50304))==""

def test_ids_outside_are_named(own, gpt2):
    for tok in (own, gpt2):
        for bad in (-1, tok.n_vocab, 10**9):
            with pytest.raises(DataError, match=f"id {bad} is outside"): tok.decode([1, bad])

# ---- streaming -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_stream_never_shows_half_a_letter(own, gpt2, seed):
    rng = random.Random(seed)
    for _ in range(100):
        tok = rng.choice([own, gpt2])
        text = "".join(rng.choices(["👩\u200d🔬", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "e\u0301", "ि", "猫", "𝔘", "\U0010ffff", "a", " "], k=12))
        stream = Streamer(tok)
        parts = [stream.push(i) for i in tok.encode(text)]
        assert "\ufffd" not in "".join(parts) and "".join(parts)==text and stream.flush()==""

@pytest.mark.parametrize("seed", range(5))
def test_stream_of_blind_ids_equals_decoding_them(own, gpt2, seed):
    rng = random.Random(seed)
    for _ in range(200):
        tok = rng.choice([own, gpt2])
        ids = [rng.choice([rng.randrange(256), rng.randrange(tok.n_vocab)]) for _ in range(rng.randrange(40))]
        for skip in (False, True):
            stream = Streamer(tok, skip)
            assert "".join(stream.push(i) for i in ids)+stream.flush()==tok.decode(ids, skip)

# ---- files -----------------------------------------------------------------------------------------------------------

def test_damage_in_a_tokenizer_file_is_found(own, tmp_path):
    own.save(tmp_path/"tokenizer.json")
    good = (tmp_path/"tokenizer.json").read_text(encoding="utf-8")
    assert get_tokenizer(tmp_path).fingerprint==own.fingerprint
    first = own.recipe["merges"][0][0]
    for bad in (good[:-9], good.replace("bpe", "bqe"), good.replace(str(first), str(first+1), 1), "[]", "{}", ""):
        (tmp_path/"tokenizer.json").write_text(bad, encoding="utf-8")
        with pytest.raises(DataError, match="tokenizer.json"): get_tokenizer(tmp_path)

def test_surrogates_do_not_crash(own, gpt2):
    for tok in (own, gpt2): assert tok.decode(tok.encode("a\ud800b"))=="a\ufffdb"
