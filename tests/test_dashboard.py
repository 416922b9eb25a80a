"The dashboard in a real browser: what a person sees and does, what strangers' words cannot do, what a kill leaves behind."
import json
import re
import time

import pytest
from dash import HANG, Server, Visitor, chrome
from hostile import HOSTILE, RUNS, taken
from parrot import save_speaker, tokenizer

from nanogpt.clean import visible
from nanogpt.history import History

TUNED, BASE = "The tuned cat says **hello** to you, and wishes everybody well.", "The base cat says nothing at all."
SAID, SLOW = TUNED.replace("*", ""), "One two three four five. "
TEXTS = [s[:300].encode("utf-8", "replace").decode() for s in HOSTILE.values()] # long enough to do harm
PARTS = [TEXTS[i::3] for i in range(3)]                            # of one answer each
NAMES = [s for s in HOSTILE.values() if "/" not in s and "\0" not in s and s.isprintable() and s.strip(". ") and len(s.encode())<200]
PAD = "cat "*60                                                    # an answer begins somewhere in here

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A folder of runs whose answers are known."
    home = tmp_path_factory.mktemp("dashboard")/"runs"
    tok = tokenizer(["\n\n".join(TEXTS)]*3+[TUNED+BASE+SLOW]*40, 1000)
    for k, part in enumerate(PARTS): save_speaker(home/f"parrot{k}", tok, PAD+"\n\n".join(part), loop=True)
    for name in NAMES: save_speaker(home/name, tok, BASE, block=256)
    bad = home/"<img src=x onerror=alert(1)>"
    bad.mkdir()
    (bad/"config.json").write_text('{"kind": "<img src=x onerror=window.taken=1>"') # torn
    save_speaker(home/"quick", tok, SLOW, end=False, loop=True)
    save_speaker(home/"slow", tok, SLOW, end=False, layers=20, loop=True) # nobody waits for its end
    save_speaker(home/"base", tok, BASE)
    save_speaker(home/"tuned", tok, TUNED, base=home/"base")
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
    frames = "all => document.body.append(...all.map(o => Object.assign(document.createElement('iframe'), {srcdoc: o})))"
    page.evaluate(frames, [f"<!doctype html><body><div>{HOSTILE[k]}</div></body>" for k in RUNS])
    ran = "() => [...document.querySelectorAll('iframe')].filter(o => o.contentWindow.taken === 1).length >= 12"
    page.wait_for_function(ran, timeout=HANG*1000)                 # the others run in an attribute, or in a frame, only
    page.close()

def test_what_a_visitor_would_notice(browser):
    "The other control: a page that errs, calls away, runs a script in an attribute and is too wide is not called quiet."
    v = Visitor(browser, "http://127.0.0.1:9/")
    v.page.goto("about:blank")
    v.page.set_content("<div class='ng-app ng-main' style='width:3000px'><img src='http://hostile.example/x.png' onload='1'><b>x</b></div>"
                       "<script>console.error('bad'); alert(1); throw new Error('worse')</script>")
    v.shows("() => __ran.length")
    assert "http://hostile.example/x.png" in v.strangers() and {"bad", "worse"} <= set(v.errors)
    assert "alert 1" in v.scripts() and any("onload" in o for o in v.scripts()) and v.page.evaluate(NARROW)!=[0]
    with pytest.raises(AssertionError): v.quiet()
    v.close()

def test_a_failure_says_what_was_seen(server, browser, capsys):
    "A test that fails while somebody looks at the page prints what they saw, what the browser said, and the server's last words."
    with pytest.raises(ZeroDivisionError), Visitor(browser, server.url) as v:
        v.open()
        v.page.evaluate("() => console.error('oh')")
        1/0 # noqa: B018
    said = capsys.readouterr().out
    for part in ("ng-app", "What would you like to ask?", "\noh\n", server.url): assert part in said

def test_nothing_typed_is_lost(server, browser):
    "Python's words come late, and whoever types does not wait for them: every letter stays, and every question is answered or given back."
    with Visitor(browser, server.url, wire=True) as v:
        v.open()
        v.pick("tuned")
        box, card = v.one(".ng-input"), lambda name: f".ng-card:has(.ng-open[title*='{name}'])"
        v.ask("One before")
        with v.late(): v.one(".ng-new").click(); box.fill("Robin's question")
        assert v.typed()=="Robin's question"                                         # its answer to New came behind these letters
        box.press("Enter")
        v.finished(1)
        box.fill("for later")
        v.one(".ng-user").hover()
        with v.late(): v.one(".ng-user .ng-edit").click(); box.fill("for later too")
        assert v.typed()=="Robin's question"                                         # it is edited, the draft waits
        had = v.one(".ng-answer").get_attribute("data-turn")
        with v.late(): v.type("Robin's other question"); box.fill("and then")
        v.shows("had => !document.querySelector('.ng-running') && document.querySelector('.ng-answer')?.dataset.turn > had", had)
        assert v.questions()==["Robin's other question"] and v.typed()=="and then\nfor later too"
        v.one(".ng-new").click()
        v.one(".ng-starter").wait_for()
        some, starts = v.all(".ng-starter"), "o => o.dataset.fill"
        some.nth(0).click()
        assert v.typed()==some.nth(0).evaluate(starts)+"\nand then\nfor later too"
        box.fill("")
        for k in (0, 1): some.nth(k).click()
        assert v.typed()==some.nth(1).evaluate(starts)                               # a text that nobody typed makes room

        v.pick("slow")
        box.fill("")
        with v.late(): v.type("Stop at once"); v.page.keyboard.press("Escape")        # before anybody could see that it runs
        v.finished(1)
        assert "Stopped" in v.one(".ng-answer").inner_text()
        v.type("Go on")
        v.growing(10)
        with v.late(): v.type("too early"); box.fill("more")
        assert v.typed()=="too early\nmore" and "no answer yet" in v.one(".ng-alert").inner_text()
        v.page.keyboard.press("Escape")
        v.finished(2)

        v.one(card("Robin")).hover()
        v.one(card("Robin")+" summary").click()
        v.one(card("Robin")+" .ng-rename").click()
        v.one(".ng-ask input").fill("half a na")
        v.one(card("Stop at once")).hover()
        v.one(card("Stop at once")+" summary").click()
        v.one(".ng-new").click()
        v.type("a new card")
        v.one(card("a new card")).wait_for()                                         # the list has been drawn anew
        v.page.keyboard.press("Escape")
        v.finished(1)
        assert v.one(".ng-ask input").input_value()=="half a na" and v.one(card("Stop at once")+" .ng-rename").is_visible()

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
        assert v.ask("And you?")==SAID                                               # Markdown's stars are gone …
        v.all(".ng-answer .ng-copy").last.click()
        v.shows("() => navigator.clipboard.readText().then(o => o.includes('says **hello** to'))") # … and copied
        v.anew(v.all(".ng-regenerate").last.click, 2)
        assert v.questions()==["Count for me", "And you?"] and v.answers()[1]==SAID
        v.one(".ng-user").hover()
        v.one(".ng-user .ng-edit").click()
        v.shows("() => document.querySelector('.ng-input').value == 'Count for me'")
        v.anew(lambda: v.type("Count no more"), 1)
        assert v.questions()==["Count no more"]
        v.shot("3-edited")

def test_a_page_without_a_model(browser, tmp_path):
    "It says so, offers to train one, shows how that goes on, and stops it."
    (tmp_path/"runs").mkdir()
    with Server(tmp_path/"runs", tmp_path) as s, Visitor(browser, s.url) as v:
        v.open()
        assert "no trained model" in v.one(".ng-empty").inner_text()
        v.one(".ng-demo").click()
        v.shows("() => document.querySelector('.ng-demo-log')?.textContent")
        v.page.evaluate("() => { part = document.querySelector('.ng-log > .ng-part'); said = part.textContent }")
        v.shows("() => document.querySelector('.ng-log > .ng-part').textContent != said")
        assert v.page.evaluate("() => part.isConnected")                             # drawn in its place: a new part would fade in
        v.shot("15-training")
        v.one("[data-do=demo_stop]").click()
        v.one(".ng-demo").wait_for()
        v.quiet()

def number(v, knob, text):
    "Type a number into a knob: beside a slider stands its value, which can be written."
    box = v.page.locator(f".ng-knob-{knob} :is(.widget-readout, input)").first
    box.click()
    v.page.keyboard.press("Control+A")
    v.page.keyboard.insert_text(text)
    v.page.keyboard.press("Enter")

def test_knobs_and_what_stood_beside(server, browser):
    "A preset, a number typed, a word about each; then a click on a token, and where the model looked."
    with Visitor(browser, server.url) as v:
        v.open()
        v.pick("tuned")
        v.settings()
        v.one(".ng-preset[data-arg=precise]").click()
        v.shows("() => document.querySelector('.ng-preset[data-arg=precise]').ariaPressed == 'true'")
        assert v.page.locator(".ng-knob-temperature .widget-readout").inner_text()=="0.00"
        assert v.all(".ng-knob").count()==9 and all(len(o)>20 for o in v.all(".ng-knob-why").all_inner_texts())
        number(v, "max_tokens", "7")
        v.shows("() => document.querySelector('.ng-knob-max_tokens .widget-readout').textContent == '7'")
        v.shot("4-knobs")
        v.settings(False)
        v.ask("Who are you?")
        assert "7 tokens" in v.one(".ng-answer .ng-meter").inner_text() and "7" in v.one(".ng-answer .ng-why").inner_text()
        v.one(".ng-answer .ng-tokens").click()
        v.one(".ng-peek .ng-token").wait_for()
        assert v.all(".ng-peek .ng-token").count()==7
        v.one(".ng-peek .ng-token").press("Enter")
        v.one(".ng-peek .ng-alternatives").wait_for()
        rows = v.all(".ng-alternatives tbody tr").all_inner_texts()
        assert any("chosen" in o for o in rows) and rows[-1].startswith("all others") and all("%" in o for o in rows)
        v.shot("5-tokens")
        v.look_away()
        v.one(".ng-answer .ng-attention").click()
        v.one(".ng-peek svg.ng-map").wait_for()
        assert v.all(".ng-looked tbody tr").count()==7
        v.page.locator(".ng-peek select[data-do=head]").select_option(index=1)
        v.shows("() => /head 1/.test(document.querySelector('.ng-looked figcaption').textContent)")
        v.shot("6-attention")
        v.look_away()
        v.settings()
        number(v, "beams", "3")                                                     # a search over a model that is sure
        v.ask("Once more")
        assert "7 tokens" in v.all(".ng-answer .ng-meter").last.inner_text()

def test_before_and_after(server, browser):
    "The same question to the base and to the tuned model, side by side."
    with Visitor(browser, server.url) as v:
        v.open()
        v.pick("tuned")
        v.one(".ng-compare").click()
        v.type("Who are you?")
        v.shows("() => document.querySelectorAll('.ng-answer').length == 2 && !document.querySelector('.ng-running')")
        said = {v.all(".ng-answer").nth(k).get_attribute("data-side"): o for k, o in enumerate(v.answers())}
        assert said.pop("")==SAID and list(said.values())==[BASE]
        v.shot("7-compare")

def test_history_stays(server, browser, models):
    "Ask, reload, find it by a word, name it, take it home, delete it: then it is gone."
    with Visitor(browser, server.url) as v:
        v.open()
        v.pick("tuned")
        v.ask("Where is the 100% _pelican_?")
        v.one(".ng-new").click()
        v.shows("() => !document.querySelector('.ng-turn')")
        v.ask("鹈鹕在哪里？")
        v.one(".ng-language").select_option("zh")
        v.shows("() => document.documentElement.lang.startsWith('zh')")
        v.open()                                                                     # as after a restart: all comes from the file
        v.shows("() => document.documentElement.lang.startsWith('zh') && document.querySelector('.ng-user')")
        assert v.questions()==["鹈鹕在哪里？"]                                         # the conversation and the language are as before
        v.one(".ng-tokens").click()                                                  # of this answer nothing is remembered; that is said
        v.shows("() => /本次访问/.test(document.querySelector('.ng-alert')?.textContent)")
        v.one(".ng-language").select_option("en")
        v.shows("() => document.documentElement.lang == 'en'")
        other = v.context.new_page()                                                 # another tab begins with nothing open
        other.goto(server.url)
        other.wait_for_function("() => document.querySelector('.ng-starter')")
        other.close()
        v.one(".ng-search input").fill("% _PELI")
        v.shows("() => document.querySelectorAll('.ng-card').length == 1")
        v.one(".ng-open").click()
        v.shows("() => document.querySelector('.ng-user .ng-text')?.textContent.includes('pelican')")
        assert v.answers()==[SAID]
        v.one(".ng-search input").fill("鹈鹕")
        v.shows("() => document.querySelector('.ng-open')?.textContent.includes('鹈鹕')")
        v.one(".ng-search input").fill("zzqq")
        v.shows("() => document.querySelector('.ng-cards').textContent.includes('Nothing was found')")
        v.one(".ng-search input").fill("")
        v.shows("() => document.querySelectorAll('.ng-card').length > 1")
        card = ".ng-card:has(.ng-open[title*='pelican'])"
        v.one(card).hover()
        v.one(f"{card} summary").click()
        for at, name, found in ((".ng-export-md", ".md", "_pelican"), (".ng-export-json", ".json", "pelican")):
            if not v.one(f"{card} {at}").is_visible(): v.one(card).hover(); v.one(f"{card} summary").click()
            with v.page.expect_download() as got: v.one(f"{card} {at}").click()
            text = got.value.path().read_text(encoding="utf-8")
            assert not v.one(f"{card} {at}").is_visible()                            # a menu shuts after each choice
            assert got.value.suggested_filename.endswith(name) and found in text.replace("\\", "")
        assert [o["role"] for o in json.loads(text)["turns"]]==["user", "assistant"]
        if not v.one(f"{card} .ng-rename").is_visible(): v.one(card).hover(); v.one(f"{card} summary").click()
        v.one(f"{card} .ng-rename").click()
        v.one(".ng-ask input").fill("A bird <b>")
        v.one(".ng-ask input").press("Enter")
        v.shows("() => [...document.querySelectorAll('.ng-open')].some(o => o.textContent == 'A bird <b>')")
        v.shot("8-history")
        card = ".ng-card:has(.ng-open[title*='A bird'])"
        v.one(card).hover()
        v.one(f"{card} summary").click()
        v.one(f"{card} .ng-delete").click()
        v.one(".ng-delete-yes").click()
        v.shows("""() => !document.querySelector('.ng-ask')
            && ![...document.querySelectorAll('.ng-open')].some(o => o.textContent.includes('A bird'))""")
        assert all("bird" not in o.title for o in kept(models)) and any("鹈鹕" in o.title for o in kept(models))

def kept(models):
    "What the file says, read by another program."
    history = History(models.parent/"chat.db")
    try: return history.cards()
    finally: history.close()

FOCUS = """() => { const e = document.activeElement, s = getComputedStyle(e)
    return [e.className, e.ariaLabel || e.innerText || e.title || '', s.outlineStyle != 'none' || s.boxShadow != 'none'] }"""

def test_by_keyboard_alone(server, browser):
    "No mouse: type, a new line, send, stop, reach a button by Tab and see where one is."
    with Visitor(browser, server.url) as v:
        v.open()
        v.pick("slow")
        v.one(".ng-input").focus()
        keys = v.page.keyboard
        keys.type("First line")
        keys.press("Shift+Enter")
        keys.type("second line")
        assert v.one(".ng-input").input_value()=="First line\nsecond line"
        keys.press("Enter")
        v.growing(20)
        keys.press("Escape")
        v.finished(1)
        assert "Stopped" in v.one(".ng-answer").inner_text() and v.questions()==["First line\nsecond line"]
        assert v.page.evaluate("() => document.activeElement.matches('.ng-input')")  # one can go on typing
        seen = []
        for _ in range(40):
            keys.press("Shift+Tab")
            seen.append(v.page.evaluate(FOCUS))
            if "ng-copy" in seen[-1][0]: break
        else: raise AssertionError(seen)
        assert all(ring for name, _, ring in seen if name) and all(label.strip() for name, label, _ in seen if "ng-press" in name), seen
        keys.press("Enter")
        v.shows("() => navigator.clipboard.readText().then(o => o.includes('two three'))")

NARROW = """() => { const w = document.documentElement.clientWidth, ways = 'pre, table, .ng-sr, .ng-looked, .ng-side'
    const out = e => { const r = e.getBoundingClientRect(); return r.width && r.height && r.right > w + 1 && !e.closest(ways) }
    const wide = [...document.querySelectorAll('.ng-main *')].filter(out).map(e => e.className || e.tagName)
    return [document.documentElement.scrollWidth - w, ...wide] }"""
LIGHT = """at => {                          // how light the ground under a text is, and how far its letters stand out (WCAG 2.1, 1.4.3)
    const line = x => x <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4
    const light = s => { const [r, g, b] = s.match(/[\\d.]+/g).map(x => line(x/255)); return .2126*r + .7152*g + .0722*b }
    const ink = light(getComputedStyle(document.querySelector(at)).color)
    let e = document.querySelector(at), under = 'rgba(0, 0, 0, 0)'
    for (; e && /, 0\\)|transparent/.test(under); e = e.parentElement) under = getComputedStyle(e).backgroundColor
    const paper = light(under), [a, b] = [ink, paper].sort((x, y) => y - x)
    return [paper, (a + .05)/(b + .05)] }"""

def test_phone_dark_and_chinese(server, browser):
    "A narrow screen without sideways scrolling, a dark one with enough contrast, and every word in Chinese."
    with Visitor(browser, server.url, width=360, height=740, locale="zh-CN", color_scheme="dark") as v:
        v.open()
        assert v.page.evaluate("() => document.documentElement.lang").startswith("zh")
        assert "今天" not in v.one(".ng-main").inner_text() and re.search(r"[\u4e00-\u9fff]", v.one(".ng-empty").inner_text())
        v.shot("9-phone-dark-zh")
        v.pick("tuned")
        v.ask("w"*300+" 你好")
        assert v.page.evaluate(NARROW)==[0]
        for at in (".ng-answer .ng-text", ".ng-user .ng-text", ".ng-meter", ".ng-input"):
            back, contrast = v.page.evaluate(LIGHT, at)
            assert back<.1 and contrast>=4.5, (at, back, contrast)
        v.one(".ng-answer .ng-tokens").click()
        v.one(".ng-peek .ng-token").wait_for()
        assert v.page.evaluate(NARROW)==[0]
        v.shot("10-phone-tokens-zh")
        v.look_away()
        v.settings()
        v.shot("11-phone-knobs-zh")
        text = v.one(".ng-right").inner_text()
        assert len(re.findall(r"[\u4e00-\u9fff]", text))>150
        assert not re.findall(r"\b[a-z]+ [a-z]+ [a-z]+\b", text), text             # no English sentence is left
        v.settings(False)
        v.one(".ng-menu").click()
        v.one(".ng-language").select_option("en")
        v.shows("() => document.documentElement.lang == 'en'")
        v.one(".ng-theme").click()
        v.shows("() => document.documentElement.dataset.theme == 'light'")
        assert v.page.evaluate(LIGHT, ".ng-answer .ng-text")[0]>.8
        v.page.set_viewport_size(dict(width=1920, height=1000))
        v.shows("() => document.querySelector('.ng-show-left:not(.ng-show-right)')")
        v.page.set_viewport_size(dict(width=360, height=740))                        # made narrow: nothing lies over the chat
        v.shows("() => !document.querySelector('.ng-show-left, .ng-show-right')")
        v.page.set_viewport_size(dict(width=1920, height=1000))
        v.shows("() => document.querySelector('.ng-show-left')")
        v.shot("12-wide-light")
        assert v.page.evaluate(NARROW)==[0]

def test_hostile_strings_stay_letters(server, browser, models):
    "As answers, as questions, as titles, as names of runs and of files: nothing runs, nothing is fetched, and the letters are there."
    history = History(models.parent/"chat.db")
    for s in HOSTILE.values(): history.add(history.new(title=s), "user", s[:2000])
    history.close()
    with Visitor(browser, server.url) as v:
        v.open()
        listed = v.models()
        assert sum(any(o.strip()[:20] in m for m in listed) for o in map(visible, NAMES))>=len(NAMES)-3, listed
        for k, part in enumerate(PARTS):
            v.pick(f"parrot{k}")
            v.one(".ng-new").click()
            v.shows("() => !document.querySelector('.ng-turn')")
            said = v.ask("Go")
            assert len(said)>1500 and not taken(v.page) and v.scripts()==[], (k, len(said))
            v.type("\n".join(part))
            v.shows("() => document.querySelectorAll('.ng-user').length == 2")
            v.page.keyboard.press("Escape")
            v.finished(2)
            assert not taken(v.page) and v.scripts()==[], k
            seen = sum(visible(o).split()[0][:20] in v.questions()[-1] for o in part if o.split())
            assert seen>.8*len(part), (k, seen, len(part))                           # all is there to be read
        v.shot("13-hostile")
        assert len(v.titles())>=len(HOSTILE)-5
        for name in ("picture", "an attribute more", "HTML in Markdown", "up and out", "two endings"):
            card = v.page.locator(".ng-card").filter(has_text=visible(HOSTILE[name])[:12]).first
            card.locator(".ng-open").click()
            v.shows("() => document.querySelector('.ng-user')")
            card.hover()
            card.locator("summary").click()
            with v.page.expect_download() as got: card.locator(".ng-export-md").click()
            assert re.fullmatch(r"[\w-]+\.md", got.value.suggested_filename), got.value.suggested_filename
        v.pick(NAMES[0])
        v.ask("Who?")
        assert not taken(v.page)

def test_a_thousand_tokens_are_few_bytes(server, browser):
    "What streams to the browser, counted frame by frame, and the memory of the Python behind the page."
    with Visitor(browser, server.url) as v:
        v.open()
        v.pick("quick")
        v.settings()
        number(v, "max_tokens", "1000")
        v.page.wait_for_timeout(300)
        before = v.bytes
        v.type("Count")
        v.finished(1)
        assert "1000 tokens" in v.one(".ng-answer .ng-meter").inner_text().replace(",", "")
        assert 4_000<v.bytes-before<400_000, v.bytes-before
        most = max(o.memory_info().rss for o in server.kernels())
        assert most<450*2**20, f"{most/2**20:.0f} MB"

def test_two_visitors_at_once(server, browser):
    "Both answers grow while the other does, and nobody sees the other's page."
    with Visitor(browser, server.url) as a, Visitor(browser, server.url) as b:
        for v in (a, b): v.open(); v.pick("slow")
        a.type("I am A")
        b.type("I am B")
        for v in (a, b): v.growing(10)
        had = [len(v.one(".ng-running .ng-text").text_content()) for v in (a, b)]
        for v, n in zip((a, b), had, strict=True): v.growing(n+100)
        assert a.questions()==["I am A"] and b.questions()==["I am B"]
        for v in (a, b): v.page.keyboard.press("Escape"); v.finished(1)

def test_a_kernel_that_dies_is_told(models, browser, tmp_path):
    "The page says in words that its Python is gone, and stays a page; another visit goes on with what was said."
    with Server(models, tmp_path) as s, Visitor(browser, s.url) as v:
        v.open()
        v.pick("tuned")
        assert v.ask("Who are you?")==SAID and not v.one(".ng-lost").is_visible()
        [kernel] = s.kernels()
        kernel.kill()
        v.one(".ng-lost").wait_for(state="visible")
        assert "process has ended" in v.one(".ng-lost").inner_text() and v.one(".ng-input").is_visible() and v.answers()==[SAID]
        v.shot("15-kernel-gone")
        v.errors.clear()                                                             # the browser may well complain now
        v.open()
        v.shows("() => document.querySelectorAll('.ng-user').length == 1")
        assert v.answers()==[SAID] and not v.one(".ng-lost").is_visible()

def test_a_kill_in_the_middle_of_an_answer(models, browser, tmp_path):
    "SIGKILL while an answer grows: every earlier turn is there afterwards, the question too, and the torn answer says so."
    with Server(models, tmp_path, "--max_tokens", 900) as s, Visitor(browser, s.url) as v:
        v.open()
        v.pick("tuned")
        first = v.ask("What was said first?")
        v.pick("slow")
        v.type("What was said last?")
        v.growing(30)
        kernels = s.kernels()
        s.kill()
        v.errors.clear()                                                             # the browser may well complain now
        late = time.monotonic()+HANG
        while any(o.is_running() and o.status()!="zombie" for o in kernels) and time.monotonic()<late: time.sleep(.2)
        assert not any(o.is_running() and o.status()!="zombie" for o in kernels)     # no orphan goes on computing
        v.errors.clear()
    with Server(models, tmp_path) as s, Visitor(browser, s.url) as v:
        v.open()
        v.one(".ng-open").click()
        v.shows("() => document.querySelectorAll('.ng-user').length == 2")
        assert v.questions()==["What was said first?", "What was said last?"] and v.answers()[0]==first
        assert len(v.answers())==1 or "ended before" in v.all(".ng-answer").last.inner_text()
        v.shot("14-after-a-kill")
