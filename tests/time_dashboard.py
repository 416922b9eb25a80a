"""How long a person waits for the dashboard, measured in a browser: `python tests/time_dashboard.py RUNS results/dashboard.json`.

RUNS is a folder with a model, such as runs/demo of `nanogpt speedrun`. No test depends on these figures.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median

from dash import Server, Visitor, chrome
from parrot import save_speaker, tokenizer

from nanogpt.core import write_json

TIMES = 3
ONES = "One two three four five. "

def waited(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def first_widget(browser, server, pause):
    "Seconds from opening a page to a box one can type in, and to a model that answers."
    out = []
    for _ in range(TIMES):
        time.sleep(pause)                                              # a kernel that is kept ready needs some seconds itself
        with Visitor(browser, server.url) as v:
            start = time.perf_counter()
            v.page.goto(server.url)
            v.one(".ng-input").wait_for()
            usable = time.perf_counter()-start
            v.shows("() => document.querySelector('.ng-starter')")
            out.append((usable, time.perf_counter()-start))
    return [median(o) for o in zip(*out, strict=True)]

def answers(browser, server):
    "Seconds from Enter to the first letters, and from a click on Stop to the end; bytes of 1,000 tokens; memory of a kernel."
    with Visitor(browser, server.url) as v:
        v.open()
        first, stop = [], []
        for _ in range(TIMES):
            v.one(".ng-new").click()
            v.shows("() => document.querySelector('.ng-starter')")
            v.one(".ng-input").fill("Tell me a story about a dog.")
            said = "() => [...document.querySelectorAll('.ng-answer .ng-text')].at(-1)?.textContent.trim()"
            first.append(waited(lambda said=said: (v.one(".ng-input").press("Enter"), v.shows(said))))
            v.finished(1)
        v.pick("quick")
        before = v.bytes
        v.ask("Count")
        sent, used = v.bytes-before, max(o.memory_info().rss for o in server.kernels())
        for k in range(TIMES):
            v.type("Count")
            v.growing(200)
            stop.append(waited(lambda k=k: (v.one(".ng-stop").click(), v.finished(2+k))))
    return dict(first_words=median(first), stop=median(stop), bytes_of_1000_tokens=sent, kernel_bytes=used)

def main(runs, out):
    with tempfile.TemporaryDirectory() as at, chrome() as browser:
        home = Path(at)
        (home/"runs").mkdir()
        (home/"runs"/"demo").symlink_to(Path(runs).resolve())
        save_speaker(home/"runs"/"quick", tokenizer([ONES]*40, 300), ONES, end=False, loop=True)
        with Server(home/"runs", home) as s: cold = first_widget(browser, s, 1)
        with Server(home/"runs", home, "--preheat", 1) as s: warm = first_widget(browser, s, 15)
        with Server(home/"runs", home, "--max_tokens", 1000) as s: rest = answers(browser, s)
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((o.split(":")[1].strip() for o in told.splitlines() if o.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    times = lambda o: dict(typing=o[0], answering=o[1])
    record = dict(command=f"python tests/time_dashboard.py {runs} {out}", commit=commit, date=str(date.today()), machine=model,
                  processors=os.cpu_count(), load=os.getloadavg()[0], unit="seconds, median of three",
                  cold=times(cold), preheated=times(warm), **rest)
    write_json(Path(out), record)
    print(json.dumps(record, indent=1))

if __name__=="__main__": main(*sys.argv[1:])
