"A running dashboard, and people who visit it in a browser."
import contextlib
import os
import re
import subprocess
import threading
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from browser import FLAGS, chromium
from mini import command, environment

HANG = 120                                                             # seconds: nothing takes so long, even where the machine is busy
LOGS = {}                                                              # address → what that server has said

class Server:
    "`nanogpt chat` in a process of its own, with folders of its own, on a port that was free."
    def __init__(self, runs, home, *more, **env):
        words = ("chat", "--no_open", "--port", 0, "--runs", runs, "--history", home/"chat.db", *more)
        own = {f"XDG_{k}_HOME": str(home/k.lower()) for k in ("DATA", "CONFIG", "CACHE")} | dict(HOME=str(home))
        self.lines, self.url = [], ""
        self.child = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                                      env=environment(**own, **env))
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.found = threading.Event()
        self.reader.start()
        if not self.found.wait(HANG): self.close(); raise AssertionError("the server told no address:\n"+"\n".join(self.lines))
        LOGS[self.url] = self.lines
    def _read(self):
        for line in self.child.stdout:
            self.lines.append(line.rstrip())
            if found := re.search(r"http://[\w.:\[\]]+/", line): self.url = found[0]; self.found.set()
    def kernels(self):
        "The processes in which visitors' Python runs."
        below = psutil.Process(self.child.pid).children(recursive=True)
        return [o for o in below if "ipykernel" in " ".join(o.cmdline())]
    def kill(self):
        "As the power fails: no handler runs."
        self.child.kill()
        self.child.wait(HANG)
    def close(self):
        if self.child.poll() is None: self.child.terminate()
        try: self.child.wait(HANG)
        except subprocess.TimeoutExpired: self.kill()
        self.child.stdout.close()
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

@contextlib.contextmanager
def chrome():
    "One browser for many visitors."
    from playwright.sync_api import sync_playwright
    path = chromium()
    with sync_playwright() as p:
        at = p.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try: yield at
        finally: at.close()

RAN = "window.__ran = []; for (const f of ['alert', 'confirm', 'prompt', 'print']) window[f] = x => { __ran.push(f + ' ' + x) }"
COULD_RUN = """() => {
    const links = ['href', 'src', 'action', 'formaction']
    const acts = a => a.name.startsWith('on') || links.includes(a.name) && /^\\s*(java|vb)script:|^data:text/i.test(a.value)
    const bad = 'script, iframe, object, embed, base, meta, link, form[action], .ng-text style, .ng-text img'
    const named = e => [...e.attributes].filter(acts).map(a => e.tagName + ' ' + a.name + '=' + a.value)
    const found = [...document.querySelectorAll('.ng-app *')].flatMap(named)
    return [...__ran, ...found, ...[...document.querySelectorAll(`.ng-app :is(${bad})`)].map(e => e.outerHTML)] }"""

class Visitor:
    "Somebody with a browser of their own: what they do, what they see, and what their browser did behind their back."
    def __init__(self, chrome, url, width=1280, height=860, wire=False, **more): # wire: see `late`
        self.url, self.context = url, chrome.new_context(viewport=dict(width=width, height=height), accept_downloads=True, **more)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url.rstrip("/"))
        self.context.set_default_timeout(HANG*1000)
        self.asked, self.errors, self.dialogs, self.bytes = [], [], [], 0
        self.page = self.context.new_page()
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", self._console)
        self.page.on("dialog", self._dialog)
        self.page.on("websocket", self._socket)
        self.page.add_init_script(RAN)
        self.held = None                                               # what has not arrived yet, or None: everything arrives at once
        if wire: self.page.route_web_socket(re.compile("."), self._wire)
    def _wire(self, ws):
        ws.connect_to_server().on_message(lambda m: ws.send(m) if self.held is None else self.held.append((ws, m)))
    @contextlib.contextmanager
    def late(self):
        "What Python says meanwhile arrives at the end of this block, however fast the machine is; then it is waited for."
        self.held = []
        yield
        while self.held:                                               # meanwhile more may come, behind these
            ws, m = self.held.pop(0)
            ws.send(m)
        self.held = None
        search = "(o, text) => { o.value = text; o.dispatchEvent(new Event('input', {bubbles: true})) }"
        for text, found in (("zzqq", 0), ("", 1)):                     # words keep their order: the answer to these comes last
            self.one(".ng-search input").evaluate(search, text)
            self.shows("n => !document.querySelector('.ng-open') == !n", found)
    def _console(self, m):
        if m.type=="error": self.errors.append(m.text)
    def _dialog(self, d): self.dialogs.append(d.message); d.dismiss()
    def _socket(self, ws):
        self.asked.append(ws.url)
        ws.on("framereceived", self._frame)
    def _frame(self, data): self.bytes += len(data if isinstance(data, bytes) else data.encode())
    def open(self):
        "Open the page, and wait until one can type."
        self.page.goto(self.url)
        self.one(".ng-input").wait_for()
        self.shows("() => !document.querySelector('.ng-waking') && document.querySelector('.ng-starter, .ng-turn, .ng-demo')")
        return self
    def one(self, at): return self.page.locator(at).first
    def all(self, at): return self.page.locator(at)
    def shows(self, js, arg=None): self.page.wait_for_function(js, arg=arg)
    def pick(self, name):
        "Choose a model by its name in the list, and wait until it has been loaded."
        k = next(k for k, o in enumerate(self.models()) if name in o)
        if k==self.page.evaluate("() => document.querySelector('.ng-model select').selectedIndex"): return
        self.page.evaluate("""() => { window.__loaded = false; new MutationObserver(all => {
            window.__loaded ||= all.some(o => o.oldValue.includes('ng-loading')) && !document.querySelector('.ng-loading')
        }).observe(document.querySelector('.ng-app'), {attributes: true, attributeFilter: ['class'], attributeOldValue: true}) }""")
        self.page.locator(".ng-model select").select_option(index=k)
        self.shows("() => window.__loaded")
    def models(self): return [o.replace("\xa0", " ") for o in self.page.locator(".ng-model select option").all_text_contents()]
    def type(self, text):
        self.one(".ng-input").fill(text)
        self.one(".ng-input").press("Enter")
    def ask(self, text):
        "Ask, wait for the end of the answer, and read it."
        had = self.all(".ng-answer:not(.ng-running)").count()
        self.type(text)
        self.finished(had+1)
        return self.answers()[-1]
    def finished(self, n):
        self.shows("n => document.querySelectorAll('.ng-answer').length >= n && !document.querySelector('.ng-running')", n)
    def anew(self, press, n):
        "Do something that gives the last of n answers anew, and wait for its end."
        last = f"() => [...document.querySelectorAll('.ng-answer')][{n-1}]?.dataset.turn"
        before = self.page.evaluate(last)
        press()
        self.shows(f"""before => {{ const turn = ({last})(), all = document.querySelectorAll('.ng-answer').length
            return turn && turn != before && all == {n} && !document.querySelector('.ng-running') }}""", before)
    def growing(self, letters=1): self.shows("n => (document.querySelector('.ng-running .ng-text')?.textContent.length ?? 0) >= n", letters)
    def answers(self): return [o.strip() for o in self.all(".ng-answer .ng-text").all_inner_texts()]
    def questions(self): return [o.strip() for o in self.all(".ng-user .ng-text").all_inner_texts()]
    def titles(self): return [o.strip() for o in self.all(".ng-card .ng-open").all_text_contents()]
    def settings(self, shown=True):
        "Open, or close, the drawer with the knobs; on a phone it covers its own button."
        if self.page.evaluate("() => document.querySelector('.ng-app').classList.contains('ng-show-right')")==shown: return
        self.one(".ng-gear" if shown else ".ng-shut").click()
    def look_away(self):
        "Close the panel of tokens or attention."
        self.one(".ng-peek-close").click()
        self.shows("() => !document.querySelector('.ng-app.ng-show-right')")
    def typed(self): return self.one(".ng-input").input_value()
    def state(self):
        "For whoever reads of a failure: what the page shows, what went wrong in the browser, what the server has said."
        see = "() => (o => o ? o.className + '\\n' + o.innerText : document.body.innerText)(document.querySelector('.ng-app'))"
        try: shown = self.page.evaluate(see)
        except Exception as e: shown = f"no page: {e}"
        return "\n".join(["--- the page", shown, "--- the browser", *self.errors, "--- the server", *LOGS.get(self.url, [])[-40:]])
    def shot(self, name):
        "A picture for people, where they asked for pictures."
        if folder := os.environ.get("NANOGPT_SCREENSHOTS"):
            self.page.wait_for_timeout(300)                            # drawers slide
            self.page.screenshot(path=Path(folder)/f"{name}.png")
    def scripts(self):
        "What ran that should not have run, or could."
        return self.page.evaluate(COULD_RUN)+self.dialogs
    def strangers(self):
        "Addresses elsewhere that the browser asked for."
        away = lambda o: o.scheme not in ("data", "blob", "about") and o.netloc!=urlsplit(self.url).netloc
        return [o for o in self.asked if away(urlsplit(o))]
    def quiet(self):
        "No error, no script, no request to anywhere else."
        assert self.errors==[] and self.scripts()==[] and self.strangers()==[], (self.errors, self.scripts(), self.strangers())
    def close(self):
        self.page.goto("about:blank")                                  # leaving is told to the server; being torn away is not
        self.context.close()
    def __enter__(self): return self
    def __exit__(self, kind, *_):
        try:
            if kind is None: self.quiet()
            else: print(self.state())
        finally: self.close()
