"What the lessons on store and history cannot show: kills at random moments, several programs, damage, a full disk, hostile texts."
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from random import Random

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt
from mini import environment

from nanogpt.core import ConfigError, DataError, DiskError, NanoError
from nanogpt.history import History, Keeper, history_path, open_history
from nanogpt.phrases import Phrases
from nanogpt.turns import INTERRUPTED, RUNNING

ODD = ["", " ", "a\x00b", "\ud83d half", "line\rline\u2028line", "```\nopen", "# heading\n\n> quote", "x"*200_000]
TEXTS = [*HOSTILE.values(), *ODD]

@pytest.fixture
def history(tmp_path):
    with closing(History(tmp_path/"chat.db")) as h: yield h

@pytest.fixture
def child():
    "Starts programs of their own with a History `h` at the first word; none outlives the test."
    head = "import sys, time; from pathlib import Path; from nanogpt.history import History, Keeper\nh = History(Path(sys.argv[1]))\n"
    started = []
    def child(code, *words):
        more = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        started.append(subprocess.Popen([sys.executable, "-c", head+code, *map(str, words)], **more))
        return started[-1]
    yield child
    for p in started:
        p.kill(); p.wait()
        for pipe in (p.stdout, p.stderr): pipe.close()

def kept(path, reason=None):
    with closing(History(path)) as h: return {o.id: o for c in h.cards() for o in h.turns(c.id) if reason in (None, o.reason)}

# ---- kills -----------------------------------------------------------------------------------------------------------

TALK = """
k = h.new(sys.argv[2])
for n in range(10**9):
    text = f"{sys.argv[2]} asks {n}"
    print(h.add(k, "user", text), text, sep="\\t", flush=True)
    a = Keeper(h, k, every=0.)
    for w in range(1, 4):
        a.show("word "*w, w); print(a.turn, "word "*w, sep="\\t", flush=True)
    a.done("end"); print(a.turn, "word "*3, "end", sep="\\t", flush=True)
"""

def test_no_turn_that_was_told_is_missing(tmp_path, child):
    "Three programs write into one file, each is killed at a random moment, three times over: all that was told is there."
    path, rng, told = tmp_path/"chat.db", Random(7), {}
    for _ in range(3):
        crowd = [child(TALK, path, f"p{k}") for k in range(3)]
        first = [p.stdout.readline() for p in crowd]
        for p in rng.sample(crowd, 3):
            time.sleep(rng.random()*.15)
            p.kill(); p.wait()
        for p, begun in zip(crowd, first, strict=True):
            rows = [line.split("\t") for line in (begun+p.stdout.read()).split("\n")[:-1]]
            told |= {int(turn): rest for turn, *rest in rows}
        turns = kept(path)
        assert told.keys() <= turns.keys()
        for k, rest in told.items():
            o = turns[k]
            assert o.text.startswith(rest[0]), "a growing answer holds at least what was told"
            if len(rest)>1: assert (o.text, o.reason)==(rest[0], "end")
        assert {o.reason for o in turns.values()} <= {"", "end", INTERRUPTED}
        with closing(sqlite3.connect(path)) as db: assert db.execute("PRAGMA integrity_check").fetchone()==("ok",)
    assert len(told)>40 and any(o.reason==INTERRUPTED for o in turns.values())

def test_control_a_program_that_tells_before_it_writes(tmp_path, child):
    "The comparison can fail: told first, kept a moment later, and the kill falls between."
    p = child("k = h.new('x')\nprint('1', flush=True)\ntime.sleep(60)\nh.add(k, 'user', 'x')", tmp_path/"chat.db")
    told = int(p.stdout.readline())
    p.kill(); p.wait()
    assert told not in kept(tmp_path/"chat.db")

def test_an_answer_of_a_living_program_is_not_interrupted(tmp_path, child):
    "Another window sees the answer grow; only when its program is killed is it interrupted, with what was there of it."
    path = tmp_path/"chat.db"
    p = child("k = h.new(); t = h.add(k, 'assistant', 'half an', reason='running'); print(t, flush=True); time.sleep(60)", path)
    turn = int(p.stdout.readline())
    with closing(History(path)) as h:
        k = h.cards()[0].id
        assert h.turns(k)[0].reason==RUNNING
        assert kept(path)[turn].reason==RUNNING
        p.kill(); p.wait()
        assert [(o.id, o.text, o.reason) for o in h.turns(k)]==[(turn, "half an", INTERRUPTED)]
    kept(path)
    assert not list(tmp_path.glob("*.open")), "no mark of a dead program is left"

def test_interrupted_is_said_where_nothing_can_be_written(tmp_path, child):
    "With a full or read-only disk the history is read as ever, and a dead answer is called one."
    path = tmp_path/"chat.db"
    with closing(History(path)) as h:
        p = child("t = h.add(h.new(), 'assistant', 'half', reason='running'); print(t, flush=True); time.sleep(60)", path)
        p.stdout.readline(); p.kill(); p.wait()
        h.read("PRAGMA query_only=ON")
        for _ in range(2): assert [(o.text, o.reason) for o in h.turns(h.cards()[0].id)]==[("half", INTERRUPTED)]
        with pytest.raises(DiskError): h.new()

def test_the_same_while_it_is_stopped(tmp_path, child):
    "A program that the system holds still is not dead."
    path = tmp_path/"chat.db"
    p = child("t = h.add(h.new(), 'assistant', 'x', reason='running'); print(t, flush=True); time.sleep(60)", path)
    turn = int(p.stdout.readline())
    p.send_signal(signal.SIGSTOP)
    try: assert kept(path)[turn].reason==RUNNING
    finally: p.kill(); p.wait()

def test_a_transaction_is_whole_after_a_kill(tmp_path, child):
    "Edit: cut and add happen together or not at all, wherever the kill falls."
    code = """
k = h.new(); q = h.add(k, "user", "old"); h.add(k, "assistant", "ho"); print(k, flush=True)
for n in range(10**9):
    with h.together(): h.cut(k, q); q = h.add(k, "user", f"new {n}"); h.add(k, "assistant", "ho")
"""
    rng = Random(3)
    for n in range(4):
        p = child(code, path := tmp_path/f"{n}.db")
        p.stdout.readline(); time.sleep(rng.random()*.1); p.kill(); p.wait()
        assert [o.role for o in kept(path).values()]==["user", "assistant"]

def test_many_threads_and_programs_lose_nothing(tmp_path, child):
    "Threads of one program, and two programs more, add at the same time: every turn is there once."
    path = tmp_path/"chat.db"
    with closing(History(path)) as h:
        k = h.new()
        crowd = [child(f"for n in range(25): h.add({k}, 'user', f'{{sys.argv[2]}} {{n}}')", path, f"p{i}") for i in range(2)]
        work = lambda name: [h.add(k, "user", f"{name} {n}") for n in range(25)]
        threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        for p in crowd: assert p.wait(60)==0, p.stderr.read()
        want = {f"{name} {n}" for name in ("p0", "p1", "t0", "t1", "t2", "t3") for n in range(25)}
        texts = [o.text for o in h.turns(k)]
        assert len(texts)==150 and set(texts)==want

# ---- files that are not as they should be ----------------------------------------------------------------------------

def filled(path):
    with closing(History(path)) as h:
        for n in range(20):
            k = h.new(f"Talk {n}")
            for _ in range(10): h.add(k, "user", f"Who is Mira {n}? "*20)
    return path

def test_damage_is_set_aside_by_name(tmp_path):
    "Random bytes are overwritten or the end is cut off: the file opens, or it is moved as it was; it never just disappears."
    rng, moved = Random(5), 0
    whole = filled(tmp_path/"whole.db").read_bytes()
    for n in range(25):
        folder = tmp_path/str(n); folder.mkdir()
        data = bytearray(whole)
        if n%5==0: del data[rng.randrange(100, len(data)):]
        else:
            for _ in range(200): data[rng.randrange(100 if n%2 else 0, len(data))] = rng.randrange(256)
        (folder/"chat.db").write_bytes(data)
        try: h = History(folder/"chat.db")
        except ConfigError as e:
            assert ("another program" in e.what or "newer" in e.what) and (folder/"chat.db").read_bytes()==data
            continue
        with closing(h):
            if not h.moved: continue
            moved += 1
            assert h.moved.read_bytes()==data and h.moved.name.startswith("chat.db.damaged-") and h.moved.name in h.notice()
            k = h.new(); h.add(k, "user", "again")
            assert len(h.cards())==1
    assert moved>=15

def test_two_programs_find_the_same_damage(tmp_path, child):
    "The second does not set aside what the first has begun afresh."
    path = tmp_path/"chat.db"
    path.write_bytes(b"no database"*1000)
    crowd = [child("print(h.add(h.new(), 'user', 'x'), flush=True); time.sleep(.1); h.close()", path) for _ in range(4)]
    for p in crowd:
        out, err = p.communicate(timeout=60)
        assert not p.returncode and out, err
    assert len(kept(path))==4 and len([o for o in tmp_path.iterdir() if "damaged" in o.name])==1

def test_damage_found_while_open(tmp_path):
    "The file is overwritten under a running program: a message with a fix, and the next opening sets it aside."
    path = filled(tmp_path/"chat.db")
    with closing(History(path)) as h:
        with open(path, "r+b") as f: f.write(b"\xff"*os.path.getsize(path))
        h.read("PRAGMA shrink_memory") # what it has read it would not read again
        with pytest.raises(NanoError) as e:
            for o in h.cards(): h.turns(o.id)
            h.new()
        assert e.value.fix
    with closing(History(path)) as h: assert h.moved and h.cards()==[]

def test_other_files_are_left_alone(tmp_path):
    "A newer schema and another program's database are refused, and not a byte of them is changed."
    with closing(History(newer := tmp_path/"newer.db")): pass
    with closing(sqlite3.connect(newer)) as db: db.execute("PRAGMA user_version=99"); db.commit()
    with closing(sqlite3.connect(other := tmp_path/"other.db")) as db: db.execute("CREATE TABLE cash(n)"); db.commit()
    for path, words in ((newer, "schema 99"), (other, "another program")):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=words): History(path)
        assert path.read_bytes()==before
    assert not [o for o in tmp_path.iterdir() if "damaged" in o.name or o.name.endswith(".open")]

# ---- disks -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    "A disk of its own of 300 kB; it is gone after the test."
    if os.name!="posix" or os.geteuid() or not shutil.which("mount"): pytest.skip("only root can mount a small disk to fill")
    where = tmp_path/"disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", where], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", where], check=True)

def test_a_full_disk(disk):
    "What was told stays, the next turn is refused with a fix, a growing answer goes on without the disk; with space again all is as ever."
    with closing(History(disk/"chat.db")) as h:
        k, told = h.new(), []
        keeper = Keeper(h, k, every=0.)
        with pytest.raises(DiskError, match="full") as e:
            for n in range(1000): told.append(h.add(k, "user", f"{n} "*1000))
        assert "free some space" in e.value.fix and len(told)>5
        (disk/"filler").write_bytes(b"")
        keeper.show("long "*20_000)
        assert isinstance(keeper.problem, DiskError)
        assert [o.id for o in h.turns(k)]==[keeper.turn, *told]
        subprocess.run(["mount", "-o", "remount,size=5m", disk], check=True)
        assert keeper.done("end") and not keeper.problem
        told.append(h.add(k, "user", "again"))
    turns = kept(disk/"chat.db")
    assert list(turns)==[keeper.turn, *told] and (turns[keeper.turn].text, turns[keeper.turn].reason)==("long "*20_000, "end")

def test_no_room_to_begin(disk):
    "A disk that is full from the start: one message, and no half file that would be taken for damaged."
    with pytest.raises(OSError), open(disk/"filler", "wb", buffering=0) as f:
        while True:
            if not f.write(b"0"*4096): raise OSError("full")
    with pytest.raises(DiskError): History(disk/"chat.db")
    (disk/"filler").unlink()
    with closing(History(disk/"chat.db")) as h: assert not h.moved and h.add(h.new(), "user", "x")

def test_a_read_only_disk(disk):
    "Refused with a fix, and a page goes on in memory; what was kept is untouched."
    with closing(History(disk/"chat.db")) as h:
        k = h.new(); h.add(k, "user", "x")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(DiskError) as e: History(disk/"chat.db")
    assert "writable" in e.value.fix and "chat.db" in e.value.what
    with closing(open_history(disk/"chat.db")[0]) as h: assert h.add(h.new(), "user", "y") and h.notice()
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert len(kept(disk/"chat.db"))==1

def test_a_place_that_is_none(tmp_path):
    "A file where a folder should be, a folder where the file should be."
    (tmp_path/"file").write_text("")
    for path in (tmp_path/"file"/"chat.db", tmp_path):
        with pytest.raises(DiskError) as e: History(path)
        assert e.value.fix
    assert tmp_path.is_dir() and (tmp_path/"file").read_text()==""

# ---- any text --------------------------------------------------------------------------------------------------------

def whole(text):
    "Half of a character cannot be kept in a file: a sign stands for it."
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def test_hostile_texts_come_back_as_they_were(history):
    "As title, system message, question, answer, model, side and setting: each comes back, is found again, and stands in the JSON."
    for text in TEXTS:
        k = history.new(text, system=text, settings={"stop": [text]})
        history.add(k, "user", text)
        history.update(history.add(k, "assistant", ""), text, model=text, side=text, reason="end", settings={"stop": [text]})
        about, (q, a) = history.about(k), history.turns(k)
        want = whole(text)
        assert [about["title"], about["system"], q.text, a.text, a.model, a.side]==[want]*6
        assert about["settings"]==a.settings=={"stop": [want]}
        assert k in [o.id for o in history.cards(text)]
        read = json.loads(history.json(k))
        assert read["format"]=="nanogpt chat" and [o["text"] for o in read["turns"]]==[want]*2 and read["title"]==want
        history.rename(k, text)
        assert all("\n" not in o.title and len(o.title)<=60 for o in history.cards())
    assert len(history.cards())==len(TEXTS)
    for k in [o.id for o in history.cards()]: history.delete(k)
    assert history.cards()==[] and history.read("SELECT count(*) FROM turns")==[(0,)]

def test_no_text_breaks_the_markdown(history):
    "A reader of Markdown finds our headings alone, and in the quotes what was said."
    for text in TEXTS:
        k = history.new(text)
        for role in ("user", "assistant"): history.add(k, role, text, model=text)
        page = history.markdown(k)
        top = [o for o in MarkdownIt("commonmark").parse(page) if not o.level and not o.type.endswith("_close")]
        assert [o.tag for o in top if o.type!="inline"]==["h1", "h2", "blockquote", "h2", "blockquote"]
        quotes = re.findall(r"(?:^>.*\n?)+", page, re.M)
        said = re.sub("\r\n|\r", "\n", whole(text))
        assert ["\n".join(o[2:] for o in q.rstrip("\n").split("\n")) for q in quotes]==[said]*2

def test_a_conversation_is_named_after_what_was_asked(history):
    "Behind a long story, in two languages; a name that was given counts more, in the list and on the page."
    story = "One misty evening, Ruth went to the lake. A child told her that Kira was ill in bed. "*4
    for text, name in ((story+"Who was ill?", "Who was ill?"), ("从前有一只猫，它住在磨坊里。"*9+"猫住在哪里？", "猫住在哪里？"),
                       (story+"\n\nName the people.", "Name the people."), ("Hi", "Hi")):
        k = history.new()
        history.add(k, "user", text)
        assert history.cards()[0].title==name and headings(history.markdown(k))[0]==name
        history.rename(k, "mine")
        assert history.cards()[0].title=="mine"
    for text in [*TEXTS, ". "*10_000, "?"*20_000, "?"+" "*20_000+"!", "a? "*7_000]: # and no text takes long
        k = history.new()
        history.add(k, "user", text)
        assert len(history.cards()[0].title)<=60 and "\n" not in history.cards()[0].title

def headings(page):
    "The headings of a page."
    found = MarkdownIt("commonmark").parse(page)
    return [re.sub(r"\\(.)", r"\1", o.content) for was, o in zip(found, found[1:], strict=False) if was.type=="heading_open"]

def test_why_and_how_long_in_words(history):
    "Nothing of the program's own words: what takes no time that can be told is said so, and an unknown time is left out."
    k = history.new("x")
    for seconds in (0., .04, 2.): history.add(k, "assistant", "It is.", tokens=2, seconds=seconds, reason="end")
    for reason in ("length", "context", "stop", "stopped", "stuck", "error", INTERRUPTED): history.add(k, "assistant", "It", reason=reason)
    told = [o[1:-1] for o in history.markdown(k).splitlines() if re.fullmatch(r"\*.*\*", o)]
    assert told[:3]==["2 tokens, ended by itself", "2 tokens, under 0.1 s, ended by itself", "2 tokens, 2.0 s, ended by itself"]
    assert all(len(o.split())>2 for o in told[3:]) and len(set(told))==10
    chinese = history.markdown(k, Phrases("zh").t)
    assert not re.search(r"\bended\b|\bcut\b|\bprogram\b|\btokens\b", chinese) and "不到 0.1 秒" in chinese

def test_searching_is_literal(history):
    "Each of these is found in the conversation that holds it, and in no other."
    words = ["100 %", "a_b", "a*b", "[x]", "垫子", "ΑΘΗΝΑ", "straße", "it's", 'say "hi"', "; DROP TABLE turns; --", "\\d", "é"]
    ids = []
    for w in words:
        ids.append(history.new("x"))
        history.add(ids[-1], "user", f"before {w} after")
    for k, w in zip(ids, words, strict=True):
        assert [o.id for o in history.cards(w)]==[k], w
        assert [o.id for o in history.cards(f"  {w.swapcase()} ")]==[k], w
    assert [o.id for o in history.cards("e\u0301")]==[ids[-1]] and history.cards("%")[0].id==ids[0] and len(history.cards("%"))==1
    assert len(history.cards("before"))==len(words) and history.cards("before  100")==[] and len(history.cards(limit=3))==3

def test_deleted_is_gone_from_the_bytes(tmp_path):
    "After a deletion nothing of it stands in any file, while another program has the history open."
    path = tmp_path/"chat.db"
    with closing(History(path)) as h, closing(History(path)) as other:
        k, stays = h.new("secret title"), h.new("stays")
        for n in range(40): h.add(k, "user", f"my secret {n} "*100)
        h.add(stays, "user", "hello")
        h.cut(k, h.turns(k)[20].id)
        other.turns(k)
        there = lambda: [o.name for o in tmp_path.iterdir() if b"secret" in o.read_bytes()]
        assert there()
        assert h.delete(k) and not there()
        assert [o.id for o in other.cards()]==[stays]
        for act in (lambda: other.add(k, "user", "x"), lambda: other.about(k), lambda: other.rename(k, "x"), lambda: other.delete(k)):
            with pytest.raises(DataError, match="another window"): act()
        assert other.new()>stays, "an id is never given twice"

def test_only_the_owner_may_read(tmp_path, monkeypatch):
    "The file and what stands beside it belong to one person; the default place follows XDG."
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path/"data"))
    old = os.umask(0)
    try:
        with closing(History(history_path())) as h:
            h.add(h.new(), "user", "x")
            modes = {o.name: o.stat().st_mode & 0o777 for o in history_path().parent.iterdir()}
    finally: os.umask(old)
    assert history_path()==tmp_path/"data"/"nanogpt"/"chat.db" and len(modes)>=4 and set(modes.values())=={0o600}
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert history_path().is_absolute()

def test_closing_interrupts_what_still_grows(tmp_path):
    "A program that ends in order says so for its growing answers; a second closing does nothing."
    h = History(tmp_path/"chat.db")
    turn = h.add(h.new(), "assistant", "half", reason=RUNNING)
    h.close(); h.close()
    assert kept(tmp_path/"chat.db")[turn].reason==INTERRUPTED
    with pytest.raises(NanoError): h.new()

def test_in_memory_nothing_is_written(tmp_path, monkeypatch):
    "None keeps nothing, and says so."
    monkeypatch.chdir(tmp_path)
    with closing(History(None)) as h:
        h.add(k := h.new(), "user", "x")
        assert h.notice() and h.delete(k) and not list(tmp_path.iterdir())
