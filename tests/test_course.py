"Every exercise of every lesson proves that its check can see: the solution passes, the stub and each trap get their own sentence."
import json

import pytest
import torch
from conftest import ROOT

from nanogpt.course import EXERCISES, KINDS, _source, inputs, verdict
from nanogpt.lessons import build, catalog, load
from nanogpt.study import run_lesson

LESSONS = sorted((ROOT/"lessons").glob("[0-9]*.ipynb"))
WITH = sorted({o["lesson"] for o in catalog(ROOT/"lessons")})

def roles(lesson, role):
    cells = [c for c in lesson["cells"] if c["metadata"].get("nanogpt", {}).get("role")==role]
    return {c["metadata"]["nanogpt"]["exercise"]: c["source"] for c in cells}

def answers(name):
    "The right answers of a lesson, from the source notebook."
    from nanogpt.lessons import directives
    cells = [c["source"] for c in load(ROOT/"nbs"/f"{name}.ipynb")["cells"] if c["cell_type"]=="code"]
    return {mark["exercise"]: source for source in cells if "exercise" in (mark := directives(source))}

def wrong_shape(x):
    if isinstance(x, torch.Tensor): return x[None]
    return [x]

@pytest.mark.parametrize("name", WITH)
def test_solved(name):
    "Filled with the solutions, the lesson runs from top to bottom and every check passes; then every trap gets its own sentence."
    lesson = load(ROOT/"lessons"/f"{name}.ipynb")
    out = run_lesson(lesson, answers(name))
    assert out and [o for o in out if not o["passed"]]==[]
    for ex in list(EXERCISES.values()):
        for sentence, wrong in ex.traps.items(): assert verdict(ex, wrong)==f"Close. {sentence}", (ex.name, sentence)
        assert len(set(ex.hints))==3 and ex.kind in KINDS and all(ex.hints)
        assert _source(ex.name).strip() in answers(name)[ex.name], ex.name # what `solution` prints
        if not ex.draw: assert verdict(ex, -987654.321) and verdict(ex, [ex.spec]) and verdict(ex, "?"); continue
        right = ex.spec(*inputs(ex)[0])
        wrongs = dict(constant=lambda *a, r=right: r, input=lambda *a: a[0], shape=lambda *a, f=ex.spec: wrong_shape(f(*a)))
        for kind, f in wrongs.items(): assert verdict(ex, f), (ex.name, kind)

@pytest.mark.parametrize("name", WITH)
def test_unsolved(name):
    "With every stub as it is, the lesson still runs to its end, and every check says whose turn it is."
    out = run_lesson(load(ROOT/"lessons"/f"{name}.ipynb"), {})
    assert out and all(o["said"].startswith("Your turn") for o in out), out

def test_built_lessons_are_these(tmp_path):
    "lessons/ is what `nanogpt course build` makes of nbs/, byte for byte."
    names = build(ROOT/"nbs", tmp_path)
    assert [p.stem for p in LESSONS]==sorted(names)
    for name in names: assert (tmp_path/f"{name}.ipynb").read_bytes()==(ROOT/"lessons"/f"{name}.ipynb").read_bytes(), name

def test_catalogue():
    "Names are unique, kinds are known, and every exercise has a statement above it that says how long it takes."
    rows = catalog(ROOT/"lessons")
    assert len({o["name"] for o in rows})==len(rows) and all(o["kind"] in KINDS for o in rows)
    for name in WITH:
        nb = load(ROOT/"nbs"/f"{name}.ipynb")
        for at, c in enumerate(nb["cells"]):
            if c["source"].startswith("#| spec"):
                above = nb["cells"][at-1]
                text = above["source"] if above["cell_type"]=="markdown" else ""
                assert "### Exercise: " in text and "minute" in text, (name, c["source"][:40])

def test_lessons_hide_the_answers():
    "No lesson shows the solution of an exercise: stubs end in `your turn`, and what is to be filled in has no output."
    for name in WITH:
        lesson = load(ROOT/"lessons"/f"{name}.ipynb")
        kinds = {o["name"]: o["kind"] for o in catalog(ROOT/"lessons")}
        for exercise, source in roles(lesson, "stub").items():
            assert kinds[exercise]=="bug" or "your turn" in source, (name, exercise)
            assert source.strip()!=answers(name)[exercise].strip()
        for c in lesson["cells"]:
            if "role" in c["metadata"].get("nanogpt", {}): assert c["outputs"]==[] and c["execution_count"] is None
        assert json.dumps(lesson).count("your turn")>0

def test_readme_counts():
    "The numbers of exercises and mistakes in the README are those of the catalogue; no chapter (lessons of a number) has fewer than four."
    rows, text = catalog(ROOT/"lessons"), (ROOT/"README.md").read_text(encoding="utf-8")
    traps = sum(o["traps"] for o in rows)
    assert f"**{len(rows)} exercises**" in text and f"**{traps} known mistakes**" in text and traps>=60
    for name in WITH: assert sum(o["lesson"][:2]==name[:2] for o in rows)>=4, name

def test_the_classic_mistakes_of_tuning():
    "Four mistakes that spoil many a tuning are each an exercise's planted bug, or a trap that names them."
    sentences = {s for o in catalog(ROOT/"lessons") if o["lesson"][:2] in ("13", "14", "15") for s in o["sentences"]}
    for words in ("The mask comes one token late", "The mask is shifted by one", "The prompt is not masked", "a mean of means"):
        assert any(words in s for s in sentences), words
    planted = {"14_sft": "per_token", "15_evals": "mean_loss", "15a_choice": "right_ones", "13_template": "answers_only"}
    kinds = {(o["lesson"], o["name"]): o["kind"] for o in catalog(ROOT/"lessons")}
    assert all(kinds[o]=="bug" for o in planted.items())
    text = json.dumps(load(ROOT/"lessons"/"15a_choice.ipynb"))
    assert "the answer leaks into the choice" in text

# ---- a learner's folder ----------------------------------------------------------------------------------------------

def stubs(notebook):
    return [c for c in notebook["cells"] if c["metadata"].get("nanogpt", {}).get("role")=="stub"]

def test_update_loses_nothing(tmp_path, monkeypatch):
    "Every lesson changes under a learner who has changed and added cells: the news arrive, and all of the learner's cells stay."
    from nanogpt import study
    new = tmp_path/"new"
    study.start(tmp_path/"mine")
    wrote = {}
    for at, p in enumerate(sorted((tmp_path/"mine").glob("*.ipynb"))):
        nb = json.loads(p.read_text(encoding="utf-8"))
        for k, c in enumerate(nb["cells"][at%3::3]): c["source"] = f"my own {p.stem} {k}"
        nb["cells"].insert(at%len(nb["cells"]), dict(cell_type="markdown", id=f"own{at}", metadata={}, source=f"a note of mine {at}"))
        wrote[p.name] = [c["source"] for c in nb["cells"] if c["source"].startswith(("my own", "a note of mine"))]
        p.write_text(json.dumps(nb), encoding="utf-8")
    new.mkdir()
    for p in LESSONS:
        nb = json.loads(p.read_text(encoding="utf-8"))
        del nb["cells"][1] # one cell goes, one comes, one is said anew
        nb["cells"].insert(2, dict(cell_type="markdown", id="brandnew", metadata={}, source=["news"]))
        nb["cells"][3]["source"] = ["said anew"]
        (new/p.name).write_text(json.dumps(nb), encoding="utf-8")
    monkeypatch.setattr(study, "lessons_folder", lambda: new)
    done = study.update(tmp_path/"mine")
    for name, mine in wrote.items():
        sources = ["".join(c["source"]) for c in json.loads((tmp_path/"mine"/name).read_text(encoding="utf-8"))["cells"]]
        assert [s for s in sources if s in mine]==mine and "news" in sources and done[name.removesuffix(".ipynb")]==len(mine), name
    before = {p.name: p.read_bytes() for p in (tmp_path/"mine").glob("*.ipynb")}
    study.update(tmp_path/"mine")
    assert before=={p.name: p.read_bytes() for p in (tmp_path/"mine").glob("*.ipynb")} # a second time changes nothing

def test_progress_survives_a_kill(tmp_path):
    "A process that notes without end is killed: every line but perhaps the last is whole, and the folder still knows them."
    import signal
    import subprocess
    import sys
    import time

    from mini import environment

    from nanogpt.course import progress
    code = "from nanogpt.course import note\nfor i in range(10**9): note(f'x{i}', 'check', passed=True)"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment())
    while len(progress(tmp_path))<50: time.sleep(.05); assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    names = [o["exercise"] for o in progress(tmp_path)]
    assert names==[f"x{i}" for i in range(len(names))] and len(names)>=50

def test_check_from_the_terminal(tmp_path):
    "`course check` runs the package's own lesson with the learner's answers in it: 3 while something is missing, 0 when all is right."
    from mini import run
    run("course", "start", tmp_path/"mine")
    path = tmp_path/"mine"/"05_attention.ipynb"
    out = run("course", "check", path, "--json", code=3).stdout.splitlines()
    assert all(set(json.loads(o))=={"lesson", "name", "passed", "said"} and "Your turn" in o for o in out) and len(out)>=4
    nb = json.loads(path.read_text(encoding="utf-8"))
    right = answers("05_attention")
    for c in stubs(nb): c["source"] = right[c["metadata"]["nanogpt"]["exercise"]]
    role = lambda c: c["metadata"].get("nanogpt", {}).get("role")
    nb["cells"] = [c for c in nb["cells"] if role(c) not in ("spec", "check")] # nobody can cheat this way
    path.write_text(json.dumps(nb), encoding="utf-8")
    run("course", "check", path, "--json")
    assert not (tmp_path/"mine"/"progress.jsonl").exists() # a teacher only looks
    out = run("course", "check", path).stdout
    assert out.count("✓")==len(stubs(nb)) and "✗" not in out
    n = len(stubs(nb))
    assert f"05_attention          {n} of   {n}" in run("course", "progress", tmp_path/"mine").stdout
    assert "is a folder" in run("course", "check", tmp_path/"mine", code=2).stderr

def test_start_without_a_folder_names_its_own(tmp_path):
    "`course start` alone makes my-course and says so; nothing is spilled into the folder one happens to be in."
    from mini import run
    out = run("course", "start", cwd=tmp_path).stdout
    assert "lessons written to my-course" in out and "my-course/00_start_here.ipynb" in out
    assert [p.name for p in tmp_path.iterdir()]==["my-course"] and len(list((tmp_path/"my-course").glob("*.ipynb")))==len(LESSONS)
    assert "are untouched" in run("course", "start", cwd=tmp_path).stdout

def test_progress_of_no_course(tmp_path):
    "A folder without a lesson has no progress to show: it is named, with what to type."
    from mini import one_message, run
    for words in ((), (tmp_path/"nowhere",)):
        done = run("course", "progress", *words, code=2, cwd=tmp_path)
        one_message(done.stderr, "holds no lessons of this course", "nanogpt course start")
        assert not done.stdout
