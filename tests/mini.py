"Runs so small that a test can afford a dozen of them, started as a person starts them: `python -m nanogpt …` in a process of its own."
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

KEYS = ("step", "loss_hex", "lr", "grad_norm", "tokens", "ids_sha")
QUICK = "--threads 1 --device cpu --dtype float32 --no_compile --kernel fused --eval_every 4 --eval_batches 2 --save_every 5".split()
SHAPE = "--n_layer 1 --n_head 2 --n_embd 16 --seq_len 32 --micro_batch 2 --batch_tokens 128 --steps 30 --dropout 0.1".split()
PRETRAIN = ("pretrain", *SHAPE, *QUICK)
SFT = ("sft", *"--rows 40 --val_rows 12 --seq_len 128 --micro_batch 2 --batch_tokens 512 --steps 20".split(), *QUICK)

def environment(**more):
    "One thread, no network, no real data: what a child process gets."
    keep = {k: v for k, v in os.environ.items() if k not in ("NANOGPT_DATA", "WORLD_SIZE", "RANK")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return keep | dict(PYTHONPATH=path, OMP_NUM_THREADS="1", PYTHONUTF8="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") | more

def command(*words, before=""):
    "The words of a `nanogpt` process; `before` is Python to run first, to change something in the program."
    if not before: return [sys.executable, "-m", "nanogpt", *map(str, words)]
    return [sys.executable, "-c", f"{before}\nimport sys\nfrom nanogpt.cli import main\nsys.exit(main(sys.argv[1:]))", *map(str, words)]

def run(*words, code=0, before="", **more):
    "A finished `nanogpt` process; its exit code must be `code`."
    more |= dict(capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=200)
    done = subprocess.run(command(*words, before=before), **more)
    assert done.returncode==code, f"exit {done.returncode}, not {code}: nanogpt {' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done

def here(*words):
    "The same in this process, for verbs that only look; exit code and stdout."
    from nanogpt.cli import main
    out = io.StringIO()
    with contextlib.redirect_stdout(out): code = main([str(w) for w in words])
    return code, out.getvalue()

def start(*words, before="", **more):
    "A running `nanogpt` process."
    return subprocess.Popen(command(*words, before=before), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
                            env=environment(), **more)

def log(folder, kind):
    "The lines of one kind in a run's log; a line torn by a crash is left out."
    out, path = [], Path(folder)/"log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try: row = json.loads(line)
        except ValueError: continue
        if row["kind"]==kind: out.append(row)
    return out

def numbers(folder):
    "Everything in a run's log that must not depend on how often it was stopped."
    steps = [tuple(o[k] for k in KEYS) for o in log(folder, "step")]
    looks = [(o["step"], o["val_loss"], o["n"]) for o in log(folder, "eval")]
    return steps, looks, [(o["step"], o["prompt"], o["text"]) for o in log(folder, "sample")]

def steps_done(folder): return max((o["step"] for o in log(folder, "step")), default=0)

def reason(folder): return json.loads((Path(folder)/"exit.json").read_text())["reason"]

def wait(process, ready):
    "Wait until `ready()` or the end of the process; was it still running?"
    while process.poll() is None:
        if ready(): return True
        time.sleep(.002)
    return False

def end(process, code=0):
    "Wait for the end; what it printed."
    out, err = process.communicate(timeout=120)
    assert process.returncode==code, f"exit {process.returncode}, not {code}\n{out}\n{err}"
    return out, err

def copy(folder, to): shutil.copytree(folder, to); return to

def tree(folder):
    "Every file below a folder with its content."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def one_message(err, *says):
    "stderr ends with exactly one message of the program: what and fix, no traceback; what it names is in it. Returns it."
    assert "Traceback" not in err, err
    found = re.findall(r"^nanogpt: .*(?:\n(?!nanogpt: ).*)*\Z", err.rstrip("\n"), re.M)
    assert len(found)==1 and err.count("nanogpt: ")-err.count("nanogpt: nanogpt")<=1 and found[0].count("\n  fix: ")==1, err
    for text in says: assert str(text) in found[0], (text, err)
    return found[0]

def program(package, *names):
    "The path of a program. Debian's own package is installed when the tests run as root; else the test skips and says why."
    find = lambda: next(filter(None, map(shutil.which, names)), None)
    if not find() and shutil.which("apt-get") and os.geteuid()==0:
        for words in (["update"], ["install", "-y", "--no-install-recommends", package]):
            subprocess.run(["apt-get", "-q", *words], capture_output=True, timeout=600)
    return find() or pytest.skip(f"there is no {names[0]}, and it cannot be installed without root: apt install {package}")

def unpacked(package, path, folder):
    "A program out of Debian's package, which is not installed: an installed server would start by itself, and stay."
    if found := shutil.which(Path(path).name): return found
    if shutil.which("apt-get"):
        fetch = lambda: subprocess.run(["apt-get", "-q", "download", package], cwd=folder, capture_output=True, timeout=600).returncode==0
        if not fetch() and os.geteuid()==0:
            subprocess.run(["apt-get", "-q", "update"], capture_output=True, timeout=600)
            fetch()
        for deb in folder.glob(f"{package}_*.deb"): subprocess.run(["dpkg", "-x", deb, folder], capture_output=True, timeout=60)
    return str(folder/path) if (folder/path).exists() else pytest.skip(f"there is no {package}, and its package cannot be fetched")
