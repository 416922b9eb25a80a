"The dashboard in a real browser: what a person sees and does, what strangers' words cannot do, what a kill leaves behind."
import json
import re
import time

import pytest
from conftest import ROOT
from dash import Server, Visitor, chrome
from hostile import HOSTILE, RUNS, taken
from parrot import save_parrot, tokenizer

from nanogpt.clean import visible
from nanogpt.history import History

TUNED, BASE, SLOW = "The tuned cat says **hello** to you. ", "The base cat says nothing at all. ", "One two three four five. "
SHORT = {k: s[:300] for k, s in HOSTILE.items()}                   # long enough to do harm
TEXTS = [s.encode("utf-8", "replace").decode() for s in SHORT.values()]
PARTS = [TEXTS[i::3] for i in range(3)]                            # of one answer each
NAMES = [s for s in HOSTILE.values() if "/" not in s and "\0" not in s and s.isprintable() and s.strip(". ") and len(s.encode())<200]
PAD = "cat "*60                                                    # an answer begins somewhere in here

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A folder of runs whose answers are known."
    home = tmp_path_factory.mktemp("dashboard")/"runs"
    tok = tokenizer(["\n\n".join(TEXTS)]*3+[TUNED+BASE+SLOW]*20, 900)
    for k, part in enumerate(PARTS): save_parrot(home/f"parrot{k}", tok, PAD+"\n\n".join(part))
    for k, name in enumerate(NAMES[:24]): save_parrot(home/name, tok, BASE, block=64, base=home/name if k%2 else None)
    (home/(NAMES[24]+"!")).mkdir()
    (home/(NAMES[24]+"!")/"config.json").write_text('{"kind": "<img src=x onerror=window.taken=1>"')
    save_parrot(home/"slow", tok, SLOW, end=False, layers=8)
    save_parrot(home/"base", tok, BASE, times=6)
    save_parrot(home/"tuned", tok, TUNED, times=6, base=home/"base")
    return home

@pytest.fixture(scope="module")
def server(models):
    with Server(models, models.parent, "--max_tokens", 900, "--visitors", 6) as s: yield s

@pytest.fixture(scope="module")
def browser():
    with chrome() as at: yield at

def test_hostile_strings_do_run_where_nobody_cleans(browser):
    "The control: in a page that trusts them, these run. Without it, what follows could pass because nothing works."
    page = browser.new_page()
    ran = []
    for k in RUNS:
        page.goto("about:blank")
        page.set_content(f"<!doctype html><body><div>{HOSTILE[k]}</div></body>")
        try: page.wait_for_function("window.taken === 1", timeout=300)
        except Exception: continue                                 # some run in an attribute, or in a frame, only
        ran.append(k)
    page.close()
    assert len(ran)>=12, ran

def test_a_conversation(server, browser):
    "Open, choose a model, ask, watch it stream, stop, copy, make anew, edit, turn the knobs, look inside."
    with Visitor(browser, server.url) as v:
        v.open()
        assert "tuned" in v.models()[0] and any("slow" in o for o in v.models())     # the newest tuned run comes first
        v.shot("1-open")
        v.pick("slow")
        v.type("Count for me")
        v.growing(10)
        first = v.one(".ng-running .ng-text").text_content()
        v.growing(len(first)+100)                                                    # it streams
        assert v.one(".ng-running .ng-text").text_content().startswith(first) and v.one(".ng-stop").is_visible()
        v.shot("2-streaming")
        v.one(".ng-stop").click()
        v.finished(1)
        [said] = v.answers()
        assert SLOW in said*2 and len(said)<900*4 and "Stopped" in v.one(".ng-answer").inner_text()
        v.page.wait_for_timeout(400)
        assert v.answers()==[said]                                                   # and nothing comes behind it
        v.one(".ng-answer .ng-copy").click()
        v.shows("said => navigator.clipboard.readText().then(o => o.trim() === said)", said)
        v.pick("tuned")
        assert "The tuned cat says hello to you." in v.ask("And you?")               # Markdown's stars are gone …
        v.all(".ng-answer .ng-copy").last.click()
        v.shows("() => navigator.clipboard.readText().then(o => o.includes('says **hello** to'))") # … and copied
        v.all(".ng-regenerate").last.click()
        v.shows("() => document.querySelectorAll('.ng-answer').length == 2 && !document.querySelector('.ng-running')")
        assert v.questions()==["Count for me", "And you?"] and "hello" in v.answers()[1]
        v.one(".ng-user").hover()
        v.one(".ng-user .ng-edit").click()
        v.shows("() => document.querySelector('.ng-input').value == 'Count for me'")
        v.type("Count no more")
        v.shows("() => document.querySelectorAll('.ng-answer').length == 1 && !document.querySelector('.ng-running')")
        assert v.questions()==["Count no more"]
        v.shot("3-edited")
