"Where text comes from: worlds that never meet, the same text everywhere, real files, and what is said when something is missing."
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, islice
from random import Random

import pytest

from nanogpt import corpus, tales
from nanogpt.core import ConfigError, DataError, NetworkError

MANY = 4000

@pytest.fixture(scope="module")
def sides():
    out = {}
    for split in corpus.SPLITS:
        rng = Random(split)
        out[split] = [tales.world(rng, split) for _ in range(MANY)]
    return out

# ── the wall ──

def folk(text):
    "Everybody a text names."
    return {n for slot in "ab" for n in tales.people(slot) if re.search(rf"\b{n}\b", text)}

def together(texts):
    "Every pair of people that some text names."
    return {frozenset(p) for t in texts for p in combinations(sorted(folk(t)), 2)}

PAIRS = {"people": lambda f: frozenset((f["a"], f["b"])), "thing and place": lambda f: (f["th"], f["p"].noun)}

@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_no_pair_is_on_both_sides(sides, pair):
    "Test worlds pair people, and things with places, as no training world does."
    pairs = {split: {pair(w.facts) for w in ws} for split, ws in sides.items()}
    assert len(pairs["train"]) > 200 and len(pairs["test"]) > 20
    assert not pairs["train"] & pairs["test"]

@pytest.mark.parametrize("one,other", ["ab", "pq"])
def test_each_role_has_words_of_its_own(sides, one, other):
    said = {slot: {w.facts[slot] for ws in sides.values() for w in ws} for slot in (one, other)}
    assert len(said[one]) > 10 and len(said[other]) > 10 and not said[one] & said[other]

def test_no_training_text_names_a_held_out_pair_of_people(sides):
    "Stories, chats and rows, read as text."
    rng = Random(0)
    texts = [x for w in sides["train"][:1500] for x in (tales.story(w, rng), json.dumps(tales.chat(w, rng)))]
    texts += [json.dumps(r) for r in islice(corpus.rows("tales"), 1500)]
    test = {frozenset((w.facts["a"], w.facts["b"])) for w in sides["test"]}
    assert not together(texts) & test
    assert together([tales.tell(sides["test"][0], rng).text]) & test     # the search itself can find one

# ── what is told is true ──

def test_answers_are_in_the_story(sides):
    for i, w in enumerate(sides["test"][:1500]):
        tale = tales.tell(w, Random(i))
        for kind, ask, say in tales.questions(tale, Random(i)):
            assert 1 <= len(say.split()) <= 6, say
            if kind != "why": assert say.rstrip(".").split()[-1] in tale.text, (kind, ask, say, tale.text)

def test_a_question_has_one_answer(sides):
    for i, w in enumerate(sides["train"][:1000]):
        answers = {}
        for j in range(4):
            for _, ask, say in tales.questions(tales.tell(w, Random(i)), Random(j)): assert answers.setdefault(ask, say) == say

def test_english(sides):
    rng = Random(5)
    for w in sides["train"][:2000]:
        text = tales.story(w, rng)
        assert not re.search(r"\b[Aa] [aeiou]", text) and not re.search(r"\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"[{}]|  |\.\.|\bNone\b", text), text
        assert re.match(r'["A-Z]', text) and text[-1] in '.!?"', text
        assert text.count('"') % 2 == 0, text

def test_lengths(sides):
    rng = Random(6)
    n = [len(re.findall(r"\w+|[^\w\s]", tales.story(w, rng))) for w in sides["train"][:2000]]
    assert min(n) >= 50 and max(n) <= 220
    chats = [tales.chat(w, rng) for w in sides["train"][:500]]
    assert max(sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) for m in c["messages"]) for c in chats) <= 240

def test_all_categories_and_which_are_exact():
    seen = Counter(r["category"] for r in islice(corpus.rows("tales"), 400))
    assert set(seen) == set(tales.CATEGORIES) and len(tales.CATEGORIES) == 8
    assert sum(map(tales.is_exact, tales.CATEGORIES)) == 6
    for r in islice(corpus.rows("tales", "test"), 400):
        assert set(r) == {"instruction", "context", "response", "category"} and r["instruction"] and r["response"]

def test_plain_knowledge_of_the_test_is_taught_in_training():
    ask = lambda split, n: {r["response"] for r in islice(corpus.rows("tales", split), n) if r["category"] in ("open_qa", "general_qa")}
    assert ask("test", 3000) <= ask("train", 20000)

# ── endings ──

@pytest.fixture(scope="module")
def items(): return list(islice(corpus.choices("tales"), 3000))

@pytest.mark.parametrize("guess", ["first", "shortest", "longest", "commonest", "alphabet"])
def test_endings_alone_tell_nothing(items, guess):
    seen = Counter(e for x in items for e in x["endings"])
    key = {"first": lambda e: 0, "shortest": len, "longest": lambda e: -len(e), "commonest": lambda e: -seen[e], "alphabet": str}[guess]
    right = sum(min(range(4), key=lambda i: key(x["endings"][i])) == x["label"] for x in items)/len(items)
    assert .21 < right < .29, right       # chance is .25; four standard errors of 3,000 throws are .032

def test_endings_differ_and_one_is_true():
    for x in islice(corpus.choices("tales", "test"), 500):
        assert len(set(x["endings"])) == 4 and 0 <= x["label"] < 4

# ── same seed, same text ──

def test_another_process_and_hash_seed(env):
    code = ("import hashlib, json; from itertools import islice; from nanogpt import corpus as c;"
            "out = [list(islice(f(n, s), 40)) for f, n in [(c.documents, 'tales'), (c.documents, 'pydocs'), (c.rows, 'tales'),"
            "(c.conversations, 'tales'), (c.choices, 'tales')] for s in c.SPLITS];"
            "print(hashlib.sha256(json.dumps(out).encode()).hexdigest())")
    run = lambda seed: subprocess.run([sys.executable, "-c", code], env=env | {"PYTHONHASHSEED": seed},
                                      capture_output=True, text=True, check=True).stdout
    assert run("1") == run("77")

def test_only_random_is_used():
    class Bare:
        "Has nothing but `random`: the other methods of Random may differ between Python versions."
        random = Random(0).random
    rng = Bare()
    for _ in range(20):
        w = tales.world(rng)
        for make in (tales.story, tales.rows, tales.chat, tales.endings): make(w, rng)

def test_import_is_light(env):
    code = "import sys, nanogpt.corpus; print([m for m in ('torch', 'numpy', 'datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip() == "[]"

# ── pydocs ──

def test_pydocs_is_prose_and_split():
    train, test = (list(corpus.documents("pydocs", s)) for s in corpus.SPLITS)
    assert sum(map(len, train)) > 600_000 and .03 < len(test)/(len(train)+len(test)) < .2
    paras = [{p for d in docs for p in d.split("\n\n")} for docs in (train, test)]
    assert not paras[0] & paras[1]
    assert not any(re.search(r">>>|::=|\n ", d) for d in train)

# ── files ──

ROWS = [dict(instruction=f"What is {i}?", context="" if i % 2 else f"{i} is a number.", response=f"A number, {i}.", category="open_qa")
        for i in range(60)]

@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".parquet.gz"])
def test_every_kind_of_file(tmp_path, kind):
    texts = [f"This is the document with number {i}, and it says nothing else at all." for i in range(100)]
    path = tmp_path/f"text{kind}"
    if ".parquet" in kind:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path/"plain.parquet")
        data = (tmp_path/"plain.parquet").read_bytes()
        (tmp_path/"plain.parquet").unlink()
    else: data = "\n".join(json.dumps({"text": t}) if ".jsonl" in kind else t for t in texts).encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    for where in (path, tmp_path):                                   # the file, and the folder it is in
        parts = [list(corpus.documents(str(where), s)) for s in corpus.SPLITS]
        assert all(parts) and all(any(t in d for d in parts[0]+parts[1]) for t in texts)
        assert not set(parts[0]) & set(parts[1])

def test_dolly_rows_and_messages_from_a_file(tmp_path):
    path = tmp_path/"rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    got = [r for s in corpus.SPLITS for r in corpus.rows(str(path), s)]
    assert sorted(r["instruction"] for r in got) == sorted(r["instruction"] for r in ROWS)
    talk = next(c for c in corpus.conversations(str(path)) if "\n\n" in c["messages"][0]["content"])
    assert re.fullmatch(r"\d+ is a number\.\n\nWhat is \d+\?", talk["messages"][0]["content"])
    assert talk["messages"][1]["role"] == "assistant" and talk["category"] == "open_qa"
    assert any("What is 1?" in d and "A number, 1." in d for s in corpus.SPLITS for d in corpus.documents(str(path), s))

def test_bad_lines_are_counted(tmp_path, capsys):
    path = tmp_path/"rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(r).encode() for r in ROWS] + [b"{broken", b"[1]", b"\xff\xfe"]))
    assert len([*corpus.rows(str(path)), *corpus.rows(str(path), "test")]) == 60
    assert "skipped 3 of 63 lines" in capsys.readouterr().err

def test_nanogpt_data_comes_first(tmp_path, monkeypatch):
    (tmp_path/"text").mkdir()
    (tmp_path/"text"/"tinyshakespeare.txt").write_text("\n".join(f"Speak, friend number {i}." for i in range(300)))
    monkeypatch.setenv("NANOGPT_DATA", str(tmp_path))
    assert "Speak, friend" in next(corpus.documents("shakespeare"))

# ── what is said ──

@pytest.mark.parametrize("name,what", [
    ("taels", "did you mean tales?"), ("helaswag", "did you mean hellaswag?"), ("zzz", "use one of tales, pydocs"),
    ("nowhere.txt", "no such file or folder: nowhere.txt"), ("a/b/c", "no such file"), ("", "unknown corpus")])
def test_unknown_names(name, what):
    with pytest.raises(DataError, match=re.escape(what)): corpus.documents(name)

@pytest.mark.parametrize("name,data", [("a.txt", b""), ("a.txt", b" \n\n"), ("a.jsonl", b""), ("a.jsonl", b'{"title": "no text"}\n')])
def test_empty_corpus(tmp_path, name, data):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(DataError, match="has no text"): list(corpus.documents(str(tmp_path/name)))

def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match="nothing to read"): list(corpus.documents(str(tmp_path)))

def test_no_line_is_json(tmp_path):
    (tmp_path/"a.jsonl").write_text("hello\nworld\n")
    with pytest.raises(DataError, match="none of 2 lines"): list(corpus.rows(str(tmp_path/"a.jsonl")))

def test_wrong_split():
    for door in (corpus.documents, corpus.rows, corpus.conversations, corpus.choices):
        with pytest.raises(ConfigError, match="train, test"): door("tales", "valid")

@pytest.mark.parametrize("mix", ["", ",", "tales:0", "tales:-1", "tales:nan", "tales:inf"])
def test_bad_mix(mix):
    with pytest.raises(ConfigError): corpus.parse_mix(mix)

@pytest.mark.parametrize("door,name", [("documents", "fineweb-edu"), ("documents", "somebody/something"), ("rows", "dolly"),
                                       ("conversations", "dolly"), ("choices", "hellaswag")])
def test_no_network_is_one_message(env, door, name):
    code = ("import sys\nfrom nanogpt import corpus\nfrom nanogpt.core import NetworkError\n"
            f"try: next(iter(corpus.{door}({name!r})))\n"
            "except NetworkError as e: print(e.what, '|', e.fix)")
    env.pop("NANOGPT_DATA", None)
    r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "out of reach" in r.stdout and "NANOGPT_DATA" in r.stdout and "--corpus tales" in r.stdout, r.stdout+r.stderr
    assert "from the Hugging Face hub" in r.stderr.splitlines()[0]   # said before anything is fetched

def test_a_registered_corpus_that_is_nowhere(monkeypatch):
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    with pytest.raises(DataError, match="set NANOGPT_DATA"): corpus.documents("austen")

def test_network_error_is_a_connection_error(): assert issubclass(NetworkError, ConnectionError)

# ── real data, where it is ──

@pytest.mark.parametrize("name,least", [("fineweb-edu", 900_000), ("enwiki", 2_000_000), ("austen", 3_500_000), ("shakespeare", 1_000_000)])
def test_real_text(data_home, name, least):
    train, test = (list(corpus.documents(name, s)) for s in corpus.SPLITS)
    assert sum(map(len, train+test)) > least and train and test and not set(train) & set(test)

def test_real_dolly(data_home):
    train, test = (list(corpus.conversations("dolly", s)) for s in corpus.SPLITS)
    assert 14_500 < len(train)+len(test) <= 15_011 and .09 < len(test)/(len(train)+len(test)) < .11

def test_real_hellaswag(data_home):
    items = list(corpus.choices("hellaswag"))
    assert len(items) == 10_042 and all(len(x["endings"]) == 4 and x["label"] in range(4) for x in items)

def test_austen_is_unwrapped(data_home):
    paras = next(corpus.documents("austen")).split("\n\n")
    assert max(map(len, paras)) > 200 and not any("\n" in p for p in paras)
