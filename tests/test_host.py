"The dashboard's server from outside: who gets in, who gets which kernel, and what is left when it is gone."
import ast
import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path

import psutil
import pytest
from browser import browser
from mini import environment, one_message

from nanogpt import door
from nanogpt.cli import parse_only
from nanogpt.core import ConfigError
from nanogpt.door import HostConfig
from nanogpt.generate import ChatConfig

PASSWORD = "four words make one"
CELL = """import ipywidgets
from nanogpt.door import page_settings
button, label = ipywidgets.Button(description="go"), ipywidgets.Label("clicks 0")
button.add_class("go"), label.add_class("n")
button.on_click(lambda _: setattr(label, "value", "clicks 1"))
display({"text/plain": f"settings {page_settings()}"}, raw=True)
ipywidgets.VBox([button, label])"""
LESSON = "print('this cell is of the lesson')"

# ---- a server and its visitors -----------------------------------------------------------------------------------------

class Server:
    "`serve` in a process of its own, with a notebook that is quick to start."
    def __init__(self, folder, before="", temporary=None, **settings):
        def cell(source, *tags):
            return dict(cell_type="code", id=f"c{len(source)}", metadata=dict(tags=tags), execution_count=None, outputs=[], source=source)
        nb = folder/"page.ipynb"
        nb.write_text(json.dumps(dict(cells=[cell(LESSON, "lesson"), cell(CELL)], metadata={}, nbformat=4, nbformat_minor=5)))
        words = dict(port=0, open=False, visitors=3) | settings
        code = "\n".join((before, "from pathlib import *", "from nanogpt.door import HostConfig", "from nanogpt.host import serve",
                          f"serve(HostConfig(**{words!r}), dict(temperature=.2), Path({str(nb)!r}))"))
        self.temporary = temporary or tempfile.mkdtemp(prefix="t-") # short, as a socket's path must be
        self.err = open(folder/"err.txt", "w+")
        env = environment(XDG_CONFIG_HOME=str(folder/"config"), TMPDIR=self.temporary)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=self.err, text=True, env=env)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), Path(self.err.name).read_text()
        self.place = self.url[7:-1]
    def ask(self, path="/", method="GET", visitor=None, body=None, **headers):
        "Status, headers and text of an answer; header names are written with _ for -."
        at = http.client.HTTPConnection(self.place, timeout=60)
        sent = {k.replace("_", "-"): v for k, v in headers.items()} | ({"Cookie": visitor} if visitor else {})
        at.request(method, path, body, sent)
        answer = at.getresponse()
        found = answer.status, answer.headers, answer.read().decode()
        at.close()
        return found
    def visit(self, **headers):
        "A new visitor opens the page: the cookie they got, and the kernel."
        status, got, text = self.ask(**headers)
        assert status==200, text
        return got["Set-Cookie"].split(";")[0], re.search(r'"kernelId": "([^"]+)"', text)[1]
    def socket(self, kernel, visitor=None, **headers):
        "The status of the handshake of a kernel's websocket: 101 when it opens."
        with socket.create_connection(self.place.split(":"), 30) as s:
            lines = {"Host": self.place, "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                     "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Origin": self.url[:-1]} | headers
            if visitor: lines["Cookie"] = visitor
            s.sendall(f"GET /api/kernels/{kernel}/channels?session_id=1 HTTP/1.1\r\n".encode()
                      + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode()+b"\r\n")
            return int(s.recv(4096).split()[1])
    def kernels(self):
        "Its processes that are kernels, by the kernel's name."
        found = {}
        with contextlib.suppress(psutil.Error):
            for p in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if at := re.search(r"kernel-([0-9a-f-]{36})\.json", " ".join(p.cmdline())): found[at[1]] = p
        return found
    def said(self): return Path(self.err.name).read_text()
    def stop(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)
        return self.process.wait(30)

    def end(self):
        kernels = self.kernels().values()
        if self.process.poll() is None: self.process.kill()
        for p in kernels:
            with contextlib.suppress(psutil.Error): p.kill()
        self.process.communicate()
        self.err.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

@pytest.fixture
def server(tmp_path):
    "Starts servers; none of them is left."
    made = []
    yield lambda **settings: made.append(Server(tmp_path, **settings)) or made[-1]
    for s in made: s.end()

@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "One server for the tests that leave it as it was, and the first visitor's cookie and kernel."
    s = Server(tmp_path_factory.mktemp("shared"))
    yield s, *s.visit()
    s.end()

@pytest.fixture
def kept(tmp_path):
    "A file with the hash of a password: a cheap one, for tests that check many."
    from argon2 import PasswordHasher
    door.save_hash(tmp_path/"password", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD))
    return tmp_path/"password"

def eventually(true, seconds=20):
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic()<end, "it did not happen"
        time.sleep(.1)

# ---- the password ------------------------------------------------------------------------------------------------------

def test_open_to_strangers_is_refused(tmp_path, monkeypatch):
    "Without a password, nothing listens elsewhere than on this machine: no socket is made and no kernel; with one, it goes on."
    host = pytest.importorskip("nanogpt.host")
    reached = []
    for name in ("listen", "configured"): monkeypatch.setattr(host, name, lambda *_, name=name: reached.append(name) or 1/0)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for bad in (dict(host="0.0.0.0"), dict(host="::"), dict(host=""), dict(host="192.0.2.1"), dict(names=("chat.example.org",))):
        with pytest.raises(ConfigError, match="there is no password"): host.serve(HostConfig(port=0, open=False, **bad))
    assert not reached
    door.save_hash(tmp_path/"nanogpt/password", door.make_hash(PASSWORD))
    with pytest.raises(ZeroDivisionError): host.serve(HostConfig(port=0, open=False, host="0.0.0.0"))
    assert reached==["listen"]

def test_the_verb_refuses_too(tmp_path, monkeypatch, call):
    "`nanogpt chat --host 0.0.0.0` is one message and exit code 2, also when the environment asks for it; so is a port that is taken."
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    def refused(*words):
        code, out, err = call("chat", "--no_open", *words)
        assert (code, out)==(2, "")
        return err
    one_message(refused("--host", "0.0.0.0"), "there is no password", "--set_password")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        one_message(refused("--port", other.getsockname()[1]), "cannot be listened on", "--port 0")
    monkeypatch.setenv("NANOGPT_CHAT_HOST", "0.0.0.0")
    one_message(refused(), "there is no password")

def test_the_server_says_that_visitors_share(server, kept):
    "Whoever opens it to others reads on stderr where they come and that they share one history; alone, nothing is said."
    s = server(password_file=kept, names=("chat.example.org",), proxy=True)
    eventually(lambda: "as chat.example.org" in s.said())
    assert "share one history" in s.said()
    alone = server()
    assert alone.ask("/health")[0]==200 and "history" not in alone.said()

def test_set_password(tmp_path, monkeypatch, call):
    "One line of stdin becomes an argon2id hash that only the user can read; the password itself is nowhere."
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path/"config"))
    old = os.umask(0)
    try:
        for k, words in enumerate(((), ("--password_file", tmp_path/"own/secret"))):
            monkeypatch.setattr(sys, "stdin", io.StringIO(PASSWORD+"\n"))
            code, out, err = call("chat", "--set_password", *words)
            path = (tmp_path/"config/nanogpt/password", tmp_path/"own/secret")[k]
            text = path.read_text()
            assert code==0 and path.stat().st_mode & 0o777==0o600 and str(path) in err and "next start" in err
            assert text.startswith("$argon2id$") and door.matches(text.strip(), PASSWORD) and not door.matches(text.strip(), PASSWORD+"!")
            assert PASSWORD not in text+out+err and len(list(path.parent.iterdir()))==1
    finally: os.umask(old)
    monkeypatch.setattr(sys, "stdin", io.StringIO("short\n"))
    code, out, err = call("chat", "--set_password", "--password_file", tmp_path/"no")
    one_message(err, "at least 8")
    assert code==2 and not (tmp_path/"no").exists()

def test_thirty_wrong_passwords(server, kept):
    "At most ten of thirty are checked, whether they come at once or one after the other; then even the right one has to wait."
    s = server(password_file=kept)
    form = dict(Origin=s.url[:-1], Content_Type="application/x-www-form-urlencoded")
    post = lambda word: s.ask("/login", "POST", body=f"password={word}", **form)
    with ThreadPoolExecutor(12) as pool: found = [o[0] for o in pool.map(post, [f"wrong{k}" for k in range(30)])]
    assert (found.count(401), found.count(429))==(10, 20)
    status, headers, _ = post(PASSWORD.replace(" ", "+"))
    assert status==429 and 0<int(headers["Retry-After"])<=600
    assert max(map(int, re.findall(r"\((\d+) checked so far", s.said())))==10
    assert not s.kernels() and "wrong3" not in s.said()

def test_signing_in(server, kept):
    "Nothing but the sign-in page is served to a stranger; the right password opens all of it, with a new cookie."
    s = server(password_file=kept)
    assert s.ask()[0]==303 and s.ask("/login")[0]==200 and s.ask("/health")[0]==200
    for path in ("/voila/static/voila.js", "/voila/api/themes/x", "/api/kernels", "/api/kernels/1-1-1-1-1", "/voila/files/page.ipynb"):
        assert s.ask(path)[0] in (401, 404), path
    assert s.socket("11111111-1111-4111-8111-111111111111")==401 and not s.kernels()
    post = lambda word, **more: s.ask("/login", "POST", body=f"password={word}", **more)
    assert post(PASSWORD.replace(" ", "+"))[0]==403 # it does not say which page sent it
    form = dict(Origin=s.url[:-1], Content_Type="application/x-www-form-urlencoded")
    status, headers, _ = post(PASSWORD.replace(" ", "+"), **form)
    cookie = headers["Set-Cookie"]
    assert status==303 and "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Secure" not in cookie
    planted = s.ask("/login", "POST", body=f"password={PASSWORD.replace(' ', '+')}", visitor=cookie.split(";")[0], **form)[1]["Set-Cookie"]
    assert planted.split(";")[0]!=cookie.split(";")[0]
    assert s.ask("/voila/static/voila.js", visitor=cookie.split(";")[0])[0]==200
    name, value = cookie.split(";")[0].split("=", 1)
    assert s.ask("/voila/static/voila.js", visitor=f"{name}={value[:-3]}000\"")[0]==401 # not as we signed it

# ---- whose kernel ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preheat", (0, 1))
def test_a_visitor_reaches_only_their_own_kernel(server, preheat):
    "Neither the websocket nor HTTP leads to the kernel of somebody else, or to one that waits for its first visitor."
    s = server(preheat=preheat, visitors=2)
    if preheat: eventually(lambda: len(s.kernels())==1)
    with ThreadPoolExecutor(2) as pool: (ann, hers), (bob, his) = [o.result() for o in [pool.submit(s.visit) for _ in "ab"]]
    assert s.ask()[0]==503 # two at once take two places, not more and not fewer
    assert hers!=his and ann!=bob and {hers, his} <= set(s.kernels())
    if preheat: eventually(lambda: len(s.kernels())==3)
    waiting = set(s.kernels())-{hers, his}
    assert len(waiting)==preheat
    assert s.socket(hers, ann)==s.socket(his, bob)==101
    assert s.ask(f"/api/kernels/{hers}", visitor=ann)[0]==200
    own = dict(Origin=s.url[:-1])
    for kernel in {hers, *waiting, "11111111-1111-4111-8111-111111111111"}:
        for who in (bob, None, ann.replace("2|1:0", "2|1:1")):
            assert s.socket(kernel, who)==404, kernel
            assert s.ask(f"/api/kernels/{kernel}", visitor=who)[0]==404
            assert s.ask(f"/api/kernels/{kernel}", "DELETE", visitor=who, **own)[0]==404
            assert s.ask(f"/voila/api/shutdown/{kernel}", "POST", visitor=who, **own)[0]==404
            assert s.ask(f"/voila/query/{kernel}", visitor=who)[0]==404
    assert {hers, his, *waiting} <= set(s.kernels())
    assert s.ask(f"/voila/api/shutdown/{hers}", "POST", visitor=ann, **own)[0]==204
    eventually(lambda: hers not in s.kernels())

def test_control_without_the_rule_a_stranger_gets_in(server):
    "Control: the same stranger opens the same websocket once `may_reach` is always content."
    s = server(before="import nanogpt.door as d; d.may_reach = lambda *_: True")
    (_, hers), (bob, _) = s.visit(), s.visit()
    assert s.socket(hers, bob)==101

def test_no_code_comes_in(shared):
    "A visitor's own websocket carries messages of widgets; a request to run code is dropped."
    s, ann, hers = shared
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect
    def message(kind, **content):
        head = dict(msg_id=kind, msg_type=kind, session="s", username="", version="5.3", date="2026-01-01T00:00:00Z")
        return json.dumps(dict(header=head, parent_header={}, metadata={}, content=content, channel="shell", buffers=[]))
    async def talk():
        at = await websocket_connect(HTTPRequest(f"ws://{s.place}/api/kernels/{hers}/channels?session_id=s",
                                                 headers=dict(Cookie=ann, Origin=s.url[:-1])))
        for kind, more in (("execute_request", dict(code="import os; os._exit(9)", silent=False)), ("comm_info_request", {})):
            await at.write_message(message(kind, **more))
        seen = []
        while "comm_info_reply" not in seen: seen.append(json.loads(await asyncio.wait_for(at.read_message(), 20))["msg_type"])
        at.close()
        return seen
    seen = asyncio.run(talk())
    assert "execute_reply" not in seen and hers in s.kernels()

def test_busy(server):
    "When all places are taken the next visitor is told so, without a kernel; a reload of one's own page is no new visit."
    s = server(visitors=1)
    ann, first = s.visit()
    status, headers, text = s.ask()
    assert status==503 and int(headers["Retry-After"])>0 and "All 1 places are taken" in text and "Set-Cookie" not in headers
    assert set(s.kernels())=={first}
    status, _, text = s.ask(visitor=ann)
    again = re.search(r'"kernelId": "([^"]+)"', text)[1]
    assert status==200 and again!=first
    eventually(lambda: set(s.kernels())=={again})
    assert s.socket(first, ann)==404 and s.ask()[0]==503

# ---- from where --------------------------------------------------------------------------------------------------------

def test_forged_host_and_origin(shared):
    "A page of another site reaches nothing: not by a name that it points here, not by its own origin, not as a picture or a frame."
    s, ann, hers = shared
    before = set(s.kernels())
    for host in ("evil.example", f"localhost.evil.example:{s.place[10:]}", f"127.0.0.1.evil.example:{s.place[10:]}", ""):
        assert s.ask(Host=host)[0] in (400, 403) and s.socket(hers, ann, Host=host, Origin=f"http://{host}") in (400, 403)
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{s.url[:-1]}.evil.example", "file://"):
        assert s.socket(hers, ann, Origin=origin)==403
        assert s.ask(f"/api/kernels/{hers}", "DELETE", visitor=ann, Origin=origin)[0]==403
    assert s.ask(f"/api/kernels/{hers}", "DELETE", visitor=ann)[0]==403
    for dest in ("image", "iframe", "script", "empty"): assert s.ask(Sec_Fetch_Dest=dest)[0]==403
    for path in ("/api/kernels", "/voila/files/page.ipynb", "/api/contents", "/voila/tree", "/..", "/voila/static/../../page.ipynb", "//"):
        assert s.ask(path)[0] in (403, 404), path
    assert set(s.kernels())==before
    assert s.ask("/health", Host="localhost")[0]==200 and s.socket(hers, ann)==101

def test_behind_a_proxy(server, kept):
    "Under a name of its own, told by the last X-Forwarded-For; what a visitor claims in front of it, or elsewhere, is not believed."
    s = server(password_file=kept, names=("chat.example.org",), proxy=True)
    form = dict(Host="chat.example.org", Origin="https://chat.example.org", Content_Type="application/x-www-form-urlencoded",
                X_Forwarded_Proto="https")
    def wrong(k):
        claimed = dict(X_Forwarded_For=f"10.0.0.{k}, 203.0.113.7", X_Real_Ip=f"10.0.0.{k}", X_Scheme="http")
        return s.ask("/login", "POST", body="password=wrong", **form, **claimed)[0]
    with ThreadPoolExecutor(12) as pool: found = list(pool.map(wrong, range(12)))
    assert (found.count(401), found.count(429))==(10, 2)
    status, headers, _ = s.ask("/login", "POST", body=f"password={PASSWORD.replace(' ', '+')}", **form, X_Forwarded_For="203.0.113.8")
    assert status==303 and "Secure" in headers["Set-Cookie"]
    assert set(re.findall(r"sign-in from (\S+):", s.said()))=={"203.0.113.7", "203.0.113.8"}
    assert s.ask("/health", Host="evil.example")[0]==403

def test_headers_and_links(shared):
    "Every answer forbids what comes from elsewhere; no page has a foreign address or a script of its own in it."
    s, ann, hers = shared
    _, _, page = s.ask(visitor=ann)
    for path, more in (("/", dict(visitor=ann)), ("/login", {}), ("/health", {}), ("/nothing", {}), ("/voila/static/voila.js", {}),
                       (f"/api/kernels/{hers}", {}), ("/voila/templates/nanogpt/static/page.css", {}), ("/", dict(Host="evil.example"))):
        _, headers, text = s.ask(path, **more)
        policy = dict(o.split(" ", 1) for o in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"]=="'none'" and policy["frame-ancestors"]=="'none'" and "http" not in headers["Content-Security-Policy"]
        assert "'unsafe-inline'" not in policy["script-src"] and headers["X-Content-Type-Options"]=="nosniff"
        assert headers["X-Frame-Options"]=="DENY"
        assert headers["Referrer-Policy"]=="same-origin" and "Tornado" not in headers["Server"]
        if path in ("/", "/login", "/nothing"):
            assert not re.search(r"//(?!www\.w3\.org/2000/svg)[a-z0-9]", re.sub(r"https?://127\.0\.0\.1\S*", "", text))
    scripts = re.findall(r"<script([^>]*)>", page)
    assert len(scripts)>=5 and all("src=" in o or "json" in o for o in scripts)
    assert "this cell is of the lesson" not in page

# ---- what the kernel hears, what the environment says ------------------------------------------------------------------

def test_settings_reach_the_kernel(server, tmp_path):
    "The page's kernel knows what concerns it, and not the password."
    s = server(model=Path("gpt2"), runs=tmp_path/"r", history="none", language="zh", password_hash=door.make_hash(PASSWORD), before=
               "import os; os.environ['NANOGPT_CHAT_PASSWORD_HASH'] = 'x'; import nanogpt.door as d; "
               "init = d.Door.__init__; d.Door.__init__ = lambda self, names, locked, framed: init(self, names, False, framed)")
    _, _, text = s.ask(Accept_Language="zh-CN,zh;q=0.9")
    heard = ast.literal_eval(re.search(r'"settings (\{.*?\})"', text)[1].replace("\\u0027", "'"))
    given = dict(model="gpt2", runs=str(tmp_path/"r"), history="none", language="zh", visitors=3)
    assert heard==door.SHOWN | given | dict(knobs=dict(temperature=.2), accept_language="zh-CN,zh;q=0.9")
    assert '<html lang="zh">' in text
    environ = next(iter(s.kernels().values())).environ()
    assert "argon2" not in json.dumps(environ) and "NANOGPT_CHAT_PASSWORD_HASH" not in environ

VALUES = dict(model="x", runs="r", host="192.0.2.7", port="9", open="false", history="none", language="zh", visitors="9", preheat="2",
              idle_minutes="3", names="a.org,b.org", frames="https://a.org", proxy="true", password_file="p", password_hash="$argon2id$x",
              terminal="true", system="Hi", set_password="true", device="cpu", threads="3", temperature="0.5", max_tokens="7",
              seed="5", stop="x,y", top_k="4")

def test_every_setting_is_an_environment_variable(monkeypatch, tmp_path):
    "NANOGPT_CHAT_NAME sets it, a file is above the environment, a flag above both; what is wrong is named."
    assert {f.name for f in fields(HostConfig)} <= set(VALUES)
    plain = ChatConfig()
    for name, value in VALUES.items():
        monkeypatch.setenv(f"NANOGPT_CHAT_{name.upper()}", value)
        if name in ("preheat",): monkeypatch.setenv("NANOGPT_CHAT_VISITORS", "9")
        heard = getattr(parse_only(["chat"])[1], name)
        assert heard!=getattr(plain, name) and heard==getattr(parse_only(["chat", f"--{name}={value}"])[1], name)
        if name=="port":
            (tmp_path/"c.toml").write_text("port = 11\n")
            assert parse_only(["chat", "--config", str(tmp_path/"c.toml")])[1].port==11
            assert parse_only(["chat", "--port", "12"])[1].port==12
            monkeypatch.setenv("NANOGPT_CHAT_PORT", "many")
            with pytest.raises(ConfigError, match="--port='many'"): parse_only(["chat"])
        for o in (name, "visitors"): monkeypatch.delenv(f"NANOGPT_CHAT_{o.upper()}", raising=False)
    monkeypatch.setenv("NANOGPT_CHAT_PORT", "13")
    assert replace(plain, port=13)==parse_only(["chat"])[1] and parse_only(["eval", "--model", "x"])
    assert all(f.default is not MISSING for f in fields(ChatConfig)) # `nanogpt chat` alone is a command

# ---- the end -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sig", (signal.SIGTERM, signal.SIGINT, signal.SIGKILL))
def test_no_kernel_outlives_the_server(server, sig):
    "Stopped, interrupted or killed: seconds later none of its kernels is left, and after a clean end no file either."
    s = server(preheat=1)
    _, hers = s.visit()
    eventually(lambda: len(s.kernels())==2)
    kernels = list(s.kernels().values())
    code = s.stop(sig)
    eventually(lambda: not any(p.is_running() and p.status()!="zombie" for p in kernels))
    if sig!=signal.SIGKILL: assert code==0 and not os.listdir(s.temporary) and "Traceback" not in s.said()

@pytest.mark.skipif(os.name=="nt", reason="nothing is locked there")
def test_a_killed_server_is_swept_by_the_next(server):
    "The folder of a dead server goes; that of a living one, and what only looks like one, stays."
    dead = server()
    dead.visit()
    left, = Path(dead.temporary).iterdir()
    eventually(lambda: [p for p in left.iterdir() if p.name!="alive"]) # the files of its kernel
    (other := Path(dead.temporary)/"nanogpt-other").mkdir()
    living = server(temporary=dead.temporary)
    here = set(Path(dead.temporary).iterdir())
    assert len(here)==3 and left in here # nobody takes a living server's folder
    kernels = list(dead.kernels().values())
    dead.stop(signal.SIGKILL)
    assert left.exists()
    eventually(lambda: not any(p.is_running() and p.status()!="zombie" for p in kernels))
    third = server(temporary=dead.temporary)
    assert not left.exists() and other.exists() and len(set(Path(dead.temporary).iterdir()) & here)==2
    for s in (living, third): s.visit() # they work
    assert third.stop()==0 and living.stop()==0 and list(Path(dead.temporary).iterdir())==[other]

@pytest.mark.long
def test_a_closed_page_ends_its_kernel(server):
    "A kernel that nobody looks at ends when it has been idle long enough; one with an open page stays."
    s = server(idle_minutes=1)
    (ann, hers), (_, his) = s.visit(), s.visit()
    from tornado.httpclient import HTTPRequest
    from tornado.websocket import websocket_connect
    async def look():
        at = await websocket_connect(HTTPRequest(f"ws://{s.place}/api/kernels/{hers}/channels?session_id=s", headers=dict(Cookie=ann)))
        end = time.monotonic()+150
        while his in s.kernels() and time.monotonic()<end: await asyncio.sleep(1)
        found = set(s.kernels())
        at.close()
        return found
    assert asyncio.run(look())=={hers}

# ---- in a browser ------------------------------------------------------------------------------------------------------

def test_in_a_browser(server, tmp_path):
    "The widget works under the strict policy, nothing is asked of another machine, and a page that is left gives its kernel back."
    s = server(visitors=1)
    wrong, foreign = [], []
    with browser(tmp_path/"profile") as page:
        page.on("console", lambda o: wrong.append(o.text) if o.type=="error" else None)
        page.on("pageerror", lambda o: wrong.append(str(o)))
        page.on("request", lambda o: foreign.append(o.url) if not o.url.startswith((s.url, "data:", "blob:")) else None)
        for _ in range(2): # the second time is a reload: the only place there is comes free by itself
            page.goto(s.url)
            page.wait_for_selector(".go", timeout=60_000)
            page.click(".go")
            page.wait_for_function("document.querySelector('.n').textContent=='clicks 1'")
        assert len(s.kernels())==1 and page.evaluate("document.cookie")==""
        page.goto("about:blank")
        eventually(lambda: not s.kernels())
    assert not wrong and not foreign, (wrong, foreign)

def test_signing_in_with_a_browser(server, kept, tmp_path):
    "A stranger sees the form, a wrong password is said to be wrong, the right one opens the page; a second sign-in is not asked for."
    s, wrong = server(password_file=kept), []
    with browser(tmp_path/"profile", 360, 640) as page:
        page.on("pageerror", lambda o: wrong.append(str(o)))
        page.on("console", lambda o: wrong.append(o.text) if o.type=="error" and "401" not in o.text else None)
        page.goto(s.url)
        for word in ("wrong", PASSWORD):
            page.fill("input[type=password]", word)
            page.press("input[type=password]", "Enter")
            if word=="wrong": page.wait_for_selector("text=That is not the password")
        page.wait_for_selector(".go", timeout=60_000)
        page.click(".go")
        page.wait_for_function("document.querySelector('.n').textContent=='clicks 1'")
        page.reload()
        page.wait_for_selector(".go", timeout=60_000)
    assert not wrong and len(re.findall("checked so far", s.said()))==2
