"The report in a browser, as the commands leave it: every number is at its source, nothing leaves the machine, nothing that was said runs."
import json
import re
import shutil

import pytest
from browser import browser
from mini import QUICK, SHAPE, here, log, one_message, run

from nanogpt.chart import thin
from nanogpt.passport import keep_lines, open_runs, with_card
from nanogpt.report import strays, trace

NASTY = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> & </data></p> \u202e \ud800"

@pytest.fixture(scope="module")
def runs(whole, tuned, tmp_path_factory):
    "Copies of two tiny runs, measured by `nanogpt eval`, that were asked a prompt nobody should trust."
    home = tmp_path_factory.mktemp("report")
    pair = [shutil.copytree(path, home/name) for name, path in (("one", whole), ("two <b>", tuned))]
    for path in pair:
        run("eval", "--model", path, "--limit", 3, "--threads", 1)
        keep_lines(path, "sample", [dict(prompt=NASTY, text=NASTY+path.name)])
    return pair

def written(before, after, out, *more):
    "The report's two files, written by the command, and the sources that it quotes."
    code, _ = here("report", "--before", before, "--after", after, "--out", out, *more)
    assert code==0
    one, two = open_runs(before=before, after=after)
    with_card(one, two)
    if (out/"report.json").exists(): one.sources.folders["page"] = out
    return (out/"report.html").read_text(encoding="utf-8"), (out/"report.md").read_text(encoding="utf-8"), one.sources

def points(svg):
    "Steps and losses, read off a drawn line."
    x0, x1, y0, y1, left, right, top, bottom = map(float, re.search(r'data-scale="([^"]*)"', svg)[1].split())
    line = [map(float, p.split(",")) for p in re.search(r'class="line[^"]*" d="M([^"]*)"', svg)[1].split()]
    return [(x0+(x1-x0)*(x-left)/(right-left), y0+(y1-y0)*(bottom-y)/(bottom-top)) for x, y in line]

def test_every_number_is_at_its_source(runs, tmp_path):
    "All facts are looked up again and agree; no digit stands outside a fact; curves are the losses of the logs. A changed log is noticed."
    page, text, sources = written(*runs, tmp_path, "--price_per_hour", 3.6)
    facts = trace(page, sources)
    assert len(facts)>100 and [o for o in facts if not o["right"]]==[] and strays(page)==[]
    curves = re.findall(r'<svg class="curve".*?</svg>', page)
    for path, svg in zip(runs, curves, strict=True):
        want = thin([(o["step"], o["loss"]) for o in log(path, "step")])
        got = points(svg)
        assert len(got)==len(want)
        for (x, y), (step, loss, _, _) in zip(got, want, strict=True): assert abs(x-step)<.1 and abs(y-loss)<.02
    for path in runs:
        for m in log(path, "metric"): assert f"{m['task']} {m['metric']}" in page.replace("<wbr>", "")
        assert f"{log(path, 'eval')[-1]['val_loss']:.3f}" in page and f"{log(path, 'eval')[-1]['val_loss']:.3f}" in text
    for row in re.findall(r"^\| (.*?) \| (?:before|after)/log\.jsonl line \d+: val\\_loss \|$", text, re.M): assert row in page
    last = (runs[1]/"log.jsonl").read_text(encoding="utf-8")
    try:
        (runs[1]/"log.jsonl").write_text(last.replace('"val_loss": ', '"val_loss": 1'), encoding="utf-8")
        again = open_runs(before=runs[0], after=runs[1])[0].sources
        again.folders["page"] = tmp_path
        assert any(not o["right"] for o in trace(page, again)) # the control
    finally: (runs[1]/"log.jsonl").write_text(last, encoding="utf-8")

def open_page(at, path):
    "Open a file in the browser; returns the addresses that were asked for and what the page complained about."
    asked, said = [], []
    at.on("request", lambda r: asked.append(r.url))
    at.on("console", lambda m: said.append(m.text))
    at.on("pageerror", lambda e: said.append(str(e)))
    at.goto(path.as_uri())
    at.wait_for_load_state("networkidle")
    return asked, said

def test_in_a_browser(runs, tmp_path):
    "One file and no request but for itself, in light, dark, on a telephone and on paper; a script that was said stays text."
    written(*runs, tmp_path, "--price_per_hour", 2)
    path = tmp_path/"report.html"
    with browser(tmp_path/"profile") as at:
        asked, said = open_page(at, path)
        assert asked==[path.as_uri()] and said==[]
        assert at.title()!="taken" and at.locator("script, img, iframe, link[rel=stylesheet]").count()==0
        assert any("<script>document.title" in t for t in at.locator(".ask").all_inner_texts())
        assert at.locator(".said").first.inner_text().startswith("<script>")
        colours = {}
        for scheme in ("light", "dark"):
            at.emulate_media(color_scheme=scheme)
            colours[scheme] = at.evaluate("getComputedStyle(document.body).backgroundColor")
            at.screenshot(path=str(tmp_path/f"{scheme}.png"), full_page=True)
        assert len(set(colours.values()))==2
        at.set_viewport_size(dict(width=360, height=740))
        at.screenshot(path=str(tmp_path/"phone.png"), full_page=True)
        assert at.evaluate("document.documentElement.scrollWidth")<=360 # nothing has to be pushed sideways
        wide = at.evaluate("[...document.querySelectorAll('.wide')].map(o => o.scrollWidth-o.clientWidth)")
        assert max(wide)<=0 and at.locator("svg.curve").first.bounding_box()["width"]>250
        at.emulate_media(media="print")
        at.pdf(path=str(tmp_path/"print.pdf"), format="A4", prefer_css_page_size=True)
        assert (tmp_path/"print.pdf").read_bytes()[:5]==b"%PDF-" and not at.locator("details").is_visible()
        assert asked==[path.as_uri()]

def test_control_an_unescaped_page_is_caught(runs, tmp_path):
    "Were the texts not escaped, trace would say so; and the page's own rule would still keep the script from running."
    from nanogpt.report import clean, escape
    page, _, sources = written(*runs, tmp_path)
    words = clean(NASTY)
    bad = page.replace(escape(words), words)
    assert bad!=page and any(not o["right"] for o in trace(bad, sources))
    (tmp_path/"bad.html").write_text(bad, encoding="utf-8")
    with browser(tmp_path/"profile") as at:
        _, said = open_page(at, tmp_path/"bad.html")
        assert at.title()!="taken" and any("Content Security Policy" in s for s in said) # refused by the policy in its head

def test_what_is_missing_is_said(runs, tmp_path, capsys):
    "A metric on one side only, another vocabulary, a lost log, no run at all: in words on the page, or refused with the next step."
    a, b = (shutil.copytree(path, tmp_path/name) for path, name in zip(runs, "ab", strict=True))
    keep_lines(b, "metric", [dict(task="quiz", metric="acc", version=1, value=.5, n=4, low=.1, high=.9)])
    page, text, _ = written(a, b, tmp_path/"1")
    assert "not measured before" in page and "not measured before" in text and "energy is not known" in page
    vocabulary = json.loads((b/"tokenizer.json").read_text(encoding="utf-8"))
    (b/"tokenizer.json").write_text(json.dumps(dict(vocabulary, fingerprint="0"*64)), encoding="utf-8")
    page, _, _ = written(a, b, tmp_path/"2")
    assert "The vocabularies differ" in page and "another vocabulary" in page
    (a/"log.jsonl").unlink()
    page, _, sources = written(a, b, tmp_path/"3")
    assert "no log of its training" in page and "never asked the same prompt" in page and all(o["right"] for o in trace(page, sources))
    out = ("--out", tmp_path/"4")
    wrong = {"is not a run": (tmp_path/"none", b, *out), "needs --out": (a, b), "did you mean": (b/"model", b, *out)}
    for says, (before, *rest) in wrong.items():
        capsys.readouterr()
        assert here("report", "--before", before, "--after", *rest)[0]==2
        one_message(capsys.readouterr().err, says)
    assert not (tmp_path/"4").exists()

def test_history_of_a_stopped_run(shards, tmp_path):
    "A run that SIGTERM stopped and the same command finished tells both, each with its line."
    import signal

    from mini import end, start, steps_done, wait
    words = ("pretrain", *SHAPE, *QUICK, "--data", shards, "--out", tmp_path/"run")
    p = start(*words)
    assert wait(p, lambda: steps_done(tmp_path/"run")>=4)
    p.send_signal(signal.SIGTERM)
    end(p)
    run(*words)
    page, text, sources = written(tmp_path/"run", tmp_path/"run", tmp_path/"page")
    for word in ("preempted", "going on after step", "done"): assert word in page and word in text
    assert all(o["right"] for o in trace(page, sources)) and strays(page)==[]

def test_energy_is_added_up(runs, tmp_path, monkeypatch):
    "Two cards of 100 and 150 watts: joules are watts times seconds, in the log and on the page. Nothing is told, nothing is written."
    import time

    from nanogpt.passport import Meter, metered
    card = tmp_path/"bin"/"nvidia-smi"
    card.parent.mkdir()
    card.write_text("#!/bin/sh\necho 100.0; echo 150.0\n")
    card.chmod(0o755)
    path = shutil.copytree(runs[1], tmp_path/"run")
    monkeypatch.setenv("PATH", str(tmp_path))
    with Meter(folder=tmp_path/"no") as m: pass
    assert m.joules is None
    before = len(log(path, "energy"))
    monkeypatch.setenv("PATH", f"{card.parent}:/bin:/usr/bin")
    start = time.monotonic()
    with Meter(every_seconds=.05, folder=tmp_path/"no") as m: time.sleep(.3)
    assert 250*.3<=m.joules<=250*(time.monotonic()-start) and m.meters=={"nvidia-smi"}
    with metered(path): time.sleep(.1)
    assert len(log(path, "energy"))==before+1 and log(path, "energy")[-1]["joules"]>=25
    page, _, sources = written(path, path, tmp_path/"page")
    assert "watt hours" in page and "energy is not known" not in page and all(o["right"] for o in trace(page, sources))

def test_diff(runs, shards, tmp_path, capsys):
    "One setting is changed: it is named, with the first step whose loss differs; what is equal is only counted."
    run("pretrain", *SHAPE, *QUICK, "--data", shards, "--out", tmp_path/"other", "--clip", 0.01)
    d = json.loads(here("report", "--diff", runs[0], tmp_path/"other", "--json")[1])
    names = {o["what"] for o in d["differs"]}
    assert "settings.clip" in names and not {"settings.lr", "settings.seed", "model.n_layer", "data", "vocabulary"} & names
    assert d["parted"]=={"loss": 2, "data": None} and d["same"]>30
    text = here("report", "--diff", runs[0], tmp_path/"other")[1]
    assert "settings.clip" in text and "up to step 1; step 2 differs" in text and "read the same ids in every step" in text
    capsys.readouterr()
    assert here("report", "--diff", runs[0])[0]==2
    one_message(capsys.readouterr().err, "--diff needs two runs")
