"""The dashboard in a container, behind a proxy and as a Space: what of it can be held against the program without Docker.

Docker itself, a GPU in it, Hugging Face and a certificate from a real authority are not run here; the files say so.
"""
import contextlib
import fnmatch
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import yaml
from browser import free_port
from conftest import ROOT
from mini import command, environment, unpacked
from test_layout import BUILD

from nanogpt.cli import parse_only
from nanogpt.core import ConfigError
from nanogpt.door import HostConfig, make_hash
from nanogpt.generate import ChatConfig

DEPLOY = ROOT/"deploy"
DOCKERFILES = [DEPLOY/"Dockerfile", DEPLOY/"space"/"Dockerfile"]
SINGLE = [DEPLOY/name for name in "compose.yaml compose.cuda.yaml Caddyfile nginx.conf nanogpt-chat.service space/README.md".split()]
LABELLED = [*DOCKERFILES, *SINGLE, ROOT/"docs"/"deployment.md"]
PREFIX = "NANOGPT_CHAT_"
SETTINGS = {f.name: f for f in fields(ChatConfig)}
NAME = "chat.example.org"

def read(path): return path.read_text(encoding="utf-8")

def named(text):
    "The settings that a text names as environment variables."
    return {m.lower() for m in re.findall(PREFIX+"([A-Z_]*[A-Z])", text)}

def as_settings(monkeypatch, env, words=("chat",)):
    "The command's settings in an environment."
    for k in [k for k in os.environ if k.startswith(PREFIX)]: monkeypatch.delenv(k)
    for k, v in env.items():
        if k.startswith(PREFIX): monkeypatch.setenv(k, v)
    return parse_only(list(words))[1]

def steps(path):
    "The instructions of a Dockerfile: pairs of name and text, continued lines joined, comments left out."
    lines = "\n".join(x for x in read(path).split("\n") if not x.lstrip().startswith("#"))
    return [tuple(x.split(None, 1)) for x in lines.replace("\\\n", " ").split("\n") if x.strip()]

def last_stage(path):
    found = steps(path)
    return found[max(i for i, (k, _) in enumerate(found) if k=="FROM"):]

def env_of(path): return dict(pair.split("=", 1) for k, text in last_stage(path) if k=="ENV" for pair in shlex.split(text))

def one(found, name): return [text for k, text in found if k==name][-1]

# ---- every file ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", LABELLED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_it_says_what_was_not_run(path):
    "Every file tells what was tried and what was not, and names no setting that the program has not."
    assert "Tried: " in read(path) and "Not run: " in read(path)
    assert named(read(path))<=set(SETTINGS)

def test_every_setting_is_a_variable(monkeypatch):
    "chat.env holds each setting of the dashboard with the program's own help, and what stands there is the default."
    rows = re.findall(rf"^# (.*)\n#({PREFIX}\w+)=(.*)$", read(DEPLOY/"chat.env"), re.M)
    assert [k[len(PREFIX):].lower() for _, k, _ in rows]==[k for k in SETTINGS if k not in ("terminal", "set_password")]
    assert {f.name for f in fields(HostConfig)}<={k[len(PREFIX):].lower() for _, k, _ in rows}
    for told, name, value in rows:
        f = SETTINGS[name[len(PREFIX):].lower()]
        assert told==f.metadata["help"]
        assert getattr(as_settings(monkeypatch, {name: value}), f.name)==f.default, name
    active = [x for x in read(DEPLOY/"chat.env").splitlines() if x.strip() and not x.startswith("#")]
    assert active==[] # nothing is set unless somebody chooses it

def test_control(monkeypatch):
    "A setting that does not exist, or a value that is none, is found."
    assert named("NANOGPT_CHAT_PROT=1")-set(SETTINGS)=={"prot"}
    with pytest.raises(ConfigError): as_settings(monkeypatch, {PREFIX+"PORT": "many"})

# ---- images ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.parent.name)
def test_the_image(path, monkeypatch):
    "Not root, a health check, one port, settings that the program takes, scripts that a shell reads, no secret."
    found = last_stage(path)
    names = [k for k, _ in found]
    uid = one(found, "USER").split(":")[0]
    assert uid.isdigit() and int(uid)>0 and names.index("USER")<names.index("CMD") and names.count("USER")==1
    env = env_of(path)
    cfg = as_settings(monkeypatch, env)
    assert cfg.host=="0.0.0.0" and cfg.open is False and str(cfg.port)==one(found, "EXPOSE") and not cfg.password_hash
    for k, text in steps(path):
        if k=="RUN": assert subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True).stderr==""
        if k in ("ENV", "ARG"): assert not re.search("PASSWORD|SECRET|TOKEN|_KEY", text), text
    check = json.loads(re.search(r"CMD (\[.*\])", one(found, "HEALTHCHECK"))[1])
    assert check[:2]==["python", "-c"] and "/health" in check[2]
    compile(check[2], "health", "exec")

def test_the_image_of_the_checkout():
    "It copies what the package is built from and nothing else, and starts `nanogpt chat`."
    path = DEPLOY/"Dockerfile"
    copied = {w for k, text in steps(path) if k=="COPY" and not text.startswith("--from") for w in text.split()[:-1]}
    assert copied=={*BUILD, "nanogpt", "lessons"} and all((ROOT/w).exists() for w in copied)
    assert re.search(r"^ARG DEVICE=cpu$", read(path), re.M) and all(f"{d})" in read(path) for d in ("cpu", "cuda"))
    found = last_stage(path)
    words = json.loads(one(found, "ENTRYPOINT"))+json.loads(one(found, "CMD"))
    assert words[0]=="nanogpt" and isinstance(parse_only(words[1:])[1], ChatConfig)
    env = env_of(path)
    assert one(found, "VOLUME")==env["HOME"]
    assert all(env[k].startswith(env["HOME"]) for k in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", PREFIX+"RUNS"))

def ignored(path, patterns):
    "Whether Docker leaves a path out: the last pattern that fits it, or a folder above it, decides."
    out, parts = False, path.split("/")
    for p in patterns:
        inner = p.lstrip("!")
        shape = inner[3:] if inner.startswith("**/") else inner
        tries = parts if inner.startswith("**/") else ["/".join(parts[:i+1]) for i in range(len(parts))]
        if any(fnmatch.fnmatch(t, shape) for t in tries): out = not p.startswith("!")
    return out

def test_what_reaches_the_build():
    "All that is copied, and no run, no history, no .env, no git folder: a secret that never gets in is in no layer."
    patterns = [x for x in read(DEPLOY/"Dockerfile.dockerignore").splitlines() if x.strip() and not x.startswith("#")]
    inside = *BUILD, "nanogpt/core.py", "nanogpt/phrases.zh.json", "lessons/00_core.ipynb"
    outside = (".env .git/config .venv/bin/python chat.db deploy/chat.env id_rsa nanogpt/__pycache__/core.pyc nbs/00_core.ipynb password "
               "runs/demo/config.json").split()
    assert [o for o in inside if ignored(o, patterns)]==[] and [o for o in outside if not ignored(o, patterns)]==[]

# ---- compose ---------------------------------------------------------------------------------------------------------

def test_compose(monkeypatch):
    "Services, ports, files and volumes agree; every variable is a setting; the server itself is reached by the proxy alone."
    doc = yaml.safe_load(read(DEPLOY/"compose.yaml"))
    chat, proxy = doc["services"]["chat"], doc["services"]["proxy"]
    assert (DEPLOY/chat["build"]["context"]).resolve()==ROOT and (ROOT/chat["build"]["dockerfile"]).exists()
    assert (DEPLOY/chat["env_file"]).exists()
    env = env_of(DEPLOY/"Dockerfile") | {k: re.sub(r"\$\{\w+:-(.*)\}", r"\1", v) for k, v in chat["environment"].items()}
    cfg = as_settings(monkeypatch, env)
    assert cfg.names==("localhost",) and cfg.proxy and [str(cfg.port)]==chat["expose"] and "ports" not in chat
    assert "PASSWORD" not in read(DEPLOY/"compose.yaml").upper().replace("SET_PASSWORD", "")
    assert chat["read_only"] and chat["cap_drop"]==["ALL"] and not chat.get("privileged")
    data = dict(v.split(":")[:2] for v in chat["volumes"])
    assert data=={"data": env_of(DEPLOY/"Dockerfile")["HOME"]}
    assert proxy["environment"]==dict(CHAT_SERVER=f"chat:{cfg.port}", CHAT_NAME=chat["environment"][PREFIX+"NAMES"])
    assert set(re.findall(r"\{\$(\w+)", read(DEPLOY/"Caddyfile")))==set(proxy["environment"]) and "443:443" in proxy["ports"]
    assert proxy["volumes"][0].startswith("./Caddyfile:")
    assert {v.split(":")[0] for v in chat["volumes"]+proxy["volumes"][1:]}==set(doc["volumes"])
    gpu = yaml.safe_load(read(DEPLOY/"compose.cuda.yaml"))["services"]
    assert set(gpu)=={"chat"} and gpu["chat"]["build"]["args"]["DEVICE"] in ("cpu", "cuda")
    assert as_settings(monkeypatch, gpu["chat"]["environment"]).device=="cuda"

# ---- systemd ---------------------------------------------------------------------------------------------------------

UNIT = DEPLOY/"nanogpt-chat.service"

def verified(folder, text):
    "What systemd says of a unit, whose program is one of this machine; empty: nothing."
    path = folder/UNIT.name
    path.write_text(text.replace("/opt/nanogpt/bin/nanogpt", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60)
    return "\n".join(x for x in (done.stdout+done.stderr).splitlines() if UNIT.name in x) # not what it says of this machine's own units

@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_reads_the_unit(tmp_path):
    "It knows every key and every value; the control, a misspelled one, is found."
    assert verified(tmp_path, read(UNIT))==""
    assert "PrivateTemp" in verified(tmp_path, read(UNIT).replace("PrivateTmp=", "PrivateTemp="))

def test_the_unit(monkeypatch):
    "Its command and settings are the program's; not root, nothing secret in it, and it writes into its own folder alone."
    rows = [x.split("=", 1) for x in read(UNIT).splitlines() if re.match(r"\w+=", x)]
    of = {k: [v for name, v in rows if name==k] for k, _ in rows}
    words = shlex.split(of["ExecStart"][0])
    env = dict(o.split("=", 1) for line in of["Environment"] for o in line.split())
    cfg = as_settings(monkeypatch, env, words[1:])
    assert words[0].endswith("/nanogpt") and isinstance(cfg, ChatConfig) and cfg.names==(NAME,) and cfg.proxy and not cfg.open
    assert cfg.password_file.name==of["LoadCredential"][0].split(":")[0] and "PASSWORD_HASH" not in read(UNIT)
    assert all(v.startswith(("%S/"+of["StateDirectory"][0], "%d/")) for v in env.values())
    assert of["User"]==["nanogpt"] and of["CapabilityBoundingSet"]==[""]
    assert of["ProtectSystem"]==["strict"] and of["NoNewPrivileges"]==["yes"]
    page = read(ROOT/"docs"/"deployment.md")
    assert of["LoadCredential"][0].split(":")[1] in page and of["EnvironmentFile"][0].lstrip("-") in page and words[0] in page

# ---- a Space ---------------------------------------------------------------------------------------------------------

def test_the_space(monkeypatch):
    "The front matter is what Hugging Face asks for, the port is one, conversations are nobody else's, the command is understood."
    front = yaml.safe_load(read(DEPLOY/"space"/"README.md").split("---")[1])
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert front["sdk"]=="docker" and {front["colorFrom"], front["colorTo"]}<=colours and len(front["short_description"])<=60
    path = DEPLOY/"space"/"Dockerfile"
    assert str(front["app_port"])==one(last_stage(path), "EXPOSE")
    shell, flag, script = json.loads(one(last_stage(path), "CMD"))
    words = shlex.split(script.replace("$SPACE_HOST", "owner-space.hf.space"))
    assert (shell, flag, words[:2])==("sh", "-c", ["exec", "nanogpt"])
    cfg = as_settings(monkeypatch, env_of(path), words[2:])
    assert cfg.names==("owner-space.hf.space",) and cfg.frames==("https://huggingface.co",) and cfg.proxy and cfg.history=="none"

# ---- the page that tells it ------------------------------------------------------------------------------------------

def blocks(text): return re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)

def of_ours(line):
    "The words behind `nanogpt` in a command, also where an image or a service stands for it; None where the program is not called."
    words = shlex.split(line, comments=True)
    if "--entrypoint" in words: return None
    ours = {"docker run": "nanogpt-chat", "docker compose": "chat"}.get(" ".join(words[:2]), "nanogpt")
    if words[:2]==["docker", "compose"] and "run" not in words: return None
    return words[words.index(ours)+1:] or ["chat"] if ours in words else None

def test_the_page():
    "bash reads every block, the program understands every command of its own, and every file that is linked or named is there."
    text = read(ROOT/"docs"/"deployment.md")
    found = 0
    for block in blocks(text):
        assert subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True).stderr==""
        for words in filter(None, map(of_ours, block.splitlines())):
            assert isinstance(parse_only(words)[1], ChatConfig)
            found += 1
    assert found>=8
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert "://" in link or (ROOT/"docs"/link).exists(), link
    for name in re.findall(r"deploy/[\w./-]+\w", text): assert (ROOT/name).exists(), name
    assert [p.name for p in [*DOCKERFILES, *SINGLE, DEPLOY/"chat.env"] if f"deploy/{p.relative_to(DEPLOY).parts[0]}" not in text]==[]

@pytest.mark.parametrize("file, copy", [("/data/share/nanogpt/chat.db", "/data/copy.db"),
                                        ("~/.local/share/nanogpt/chat.db", "chat-copy.db")])
def test_a_copy_of_the_conversations(tmp_path, file, copy):
    "The page's own lines copy a history while somebody writes to it."
    code, = [o for o in re.findall(r"-c \"(import [^\"]*)", read(ROOT/"docs"/"deployment.md")) if file in o]
    for old, new in ((file, f"{tmp_path}/chat.db"), (copy, f"{tmp_path}/copy.db")):
        assert old in code
        code = code.replace(old, new)
    with contextlib.closing(sqlite3.connect(tmp_path/"chat.db")) as db:
        db.executescript("pragma journal_mode=wal; create table turns (text); insert into turns values ('hello')")
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with contextlib.closing(sqlite3.connect(tmp_path/"copy.db")) as db: assert db.execute("select text from turns").fetchall()==[("hello",)]

# ---- real proxies before a real server -------------------------------------------------------------------------------

PASSWORD = "four quiet green words"

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The dashboard as an image would start it, but on this machine; its port and the file of what it says."
    home = tmp_path_factory.mktemp("server")
    port = free_port()
    env = {k: v for k, v in environment().items() if not k.startswith(PREFIX)}
    own = dict(HOST="127.0.0.1", PORT=str(port), OPEN="false", RUNS=str(home), HISTORY="none", NAMES=NAME, PROXY="true")
    env |= {PREFIX+k: v for k, v in own.items()} | {PREFIX+"PASSWORD_HASH": make_hash(PASSWORD)}
    with open(home/"said.txt", "w") as said:
        process = subprocess.Popen(command("chat"), stdout=subprocess.PIPE, stderr=said, text=True, env=env, cwd=home)
        try:
            assert process.stdout.readline().strip()==f"http://127.0.0.1:{port}/"
            yield port, home/"said.txt"
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)

def test_the_health_check(server):
    "The very command of the images is content with the running server, and not with a port where none is."
    code = json.loads(re.search(r"CMD (\[.*\])", one(last_stage(DOCKERFILES[0]), "HEALTHCHECK"))[1])[2]
    assert code==json.loads(re.search(r"CMD (\[.*\])", one(last_stage(DOCKERFILES[1]), "HEALTHCHECK"))[1])[2]
    for port, fine in ((server[0], True), (free_port(), False)):
        done = subprocess.run([sys.executable, "-c", code], env=environment(NANOGPT_CHAT_PORT=str(port)), capture_output=True, timeout=60)
        assert (done.returncode==0)==fine

def nginx(folder, server):
    "nginx with our file: other ports, a certificate of its own."
    program, plain, port = unpacked("nginx", "usr/sbin/nginx", folder), free_port(), free_port()
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out fullchain.pem -subj".split()
    subprocess.run([*made, f"/CN={NAME}"], cwd=folder, capture_output=True, check=True)
    text = re.sub(r"^\s*listen \[::\].*\n", "", read(DEPLOY/"nginx.conf"), flags=re.M)
    keys = f"/etc/letsencrypt/live/{NAME}"
    for old, new in (("listen 80;", f"listen 127.0.0.1:{plain};"), ("listen 443 ", f"listen 127.0.0.1:{port} "), (":8866", f":{server}"),
                     (f"{keys}/fullchain.pem", f"{folder}/fullchain.pem"), (f"{keys}/privkey.pem", f"{folder}/key.pem")):
        assert text.count(old)==1, old
        text = text.replace(old, new)
    temp = "".join(f"{k}_temp_path {folder};\n" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    conf = folder/"nginx.conf"
    user = "user root;\n" if os.geteuid()==0 else "" # the test's own folder is closed to others
    own = f"{user}daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
    conf.write_text(f"{own}http {{\naccess_log off;\n{temp}{text}}}\n")
    subprocess.run([program, "-t", "-p", str(folder), "-c", str(conf)], check=True, capture_output=True, timeout=60)
    return port, subprocess.Popen([program, "-p", str(folder), "-c", str(conf)], stderr=subprocess.DEVNULL)

def caddy(folder, server):
    "Caddy with our file; what a test adds: no real authority is asked."
    program, port = unpacked("caddy", "usr/bin/caddy", folder), free_port()
    options = "admin off", "local_certs", "skip_install_trust", "auto_https disable_redirects", f"storage file_system {folder}/store"
    (folder/"Caddyfile").write_text("\n\t".join(("{", *options))+"\n}\n"+read(DEPLOY/"Caddyfile"))
    env = environment(CHAT_NAME=f"{NAME}:{port}", CHAT_SERVER=f"127.0.0.1:{server}", HOME=str(folder))
    words = ["--config", str(folder/"Caddyfile"), "--adapter", "caddyfile"]
    subprocess.run([program, "validate", *words], env=env, check=True, capture_output=True, timeout=60)
    return port, subprocess.Popen([program, "run", *words], env=env, stderr=subprocess.DEVNULL)

def over_tls(port):
    "A connection as a browser makes it that knows the site by its name."
    how = ssl.create_default_context()
    how.check_hostname, how.verify_mode = False, ssl.CERT_NONE
    at = http.client.HTTPSConnection("127.0.0.1", port, timeout=60)
    at.sock = how.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=60), server_hostname=NAME)
    return at

def ask(port, method, path, body=None, **headers):
    "One request; status, headers and text."
    at = over_tls(port)
    at.request(method, path, body, {"Host": f"{NAME}:{port}"} | {k.replace("_", "-"): v for k, v in headers.items()})
    got = at.getresponse()
    out = got.status, dict(got.getheaders()), got.read().decode()
    at.close()
    return out

def upgraded(port, path, **headers):
    "The status of a websocket's beginning."
    at = over_tls(port)
    lines = {"Host": f"{NAME}:{port}", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
             "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Origin": f"https://{NAME}:{port}"} | headers
    at.sock.sendall(f"GET {path} HTTP/1.1\r\n{''.join(f'{k}: {v}{chr(13)}{chr(10)}' for k, v in lines.items())}\r\n".encode())
    status = at.sock.recv(4096).split(b" ")[1].decode()
    at.close()
    return status

@pytest.mark.parametrize("make", [nginx, caddy], ids=["nginx", "caddy"])
def test_a_proxy_before_the_server(make, server, tmp_path):
    "Our own files, run: TLS, the sign-in, a cookie for https alone, the page, its websocket; and nobody chooses their own address."
    port, process = make(tmp_path, server[0])
    try:
        for _ in range(200):
            try: ask(port, "GET", "/health"); break
            except OSError: time.sleep(.05)
        status, told, _ = ask(port, "GET", "/")
        assert (status, told["Location"])==(303, "/login") and "max-age" in told["Strict-Transport-Security"]
        own = dict(Origin=f"https://{NAME}:{port}", Content_Type="application/x-www-form-urlencoded")
        lies = {"X-Real-IP": "6.6.6.6", "X-Forwarded-For": "7.7.7.7", "X-Scheme": "http", "X-Forwarded-Proto": "http"}
        before = len(read(server[1]))
        assert ask(port, "POST", "/login", "password=not+this+one", **own, **lies)[0]==401
        said = read(server[1])[before:]
        assert "sign-in from 127.0.0.1" in said and "6.6.6.6" not in said and "7.7.7.7" not in said
        status, told, _ = ask(port, "POST", "/login", "password="+PASSWORD.replace(" ", "+"), **own, **lies)
        assert status==303 and "secure" in told["Set-Cookie"].lower() and "httponly" in told["Set-Cookie"].lower()
        cookie = told["Set-Cookie"].split(";")[0]
        status, told, page = ask(port, "GET", "/", Cookie=cookie)
        assert status==200 and "Content-Security-Policy" in told
        kernel = re.search(r"\w{8}-\w{4}-\w{4}-\w{4}-\w{12}", page)[0]
        assert upgraded(port, f"/api/kernels/{kernel}/channels", Cookie=cookie)=="101"
        assert upgraded(port, f"/api/kernels/{kernel}/channels")=="401"                                   # nobody else's
        assert upgraded(port, f"/api/kernels/{kernel}/channels", Cookie=cookie, Origin="https://hostile.example")=="403"
    finally:
        process.terminate()
        process.wait(timeout=30)
