"""The experiment that docs/experiment.md tells of: `run` makes it, `collect` puts its record into results/, `render` writes the text.

No figure of the text is typed: docs/templates/experiment*.md name a place in results/experiment.json, and `render` looks it up.

    python docs/experiment.py run          # in the project's folder, with NANOGPT_DATA set; the commands are in RECIPE
    python docs/experiment.py collect
    python docs/experiment.py render
"""
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nanogpt.chart import STYLE, curve
from nanogpt.core import read_json, read_log, say, write_json
from nanogpt.corpus import HELD, records
from nanogpt.report import change, judge, reason

ROOT = Path(__file__).resolve().parent.parent
RUNS, RECORD, TIMES = ROOT/"runs", ROOT/"results/experiment.json", ROOT/"runs/recipe.jsonl"
RECIPE = (
    "nanogpt pretrain --preset real-small --out runs/base",
    "nanogpt data instruct dolly --tokenizer runs/base --out runs/talks",
    "nanogpt sft --preset dolly-small --data runs/talks --init runs/base --out runs/tuned",
    "nanogpt eval --model runs/base --suite all --talks runs/talks",
    "nanogpt eval --model runs/tuned --suite all",
    "nanogpt report --before runs/base --after runs/tuned --ask dolly --out runs/report")
MORE = tuple(f"nanogpt eval --model runs/{name} --tasks hellaswag --limit 10042" for name in ("base", "tuned")) # all there are

README = ("dolly.val_loss,text:pydocs.bits_per_byte,quality.stops,tales.endings,"
          "hellaswag.acc_completion,hellaswag.acc_norm,arc_easy.acc_norm") # the rows of its table

# ---- run -------------------------------------------------------------------------------------------------------------------

def run():
    "Every command in turn; what was finished before is found and not done again, as the commands themselves see to it."
    for line in RECIPE+MORE:
        say(f"==> {line}")
        start = time.time()
        done = subprocess.run([sys.executable, "-m", *shlex.split(line)], cwd=ROOT, check=False)
        if done.returncode: sys.exit(done.returncode)
        TIMES.parent.mkdir(exist_ok=True)
        with open(TIMES, "a", encoding="utf-8") as f: f.write(json.dumps(dict(command=line, seconds=time.time()-start))+"\n")

# ---- collect ---------------------------------------------------------------------------------------------------------------

def metrics(name, few=False):
    "The metrics in a run's log by task and name; of two measurements that of more items, or of fewer."
    rows = sorted(read_log(RUNS/name, "metric"), key=lambda m: m["n"], reverse=few)
    return {f"{m['task']}.{m['metric']}": m for m in rows}

def trained(name):
    "What a run took, and its losses, thinned."
    steps, evals, last = read_log(RUNS/name, "step"), read_log(RUNS/name, "eval"), read_log(RUNS/name, "step")[-1]
    loss = [[o["step"], round(o["loss"], 4)] for o in steps[::max(1, len(steps)//100)]]
    peak = max(o.get("peak_memory_bytes", 0) for o in read_log(RUNS/name, "note"))
    return dict(steps=last["step"], tokens=last["tokens"], seconds=last["seconds"], tokens_per_second=last["tokens"]/last["seconds"],
                peak_memory_bytes=peak, loss=loss, val_loss=[[o["step"], round(o["val_loss"], 4)] for o in evals])

def compared(before, after):
    "Both numbers with their intervals, the change with its own, and the verdict."
    show = lambda m: {k: m[k] for k in ("value", "n", "low", "high", "version", "chance", "random") if k in m}
    out = {}
    for key in sorted(before.keys() & after.keys()):
        b, a = before[key], after[key]
        row = dict(before=show(b), after=show(a), share="hits" in b, verdict=judge(key.split(".")[1], b, a))
        if reason(b, a): row["reason"] = reason(b, a)
        else: row["change"] = dict(zip(("value", "low", "high"), change(b, a), strict=True))
        out[key] = row
    return out

def collect():
    "Everything the text quotes, in one file."
    made, quality = read_json(RUNS/"tuned/config.json"), read_json(RUNS/"talks/quality.json")
    times = {o["command"]: o["seconds"] for o in records(TIMES)}
    held = sum(1 for _ in records(RUNS/"talks"/HELD))
    packed = next(o["text"] for o in read_log(RUNS/"tuned", "note") if o.get("text", "").startswith("packed"))
    same = {k: made[k] for k in ("parameters", "commit", "versions", "threads", "world", "device", "dtype")}
    record = dict(same, commands=RECIPE+MORE, date=time.strftime("%Y-%m-%d"), machine=platform.machine(), cores=os.cpu_count())
    write_json(RECORD, dict(record=record, seconds=times, recipe_seconds=sum(times[o] for o in RECIPE), data=quality, held=held,
                            packed=packed, runs={k: trained(k) for k in ("base", "tuned")},
                            metrics=compared(metrics("base"), metrics("tuned")),
                            few=compared(metrics("base", True), metrics("tuned", True)), # HellaSwag on the recipe's items alone
                            samples=read_json(RUNS/"report/report.json")["samples"]))

# ---- render ----------------------------------------------------------------------------------------------------------------

SHOW = {"": str, "n": lambda v: f"{v:,}", "round": lambda v: f"{v:,.0f}", "2": lambda v: f"{v:.2f}", "3": lambda v: f"{v:.3f}",
        "%": lambda v: f"{100*v:.1f} %", "+%": lambda v: f"{100*v:+.1f}".replace("-", "−"), "+3": lambda v: f"{v:+.3f}".replace("-", "−"),
        "min": lambda v: f"{v/60:.1f}", "GB": lambda v: f"{v/1e9:.2f}", "M": lambda v: f"{v/1e6:.2f}", "start": lambda v: v[:7]}

def look(record, path):
    "What stands at a path such as metrics/dolly.val_loss/before/value."
    for key in path.split("/"): record = record[int(key)] if isinstance(record, list) else record[key]
    return record

def rows(record, names):
    "A line of a Markdown table for each metric: before, after, change, verdict."
    for name in names.split(","):
        m = record["metrics"][name]
        show, gain = ("%", "+%") if m["share"] else ("3", "+3")
        both = [f"{SHOW[show](o['value'])} ({SHOW[show](o['low'])} – {SHOW[show](o['high'])})" for o in (m["before"], m["after"])]
        move = [SHOW[gain](m["change"][k]) for k in ("value", "low", "high")] if "change" in m else ["–"]*3
        yield f"| {name} | {m['after']['n']:,} | {both[0]} | {both[1]} | {move[0]} ({move[1]} … {move[2]}) | {m['verdict']} |"

def talk(record, category):
    "A question and both answers, as plain text: what a model says is nobody's Markdown."
    s = next(o for o in record["samples"] if o["category"]==category)
    cut = lambda text, n: text if len(text := " ".join(text.split()))<=n else text[:n-1]+"…"
    lines = [f"[{category}] {cut(s['prompt'], 300)}", f"before: {cut(s['before'], 240)}", f"after:  {cut(s['after'], 240)}"]
    return "```text\n"+"\n".join(lines).replace("`", "'")+"\n```"

def rendered(template, record):
    "The text with every {{place|how}} looked up, {{rows|metrics}}, {{talk|category}} and {{recipe}} written out."
    def put(m):
        path, _, how = m[1].partition("|")
        if path=="rows": return "\n".join(rows(record, how))
        if path=="recipe": return "\n".join(RECIPE+MORE)
        return talk(record, how) if path=="talk" else SHOW[how](look(record, path))
    return re.sub(r"\{\{(.+?)\}\}", put, template)

def pictures(record):
    "Name and SVG of each picture; colours travel with it, for a page has none for a picture from a file."
    for name, kind in (("base", "before"), ("tuned", "after")):
        losses = record["runs"][name]
        svg = curve(losses["loss"], losses["val_loss"], kind, f"The loss of the {name} run, step by step; dots: of held-out text.")
        head, _, rest = svg.partition(">")
        yield f"loss-{name}.svg", f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'

def render():
    "docs/experiment.md and its translation, the pictures, and the table in the README."
    record = read_json(RECORD)
    for template in sorted((ROOT/"docs/templates").glob("*.md")):
        (ROOT/"docs"/template.name).write_text(rendered(template.read_text(encoding="utf-8"), record), encoding="utf-8")
    (ROOT/"docs/img").mkdir(exist_ok=True)
    readme = ROOT/"README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition("<!-- experiment -->\n")
    names = ("metric", "items", "before (interval)", "after (interval)", "change (interval)", "verdict")
    table = ["| "+" | ".join(names)+" |", "|:--|--:|:--|:--|:--|:--|", *rows(record, README)]
    readme.write_text(head+"<!-- experiment -->\n"+"\n".join(table)+"\n"+rest[rest.index("<!-- /experiment"):], encoding="utf-8")
    for name, svg in pictures(record): (ROOT/"docs/img"/name).write_text(svg, encoding="utf-8")

if __name__=="__main__": dict(run=run, collect=collect, render=render)[sys.argv[1]]()
