"What the lessons on instruction data cannot show: sixty broken files, random near-copies, kills of the command, real Dolly, tuning on it."
import csv
import gzip
import io
import json
import random
from itertools import combinations

import pytest
from mini import SFT, end, here, one_message, run, start, wait

from nanogpt.bulk import STATE, open_shards
from nanogpt.cli import parse_only
from nanogpt.core import DataError
from nanogpt.instruct import InstructConfig, instruct
from nanogpt.quality import ALIKE, asked, groups, runs, similarity, split_talks, whole
from nanogpt.readers import FORMATS, REASONS, Unusable, read_talks, to_talk
from nanogpt.template import Template, load_template
from nanogpt.tokenizer import get_tokenizer

# ---- sixty broken files ----------------------------------------------------------------------------------------------

EN = [("q1", "a1"), ("q2", "a2"), ("q3", "a3")]
ZH = [("什么是重力？", "重力是物体之间相互吸引的力。"), ("北京在哪里？", "北京在中国的北方。"), ("谢谢", "不客气。")]
ODD = [('a "quoted, word', "line one\nline two"), ("é ü ñ", "naïve façade"), ("tab\there", "x;y")]

def sheet(pairs, comma=",", header=("text", "result"), end="\r\n"):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=comma, lineterminator=end).writerows([header, *pairs])
    return out.getvalue()

def lines(pairs): return "".join(json.dumps(dict(text=a, result=b), ensure_ascii=False)+"\n" for a, b in pairs)

def array(pairs, **more): return json.dumps([dict(text=a, result=b) for a, b in pairs], ensure_ascii=False, **more)

def good(data, pairs=EN, **left): return data, pairs, left

def bad(data, *says): return data, says, None

FILES = { # name → (bytes or text, the pairs that are right, how many rows are left out by reason), or (…, what the problem says, None)
    # encodings
    "plain.csv": good(sheet(EN)), "bom.csv": good(sheet(EN).encode("utf-8-sig")), "bom.jsonl": good(lines(EN).encode("utf-8-sig")),
    "bom_array.json": good(array(EN).encode("utf-8-sig")), "odd.csv": good(sheet(ODD), ODD), "odd.jsonl": good(lines(ODD), ODD),
    "gbk.csv": good(sheet(ZH).encode("gbk"), ZH), "gb18030.csv": good(sheet(ZH).encode("gb18030"), ZH),
    "gbk.jsonl": good(lines(ZH).encode("gbk"), ZH), "gb18030.json": good(array(ZH).encode("gb18030"), ZH),
    "utf8_zh.csv": good(sheet(ZH), ZH), "utf16.csv": good(sheet(ZH).encode("utf-16"), ZH),
    "utf16_be.csv": good(("\ufeff"+sheet(EN)).encode("utf-16-be")),
    "utf16.json": good(array(ZH).encode("utf-16"), ZH), "utf32.csv": good(sheet(EN).encode("utf-32")),
    "utf16_no_mark.csv": bad(sheet(EN).encode("utf-16-le"), "without a mark", "--encoding utf-16-le"),
    "latin1.csv": bad(sheet([("été à Noël", "où ça")]*9).encode("latin-1"), "line 2", "neither UTF-8 nor Chinese"),
    "cyrillic.csv": bad(sheet([("Где ты?", "Я здесь, дома")]*9).encode("cp1251"), "line 2", "neither UTF-8"),
    "half_utf16.csv": bad(sheet(EN).encode("utf-16")[:-1], "not utf-16"),
    "one_bad_byte.jsonl": good(lines(EN*4).encode().replace(b"a2", b"a\xff", 1), [EN[0], *EN[2:], *EN*3], **{"bad encoding": 1}),
    "torn_letter.csv": good((sheet([("q", "a")]*12+[("猫", "猫")]).encode()[:-3]), [("q", "a")]*12, **{"bad encoding": 1}),
    "replaced.jsonl": good(lines([*EN, ("h\ufffdllo", "x")]), **{"bad encoding": 1}),
    "surrogate.jsonl": good(lines(EN)+'{"text": "a\\ud83d", "result": "b"}\n', **{"bad encoding": 1}),
    "nul.csv": good(sheet([*EN, ("a\0b", "c")]), **{"bad encoding": 1}),
    "nul.jsonl": good(lines([*EN, ("a\0b", "c")]), **{"bad encoding": 1}),
    "raw_nul.jsonl": good(lines(EN)+'{"text": "a\0", "result": "b"}\n', **{"bad encoding": 1}),
    # quotes and columns
    "unclosed.csv": bad('text,result\r\nq1,a1\r\nq2,"a2\r\nq3,a3\r\n', "line 3", "quotes"),
    "stray_quote.csv": bad('text,result\nq1,"a"b\n', "line 2", "quotes"),
    "unclosed_header.csv": bad('text,"result\nq,a\n', "line 1"),
    "literal_quote.csv": good('text,result\nq 5" wide,a1\n', [('q 5" wide', "a1")]),
    "long_row.csv": good(sheet([*EN, ("q", "a", "more")]), ragged=1), "short_row.csv": good(sheet([*EN, ("q",)]), ragged=1),
    "blank_lines.csv": good(sheet(EN).replace("\r\n", "\r\n\r\n")), "only_commas.csv": good(sheet([*EN, ("", "")]), empty=1),
    "missing.csv": bad(sheet(EN, header=("text", "reslt")), "line 1", "'result'", "name reslt result"),
    "no_header.csv": bad(sheet(EN[1:], header=EN[0]), "line 1", "'text'"),
    "twice.csv": bad(sheet([("a", "b", "c")], header=("text", "result", "text")), "stands twice"),
    "capitals.csv": good(sheet(EN, header=(" Text", "RESULT "))),
    "extra.csv": good(sheet([("7", *o) for o in EN], header=("id", "text", "result"))),
    "semicolons.csv": good(sheet(EN, ";")), "tabs.csv": good(sheet(EN, "\t")), "old_mac.csv": good(sheet(EN, end="\r")),
    "empty.csv": bad("", "is empty"), "blank.json": bad(" \n\n", "is empty"), "only_bom.csv": bad(b"\xef\xbb\xbf", "is empty"),
    "header.csv": bad("text,result\n", "no row follows"),
    "huge.csv": good(sheet([*EN, ("q", "x"*300_000)]), [*EN, ("q", "x"*300_000)]),
    # other kinds, other names
    "json_inside.csv": good(lines(EN)), "csv_inside.jsonl": good(sheet(EN)), "array_inside.txt": good(array(EN)),
    "packed.csv": good(gzip.compress(sheet(EN).encode())),
    "excel.csv": bad(b"PK\x03\x04rest", "Excel"), "cut.jsonl.gz": bad(gzip.compress(lines(EN).encode())[:-9], "cannot be read"),
    "prose.json": bad("Once upon a time.\nThere was a cat.\n", "line 1"),
    # JSON
    "cut_array.json": bad(array(EN, indent=1)[:-30], "line"), "cut_line.jsonl": good(lines(EN)+'{"text": "q', **{"not JSON": 1}),
    "trailing_comma.json": bad(array(EN).replace("]", ",]"), "line 1"), "wrapped.json": good('{"data": '+array(EN, indent=1)+"}"),
    "nan.jsonl": good(lines(EN)+'{"text": NaN, "result": "b"}\n{"text": "a", "result": "b", "score": Infinity}\n', [*EN, ("a", "b")],
                      **{"wrong type": 1}),
    "nested.jsonl": good(lines(EN)+'{"text": ["a"], "result": {"b": 1}}\n[1, 2]\n7\n"text"\nnull\n', **{"wrong type": 5}),
    "null.jsonl": good(lines(EN)+'{"text": "a", "result": null}\n{"text": "a"}\n', **{"empty": 1, "missing column": 1}),
    "key_twice.jsonl": good(lines(EN)+'{"text": "a", "text": "b", "result": "c"}\n', **{"wrong type": 1}),
    "deep.json": bad("["*100_000, "line 1"),
    "big_number.jsonl": good(lines(EN)+'{"text": '+"9"*9000+', "result": "b"}\n', **{"not JSON": 1}),
}

def test_there_are_sixty(): assert len(FILES)>=60

@pytest.mark.parametrize("name", FILES)
def test_broken_file(name, tmp_path):
    "The right rows or a named problem, and rows read = used + each reason."
    data, want, left = FILES[name]
    path = tmp_path/name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    if left is None:
        with pytest.raises(DataError) as e: read_talks("csv", path)
        assert name in e.value.what and e.value.fix and all(o in str(e.value) for o in want), e.value
        return
    read = read_talks("csv", path)
    pairs = [tuple(m["content"] for m in t["messages"]) for t in read.talks]
    assert pairs==[tuple(o) for o in want] and dict(read.left)==left
    assert read.rows==len(read.talks)+sum(read.left.values()) and set(read.left)<=set(REASONS) and set(read.first)==set(read.left)

def test_controls():
    "The sixty would notice: a reader that drops a row in silence, and one that takes GB18030 for what it is not."
    assert [*csv.DictReader(io.StringIO(sheet([*EN, ("q",)])))][-1]["result"] is None # Python's own reader fills the hole and says nothing
    assert "cœur était".encode("cp1252").decode("gb18030")!="cœur était" # no error, and no French

def test_encoding_by_name(tmp_path):
    "What no rule can tell is named by the user, and the message says how."
    path = tmp_path/"big5.csv"
    path.write_bytes(sheet([("什麼是重力？這是一個問題", "這是物體之間的吸引力")]*5).encode("big5"))
    with pytest.raises(DataError, match="--encoding big5"): read_talks("csv", path)
    assert read_talks("csv", path, "big5").talks[0]["messages"][0]["content"].startswith("什麼是重力")

def test_broken_rows_of_every_format():
    "No row of random JSON, in whatever format, does anything but become a conversation or raise one of the reasons."
    rng, keys = random.Random(0), ("instruction response input output context conversations messages data from value role content question "
                                   "answer trans_instruction trans_output textbox_question textbox_answer text result").split()
    def anything(depth=3):
        leaf = [None, 7, 0.5, float("nan"), True, "", " ", "hello", "\ud83d", "a\0", "user", "assistant", "gpt", "human"]
        pick = rng.random()
        if not depth or pick<.5: return rng.choice(leaf)
        if pick<.7: return [anything(depth-1) for _ in range(rng.randrange(4))]
        return {k: anything(depth-1) for k in rng.sample(keys, rng.randrange(9))}
    seen = set()
    for form in FORMATS:
        for _ in range(1500):
            row = {k: anything() for k in rng.sample(keys, rng.randrange(1, len(keys)))}
            try: messages = to_talk(row, form)["messages"]
            except Unusable as e: assert str(e) in REASONS; seen.add(str(e)); continue
            roles = [m["role"] for m in messages if m["role"]!="system"]
            assert roles==["user", "assistant"]*(len(roles)//2)
            assert all(m["content"].strip() for m in messages); seen.add("used")
    assert {"used", "missing column", "wrong type", "empty", "bad encoding", "wrong role order"}<=seen

# ---- both sides ------------------------------------------------------------------------------------------------------

def talk(ask, answer):
    return dict(messages=[dict(role="user", content=ask), dict(role="assistant", content=answer)], category="", source="s")

def invented(rng, n):
    "Conversations of random words, some of them changed copies of others."
    word = lambda: "".join(rng.choices("abcdefgh", k=rng.randint(2, 6)))
    text = lambda: " ".join(word() for _ in range(rng.randint(1, 25)))
    def changed(t):
        w = t.split()
        for _ in range(rng.randint(0, 2)): w[rng.randrange(len(w))] = word()
        return rng.choice((str, str.upper, str.title))(rng.choice((" ", "  ", ", ")).join(w)+rng.choice(("", ".", "?")))
    out = [talk(text(), text()) for _ in range(n)]
    for _ in range(n//2):
        a, b = (m["content"] for m in rng.choice(out)["messages"])
        out.append(talk(*rng.choice([(changed(a), changed(b)), (changed(a), text()), (text()+" "+a, b)])))
    rng.shuffle(out)
    return out

def close(a, b): return any(similarity(runs(f(a)), runs(f(b)))>=ALIKE for f in (asked, whole))

@pytest.mark.parametrize("seed", range(6))
def test_no_near_copy_across(seed):
    "Compared pair by pair, slowly, none on one side is like one on the other, whatever the order of the rows; every row is on one side."
    rng = random.Random(seed)
    talks, split = invented(rng, 90), rng.choice((.5, .8, .9))
    train, val = split_talks(talks, groups(talks), split)
    assert sorted(train+val)==list(range(len(talks)))
    assert not [(i, j) for i in train for j in val if close(talks[i], talks[j])]
    other = rng.sample(talks, len(talks))
    text = lambda side, of: sorted(whole(of[k]) for k in side)
    assert text(val, talks)==text(split_talks(other, groups(other), split)[1], other)

def test_control_split():
    "Split row by row, the same slow comparison finds pairs on both sides."
    talks = invented(random.Random(0), 90)
    side = [k%5==0 for k in range(len(talks))]
    assert sum(side[i]!=side[j] and close(talks[i], talks[j]) for i, j in combinations(range(len(talks)), 2))>3

def test_groups_are_exact():
    "Groups are what hangs together by the slow comparison of all pairs, no more and no less."
    talks = invented(random.Random(7), 70)
    left, want = set(range(len(talks))), []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            k = todo.pop(); group.add(k)
            todo += [j for j in left-group if j not in todo and close(talks[k], talks[j])]
        left -= group; want.append(sorted(group))
    assert sorted(map(sorted, groups(talks)))==sorted(want) and len(want)<len(talks)

# ---- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Three sources with mistakes, and the words of a command that mixes them."
    home, rng = tmp_path_factory.mktemp("files"), random.Random(3)
    talks = invented(rng, 300)
    rows = [dict(instruction=t["messages"][0]["content"], response=t["messages"][1]["content"]) for t in talks[:250]]
    rows += [rows[0], dict(rows[1], response="")]
    (home/"d.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(o)+"\n" for o in rows).encode()))
    pairs = [tuple(m["content"] for m in t["messages"]) for t in talks[250:380]]
    (home/"c.csv").write_bytes(sheet([*pairs, ("short",), *ZH]).encode("gb18030"))
    (home/"m.json").write_text(json.dumps([dict(messages=t["messages"]*2) for t in talks[380:]]+[dict(messages=talks[0]["messages"][:1])]))
    run("tokenizer", "--corpus", "tales", "--vocab_size", 300, "--tokenizer_bytes", 30_000, "--out", home/"t")
    mix = f"dolly={home}/d.jsonl.gz:0.5,csv={home}/c.csv:0.3,messages={home}/m.json:0.2"
    return "data", "instruct", mix, "--split", .8, "--shard_rows", 20, "--max_tokens", 300, "--tokenizer", home/"t"

def data(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}

@pytest.fixture(scope="module")
def never(files, tmp_path_factory):
    "What comes out when nobody kills anything."
    out = tmp_path_factory.mktemp("never")/"set"
    done = json.loads(run(*files, "--out", out, "--json").stdout)
    q = done["quality"]
    assert q["rows"]==q["used"]+sum(n for s in q["sources"].values() for n in s["left"].values()) and q["near_copies"]["across"]==0
    reasons = {k for s in q["sources"].values() for k in s["left"]}
    assert {"duplicate", "empty", "ragged", "wrong role order"}<=reasons and done["train"]["shards"]>4
    return out

SLOW = "import os, time\ndef slow(f, old=os.fsync): time.sleep(.05); old(f)\nos.fsync = slow\n" # so that a kill can meet every stage

def test_killed(files, never, tmp_path):
    "Killed at three places, from the first file to the last shard but one, and given again each time: the same bytes."
    out = tmp_path/"set"
    for shards in (-1, 1, 4):
        process = start(*files, "--out", out, before=SLOW)
        ready = lambda n=shards: (out/"val.bin").exists() if n<1 else (out/f"train-{n:05d}.bin").exists()
        assert wait(process, (lambda: (out/"tokenizer.json").exists()) if shards<0 else ready), process.communicate()
        process.kill(); process.wait(); process.stdout.close(); process.stderr.close()
        assert not json.loads((out/STATE).read_text())["done"] if (out/STATE).exists() else shards<1
    assert "going on after" in end(start(*files, "--out", out))[1]
    assert data(out)==data(never)

def test_refused(files, never, tmp_path, capsys, monkeypatch):
    "Other settings in the same folder, a folder of `nanogpt data`, a mix that cannot be: each one message, and nothing is changed."
    monkeypatch.delenv("NANOGPT_DATA", raising=False)
    before = data(never)
    mixes = ("doly:1", "did you mean dolly?"), ("csv=no.csv", "no.csv"), ("dolly", "NANOGPT_DATA"), ("csv:-1", "--mix")
    refused = [(files, never, "--seed=1", "seed=0 there, seed=1 now")]
    refused += [(("data", "instruct", m), tmp_path/"x", "--seed=0", says) for m, says in mixes]
    for words, out, seed, says in refused:
        assert here(*words, "--out", out, seed)[0]==2
        one_message(capsys.readouterr().err, says)
    assert data(never)==before and not (tmp_path/"x").exists()

def test_plain_data_still_takes_a_corpus():
    "`nanogpt data NAME` is what it was."
    assert parse_only(["data", "a.txt", "--out", "d"])[1].corpus=="a.txt"
    assert parse_only(["data", "--corpus", "instruct", "--out", "d"])[0].__name__=="run_data"

def test_tuned_on_it(files, never, whole, tmp_path):
    "`nanogpt sft --data` learns the answers in these shards and no other token; the run asks in their form, and chat finds it."
    words = [o if o!=files[-1] else whole for o in files]
    run(*words, "--form", "alpaca", "--domain", "medical", "--out", tmp_path/"set")
    run(*SFT, "--data", tmp_path/"set", "--init", whole, "--out", tmp_path/"tuned")
    tok = get_tokenizer(whole)
    template = load_template(tmp_path/"tuned/model", tok)
    assert (template.form, template.domain)==("alpaca", "medical")
    code, text = here("generate", "--model", tmp_path/"tuned", "--prompt", "q", "--max_tokens", 2, "--json")
    assert code==0 and json.loads(text)["chat"]
    shards, _ = open_shards(tmp_path/"set", tok)
    for ids, mask in (shards[k] for k in (0, 21, len(shards)-1)):
        assert tok.decode(ids[:30].tolist()).startswith("You explain") and 0<mask.sum()<len(ids) and ids[mask==1][-1]==template.end
    one_message(run(*SFT, "--data", whole/"data", "--init", whole, "--out", tmp_path/"y", code=2).stderr, "holds no conversations")

# ---- real data -------------------------------------------------------------------------------------------------------

def test_real_rows(data_home, tmp_path):
    "All of Dolly is read, only answers are learnt; real Alpaca and ShareGPT rows are split without a question of the exam in the homework."
    read, tok = read_talks("dolly"), get_tokenizer("gpt2")
    assert read.rows==15_011==len(read.talks)+sum(read.left.values()) and set(read.left)=={"bad encoding"}
    template = Template(tok)
    for t in read.talks[:200]:
        ids, mask = template.render(t["messages"])
        assert tok.decode(i for i, m in zip(ids, mask, strict=True) if m)==t["messages"][1]["content"]+"<|end|>"
    q = instruct(InstructConfig(mix="alpaca,sharegpt", split=.8, out=tmp_path/"set"), tok)["quality"]
    assert (q["rows"], q["used"])==(1600, 1600) and q["near_copies"]["across"]==0<q["near_copies"]["across_if_split_by_row"]

@pytest.mark.long
def test_real_mix(data_home, tmp_path):
    "All of Dolly with Alpaca's and ShareGPT's form: the counts add up, the shares are kept, no question of the exam is in the homework."
    tok = get_tokenizer("gpt2")
    done = instruct(InstructConfig(mix="dolly:0.5,alpaca:0.3,sharegpt:0.2", split=.9, out=tmp_path/"set"), tok)
    q = done["quality"]
    assert (q["sources"]["dolly"]["rows"], q["sources"]["alpaca"]["rows"], q["sources"]["sharegpt"]["rows"])==(15_011, 1_100, 500)
    assert q["rows"]==q["used"]+sum(n for s in q["sources"].values() for n in s["left"].values())
    assert q["near_copies"]["across"]==0 and q["near_copies"]["across_if_split_by_row"]>50
    got = q["mix_train"]
    assert all(abs(got[k]/sum(got.values())-share)<.01 for k, share in (("dolly", .5), ("alpaca", .3), ("sharegpt", .2)))
    train, val = open_shards(tmp_path/"set", tok)
    assert len(train)==sum(got.values())==done["train"]["documents"] and len(val)>100
