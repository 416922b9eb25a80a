"Hostile texts through everything that puts text into a page, in lists and in a real browser; and the control: as they are, they run."
import html
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from browser import browser
from hostile import HOSTILE, RTL, RUNS, taken

from nanogpt.clean import ACTING, TAGS, dangers, file_name, markdown, plain, safe_link, title, visible

def read(page):
    "The text that a reader sees, and the tags with their attributes."
    words, tags, eyes = [], [], HTMLParser()
    eyes.handle_data = words.append
    eyes.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    eyes.feed(page)
    eyes.close()
    return "".join(words), tags

UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}

def hidden(text): return {c for c in text if unicodedata.category(c) in UNSEEN}-set("\n\t\u200c\u200d")

def test_there_are_enough():
    "More than forty, no two alike, and of every kind that was asked for."
    assert len(HOSTILE)>=80 and len(set(HOSTILE.values()))==len(HOSTILE) and len(RUNS)>=20
    every = "".join(HOSTILE.values())
    parts = "<script", "onerror", "<svg", "](javascript:", "](data:", "{{", "\\def", "../", "\0", RTL, "\u200b", "\ud800", "w"*1000, "&#"
    assert [p for p in parts if p not in every]==[]

@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_survives(name):
    "As text it is one leaf that says all; as Markdown only listed tags remain; nothing runs, nothing loads, nothing is unseen."
    text = HOSTILE[name]
    for page in (plain(text), f'<p title="{plain(text)}">', f"<p title='{plain(text)}'>", markdown(text)):
        assert dangers(page)==[] and not hidden(page)
        page.encode("utf-8")
    assert read(f'<p title="{plain(text)}">')[1]==[("p", dict(title=visible(text)))]
    assert read(plain(text))==(visible(text), []) and html.unescape(plain(text))==visible(text)
    for tag, attrs in read(markdown(text))[1]:
        assert tag in TAGS-ACTING and set(attrs)<={"href", "title", "target", "rel", "dir", "start", "style"}
        assert re.fullmatch("text-align: ?(left|right|center);?", attrs.get("style", "text-align:left"))
        if tag=="a" and "href" in attrs:
            assert safe_link(attrs["href"]) and attrs["title"]==attrs["href"]
            assert attrs["target"]=="_blank" and set(attrs["rel"].split())=={"noopener", "noreferrer", "nofollow"}

@pytest.mark.parametrize("name", HOSTILE)
def test_titles_and_files(name, tmp_path):
    "A title is one visible line of at most sixty letters; a file of that name lies where it should, on any system."
    line = title(HOSTILE[name])
    assert len(line)<=60 and line==line.strip() and not hidden(line) and "\n" not in line
    file = file_name(HOSTILE[name])
    assert PurePosixPath(file).name==PureWindowsPath(file).name==file and 0<len(file)<=60 and not set(file)&set(" ./\\:*?\"<>|'`$&;%\0")
    assert not file.startswith("-") and PureWindowsPath(file+".md").stem.lower() not in ("con", "nul", "aux", "prn")
    path = tmp_path/(file+".md")
    path.write_text("x")
    assert [p.name for p in tmp_path.iterdir()]==[unicodedata.normalize("NFC", path.name)] or path.exists()

def test_ordinary_text_stays():
    "What people write comes through as they wrote it, and Markdown does its work."
    for text in ("Is 2 < 3 & 4 > 1? \"Yes\", it's so.", "你好，世界！ 这是什么？", "שלום עולם", "می\u200cخواهم", "👩\u200d🔬 é ñ ß"):
        assert read(plain(text))[0]==text and text in read(markdown(text))[0] and title(text)==text
    page = markdown("# A\n\n1. *one*\n2. **two**\n\n> `x<y`\n\n~~no~~\n\n|a|\n|:-:|\n|b|\n\n---\n\n```py\nif a<b: pass\n```")
    want = "h3 ol li em strong blockquote p code s table thead tbody tr th td hr pre".split()
    assert {t for t, _ in read(page)[1]}==set(want)
    assert "if a<b: pass" in read(page)[0]

def test_one_lock_is_open(monkeypatch):
    "With the reader broken, so that it lets HTML through, the cleaner alone still holds; with the cleaner gone, the reader does."
    import nanogpt.clean as module
    open_reader = module._reader()
    open_reader.options["html"], open_reader.validateLink = True, lambda address: True
    with monkeypatch.context() as m:
        m.setattr(module, "_MARKDOWN", open_reader)
        assert [k for k, text in HOSTILE.items() if dangers(module.markdown(text))]==[]
        assert any(dangers(open_reader.render(visible(text))) for text in HOSTILE.values()) # the control: it does let it through
    assert [k for k, text in HOSTILE.items() if dangers(module._MARKDOWN.render(visible(text)))]==[]

# ---- a real browser --------------------------------------------------------------------------------------------------

def shown(text):
    "A page that shows a text in every way there is."
    words, line = plain(text), plain(title(text))
    return (f"<!doctype html><meta charset=utf-8><title>{line}</title><h1 id=h>{line}</h1><p id=p tabindex=0>{words}</p>"
            f"<div id=m>{markdown(text)}</div><input id=a value=\"{words}\" title='{words}'><textarea>{words}</textarea>"
            f"<select><option title=\"{words}\">{line}</option></select><svg><title>{words}</title><text>{words}</text></svg>")

@pytest.fixture(scope="module")
def at(tmp_path_factory):
    "A page of a browser that notes what is asked for elsewhere; nothing is answered."
    with browser(tmp_path_factory.mktemp("clean")/"profile") as page:
        page.asked = []
        page.context.route("**/*", lambda route: (page.asked.append(route.request.url), route.abort()))
        page.on("dialog", lambda d: d.dismiss())
        yield page

def run_everything(at):
    "Press, point at and focus whatever can be: what waits for a person does not wait any longer."
    at.evaluate("""() => { for (const e of document.body.querySelectorAll('*')) {
        if (e.tagName != 'A') e.click?.(); e.focus?.(); for (const k of ['mouseover','load','error']) e.dispatchEvent(new Event(k)) } }""")
    for link in at.locator("a[href]").all():
        assert re.match("https?://|mailto:", link.evaluate("a => a.href"))

def test_nothing_runs_in_a_browser(at):
    "All texts as text, attribute, Markdown, title and option: no script runs, nothing is asked for, no element is one of theirs."
    for name, text in HOSTILE.items():
        at.set_content(shown(text))
        run_everything(at)
        assert not taken(at) and at.asked==[], (name, at.asked)
        assert at.evaluate("[...document.querySelectorAll('#p *, #h *, option *')].length")==0, name
        assert at.evaluate("document.querySelectorAll('script, iframe, img, object, embed, link, base, style, form').length")==0, name
        assert at.evaluate("document.querySelector('#a').value").split()==visible(text).split() or "\n" in visible(text), name
        assert at.evaluate("document.querySelector('#p').textContent")==visible(text), name

SOON = """() => new Promise(ok => {
    let n = 0; const look = () => window.taken || n++ > 40 ? ok(window.taken === 1) : setTimeout(look, 25); look() })"""

def test_control_as_it_is_it_runs(at):
    "The same texts as they are: scripts run and strangers are asked; so the test above can see."
    ran = []
    for name in RUNS:
        at.set_content(f"<!doctype html><body>{HOSTILE[name]}")
        if at.evaluate(SOON): ran.append(name)
    assert ran==RUNS, set(RUNS)-set(ran)
    at.asked.clear()
    at.set_content(HOSTILE["picture that counts readers"])
    at.wait_for_load_state("networkidle")
    assert at.asked==["http://hostile.example/x.png"]
    at.asked.clear()
    at.set_content(f"<input value=\"{HOSTILE['an attribute more']}\">")
    run_everything(at)
    assert taken(at)
    at.set_content(f"<a id=x href='javascript:window.taken=1'>{HOSTILE['link']}</a>")
    at.click("#x")
    assert taken(at)
