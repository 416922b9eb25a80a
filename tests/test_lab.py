"A learner in a real browser: `make lab`, a wrong answer gets its sentence, a right one passes, the map shows it."
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import browser, chromium, free_port
from conftest import ROOT
from mini import environment
from test_course import answers

from nanogpt.lessons import catalog

WRONG = """def attend(q, k, v, see=None, dropout=0.):
    if see is None: see = _causal(q, k)
    return (q@k.mT).masked_fill(~see, -1e9).softmax(-1)@v"""

@contextlib.contextmanager
def lab(course):
    "`make lab` with a learner's folder; gives the address."
    if not (Path(sys.prefix)/".runtime").exists(): pytest.skip(f"{sys.prefix} was not made by make: run make test")
    port = free_port()
    args = f"--no-browser --port={port} --IdentityProvider.token=secret --expose-app-in-browser --allow-root"
    words = ["make", "lab", f"VENV={os.path.relpath(sys.prefix, ROOT)}", f"COURSE={course}", f"ARGS={args}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(words, cwd=ROOT, env=environment(), start_new_session=True, **pipes) as p:
        try:
            for _ in range(240):
                assert p.poll() is None, p.stdout.read().decode()
                with contextlib.suppress(OSError): urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=secret").close(); break
                time.sleep(.5)
            yield f"http://127.0.0.1:{port}/lab/tree/%s?token=secret"
        finally: os.killpg(p.pid, signal.SIGKILL); p.stdout.close()

FIND = """role => { const w = jupyterapp.shell.currentWidget.content.widgets;
  return w.findIndex(c => { const m = c.model.sharedModel.getMetadata('nanogpt'); return m && m.exercise=='attend' && m.role==role }) }"""
GO = """i => { const c = jupyterapp.shell.currentWidget.content; c.activeCellIndex = i; c.mode = 'edit';
  return c.scrollToItem(i, 'center').then(() => { c.widgets[i].editor.focus() }) }"""
COUNT = "i => jupyterapp.shell.currentWidget.content.widgets[i].model.executionCount"
SAID = "i => JSON.stringify(jupyterapp.shell.currentWidget.content.widgets[i].model.outputs.toJSON())"

READY = """name => { const w = window.jupyterapp?.shell.currentWidget;
  return w?.context?.isReady && w.context.path.endsWith(name) && w.content.widgets.length>5
    && w.sessionContext?.session?.kernel?.connectionStatus=='connected' && w.sessionContext.session.kernel.status=='idle' }"""

def open_notebook(page, url, name):
    page.goto(url%name)
    page.wait_for_function(READY, arg=name)

def write_and_run(page, role, text=None):
    "Put the cursor into a cell as a click would, type if there is something to type, and press Shift+Enter; what the cell showed."
    at = page.evaluate(FIND, role)
    assert at>=0
    had = page.evaluate(COUNT, at)
    page.evaluate(GO, at)
    if text is not None: page.keyboard.press("Control+A"); page.keyboard.insert_text(text)
    page.keyboard.press("Shift+Enter")
    page.wait_for_function(f"([i, had]) => {{ const n = ({COUNT})(i); return n && n!=had }}", arg=[at, had])
    return page.evaluate(SAID, at)

@pytest.mark.timeout(500)
def test_a_learner_in_the_browser(tmp_path):
    chromium()
    course, [attend] = tmp_path/"mine", [o for o in catalog(ROOT/"lessons") if o["name"]=="attend"]
    right = "\n".join(line for line in answers("05_attention")["attend"].splitlines() if not line.startswith("#|"))
    wrong = right[:right.index("def attend")]+WRONG
    with lab(course) as url, browser(tmp_path/"profile") as page:
        page.set_default_timeout(150_000) # the machine may be busy with other tests
        open_notebook(page, url, "05_attention.ipynb")
        assert page.locator("text=Would you like to").count()==0 # no news
        page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-above')")
        stub = page.evaluate(FIND, "stub")
        page.evaluate("i => { jupyterapp.shell.currentWidget.content.activeCellIndex = i }", stub)
        page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-above')")
        assert "Your turn" in write_and_run(page, "stub") + write_and_run(page, "check")
        write_and_run(page, "stub", wrong)
        said = write_and_run(page, "check")
        assert "Close. " in said and attend["sentences"][0] in said, said
        page.get_by_text(attend["sentences"][0]).first.wait_for()
        page.screenshot(path=tmp_path/"wrong.png")
        write_and_run(page, "stub", right)
        assert "attend is right" in write_and_run(page, "check")
        page.get_by_text("attend is right").first.wait_for()
        page.screenshot(path=tmp_path/"right.png")
        page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        open_notebook(page, url, "00_start_here.ipynb")
        page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        page.get_by_text(f"1 of {len(catalog(ROOT/'lessons'))} are solved so far").first.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path/"map.png")
    assert all((tmp_path/f"{name}.png").stat().st_size>20_000 for name in ("wrong", "right", "map"))
    if keep := os.environ.get("NANOGPT_SCREENSHOTS"): # where a person wants to look at them
        for png in tmp_path.glob("*.png"): shutil.copy(png, keep)
