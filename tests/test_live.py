"Answers on a thread: the same text as alone, at most twenty shows a second, obeyed within a token, nothing left behind."
import math
import random
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from nanogpt import live
from nanogpt.beam import BeamConfig, beam
from nanogpt.core import CheckpointError, NanoError, ShapeError
from nanogpt.knobs import SampleConfig
from nanogpt.live import Job, Part, Task, Throttle
from nanogpt.model import GPT, GPTConfig
from nanogpt.sample import complete
from nanogpt.tokenizer import Tokenizer

TOK = Tokenizer.train(["the cat sat on the mat. the dog ran.", "猫坐在垫子上。狗跑了。"]*3, 290)
EVERY = 1/16 # exact in binary, so that a sum of them is too

def make(n_layer=2, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=TOK.n_vocab, block_size=64, n_layer=n_layer, n_head=2, n_embd=32)).eval()

MODELS = make(), make(1, 1)
IDS = [TOK.eot, *TOK.encode("the cat")], [TOK.eot, *TOK.encode("狗")]
LONG = SampleConfig(max_tokens=50, min_tokens=50)
KNOBS = dict(sampled=SampleConfig(max_tokens=40, seed=7), sure=SampleConfig(temperature=0, max_tokens=40, repetition_penalty=1.3),
             stops=SampleConfig(max_tokens=40, stop=("at", "猫"), top_k=20), slides=SampleConfig(max_tokens=80, overflow="slide"),
             told=SampleConfig(max_tokens=20, logprobs=3), searched=BeamConfig(beams=3, max_tokens=20),
             apart=BeamConfig(beams=4, groups=2, diversity=.5, max_tokens=20, no_repeat_ngram=3))

def alone(part):
    if isinstance(part.cfg, BeamConfig): return beam(part.model, part.tok, [part.ids], part.cfg)[0][0]
    return complete(part.model, part.tok, [part.ids], part.cfg)[0]

class Seen:
    "What a job has told, in order."
    def __init__(self): self.calls = []
    def show(self, k, text, tokens, seconds): self.calls.append(("show", k, text, tokens, seconds))
    def done(self, k, o, seconds): self.calls.append(("done", k, o, seconds))
    def failed(self, k, e): self.calls.append(("failed", k, e))
    def of(self, kind, k): return [o for o in self.calls if o[0]==kind and o[1]==k]
    def job(self, parts, **more): return Job(parts, more.pop("show", self.show), self.done, self.failed, **more)

def run(parts, **more):
    seen = Seen()
    job = seen.job(parts, **more).start()
    job.thread.join()
    assert not job.left and not job.running
    for k in range(len(parts)): assert [o[0] for o in seen.calls if o[1]==k and o[0]!="show"] in (["done"], ["failed"])
    return seen

@pytest.mark.parametrize("a", KNOBS)
@pytest.mark.parametrize("b", ("sampled", "searched"))
def test_two_side_by_side_say_what_each_says_alone(a, b):
    parts = [Part(MODELS[0], TOK, IDS[0], KNOBS[a]), Part(MODELS[1], TOK, IDS[1], KNOBS[b]), Part(MODELS[0], TOK, IDS[1], KNOBS[a])]
    seen = run(parts, every=0)
    for k, part in enumerate(parts):
        (_, _, o, seconds), shows = seen.of("done", k)[0], seen.of("show", k)
        assert o==alone(part) and shows[-1][2:4]==(o.text, len(o.ids)) and shows[-1][4]==seconds
        assert max(i for i, c in enumerate(seen.calls) if c in shows)<seen.calls.index(seen.of("done", k)[0])
    order = [c[1] for c in seen.calls if c[0]=="show"]
    short = min(len(seen.of("show", k)) for k in range(3))
    assert order[:3*short]==[0, 1, 2]*short # a token of each in turn: all of them stream

def test_another_seed_is_another_text():
    "The control of the one above: it can fail."
    part = Part(MODELS[0], TOK, IDS[0], KNOBS["sampled"])
    assert run([part]).of("done", 0)[0][2]!=alone(replace(part, cfg=replace(part.cfg, seed=8)))

# ---- how often ---------------------------------------------------------------------------------------------------------

def play(make, seed):
    "A throttle on a clock of its own: what was shown and when, and the last state of each part."
    r, now, shown, last = random.Random(seed), [0.], [], {}
    def wait(seconds): now[0] += seconds
    t = make(lambda k, n: shown.append((now[0], k, n)), EVERY, lambda: now[0], wait)
    for n in range(400):
        wait(r.choice((0, 1, 4, 30, 300))/1024)
        t.push(k := r.randrange(3), n)
        last[k] = n
    for k in last: t.last(k)
    return shown, last

def fair(shown, last):
    "At most one show in EVERY seconds, whoever is shown; the last state of each is; nothing twice or backwards."
    assert all(b[0]-a[0]>=EVERY for a, b in zip(shown, shown[1:], strict=False)), "too often"
    for k, n in last.items():
        mine = [o for _, who, o in shown if who==k]
        assert mine[-1]==n, "the last is lost"
        assert mine==sorted(set(mine)), "old news"
    assert len(shown)>60, "too rarely"

class Drops(Throttle):
    def last(self, k): pass
class EachItsOwn:
    def __init__(self, *a): self.a, self.own = a, {}
    def push(self, k, *state): self.own.setdefault(k, Throttle(*self.a)).push(k, *state)
    def last(self, k): self.own[k].last(k)
class AtOnce(Throttle):
    def last(self, k):
        if k in self.waiting: self._show(k)
class Oldest(Throttle):
    def push(self, k, *state): super().push(k, *self.waiting.get(k, state))

@pytest.mark.parametrize("seed", range(5))
def test_at_most_so_often_and_the_last_always(seed): fair(*play(Throttle, seed))

@pytest.mark.parametrize("wrong,says", [(Drops, "lost"), (EachItsOwn, "often"), (AtOnce, "often"), (Oldest, "lost")])
def test_wrong_throttles_are_noticed(wrong, says):
    with pytest.raises(AssertionError, match=says):
        for seed in range(5): fair(*play(wrong, seed))

@pytest.mark.parametrize("token", (1/1024, 1/128, 1/4))
def test_twenty_shows_a_second_of_a_whole_job(token):
    now, at = [0.], []
    def wait(seconds): now[0] += seconds
    parts = [Part(m, TOK, IDS[0], LONG) for m in MODELS]
    hooks = [m.lm_head.register_forward_hook(lambda *_: wait(token)) for m in MODELS]
    try: seen = run(parts, show=lambda *o: at.append((now[0], *o)), clock=lambda: now[0], sleep=wait)
    finally: [h.remove() for h in hooks]
    assert all(sum(t<=u<t+1 for u, *_ in at)<=20 for t, *_ in at)
    for k in (0, 1):
        o, seconds = seen.of("done", k)[0][2:]
        assert [s[2:] for s in at if s[1]==k][-1]==(o.text, 50, seconds) and math.isclose(seconds, 50*token) # own time, not the neighbour's
    if token==1/4: assert len(at)==100 # slow models: every token is shown

def test_a_slow_page_slows_nothing_down():
    "A show that takes half a second comes once in half a second and a bit: the pause is counted from its end."
    now, shows = [0.], []
    def wait(seconds): now[0] += seconds
    def show(k, n): wait(.5); shows.append(n)
    t = Throttle(show, .05, lambda: now[0], wait)
    for n in range(100): t.push(0, n); wait(.01)
    assert len(shows)<=100//5

# ---- stopping ----------------------------------------------------------------------------------------------------------

class Steps:
    "Counts the tokens that some models make, and can hold one of them."
    def __init__(self, *models):
        self.n, self.at_work, self.together, self.hold, self.reached = 0, 0, 0, None, threading.Event()
        self.go_on = threading.Event()
        self.handles = [o for m in (o.lm_head for o in models)
                        for o in (m.register_forward_pre_hook(self.begin), m.register_forward_hook(self.end))]
    def begin(self, *_):
        self.n += 1
        self.at_work += 1
        self.together = max(self.together, self.at_work)
        if self.n==self.hold: self.reached.set(); assert self.go_on.wait(60)
    def end(self, *_): self.at_work -= 1
    def __enter__(self): return self
    def __exit__(self, *_): [h.remove() for h in self.handles]

ON = SampleConfig(max_tokens=10**5, min_tokens=10**5, overflow="slide")
ENDLESS = dict(sampled=ON, searched=BeamConfig(beams=3, max_tokens=55, min_tokens=55),
               silent=replace(ON, logit_bias=(f"{TOK.encode('猫')[0]}:99",))) # the first third of a letter, again and again

def held_stop(cfg, parts=1, job_of=Seen.job):
    "Stop while the sixth token is being made; how many were made in all."
    seen, models = Seen(), [make(seed=k) for k in range(parts)]
    with Steps(*models) as steps:
        steps.hold = 6
        job = job_of(seen, [Part(m, TOK, IDS[0], cfg) for m in models]).start()
        assert steps.reached.wait(60)
        job.stop()
        steps.go_on.set()
        job.thread.join()
        return steps.n, seen

@pytest.mark.parametrize("parts", (1, 2))
@pytest.mark.parametrize("name", ENDLESS)
def test_stop_is_obeyed_within_a_token(name, parts):
    n, seen = held_stop(ENDLESS[name], parts)
    assert n==6 # the one that was being made is the last, also where another part would be next
    for k in range(parts):
        o = seen.of("done", k)[0][2]
        assert o.reason=="stopped" and len(o.ids)==6//parts
        if o.text: assert seen.of("show", k)[-1][2]==o.text

@pytest.mark.parametrize("name", ENDLESS)
def test_stop_from_the_page_itself(name):
    seen, model = Seen(), make()
    with Steps(model) as steps:
        stop = lambda k, text, tokens, seconds: job.stop() if tokens==9 else None
        job = seen.job([Part(model, TOK, IDS[0], ENDLESS[name])], show=stop, every=0)
        job.start().thread.join()
        assert steps.n==9

def test_a_flag_that_is_looked_at_late_is_noticed():
    "The control: one that is looked at before every fourth token."
    class Late(Job):
        asked = 0
        def stopped(self): self.asked += 1; return self.asked%4==0 and super().stopped()
    late = lambda seen, parts: Late(parts, seen.show, seen.done, seen.failed)
    assert held_stop(ENDLESS["sampled"], job_of=late)[0]>6

def test_the_answer_so_far_is_kept_with_its_probabilities():
    n, seen = held_stop(replace(ENDLESS["sampled"], logprobs=4))
    o = seen.of("done", 0)[0][2]
    assert len(o.ids)==len(o.logprobs)==6 and all(len(best)==4 for _, best in o.logprobs)

def test_one_job_computes_at_a_time_and_waiting_ones_can_be_stopped():
    a, b, c = Seen(), Seen(), Seen()
    model = make()
    with Steps(model) as steps:
        steps.hold = 3
        first = a.job([Part(model, TOK, IDS[0], LONG)]).start()
        assert steps.reached.wait(60)
        second, third = (s.job([Part(model, TOK, IDS[0], LONG)]).start() for s in (b, c))
        second.close() # while the first one is held: it does not need its turn for that
        assert b.of("done", 0)[0][2].reason=="stopped" and b.of("done", 0)[0][2].ids==() and steps.n==3 and first.running
        steps.go_on.set()
        for job in (first, third): job.thread.join()
        assert steps.together==1 and steps.n==100
    assert a.of("done", 0)[0][2]==c.of("done", 0)[0][2]

# ---- errors and ends ---------------------------------------------------------------------------------------------------

def test_an_error_reaches_the_page_and_not_the_neighbour():
    bad = make()
    bad.transformer.ln_f.weight.data.fill_(math.nan)
    good = Part(MODELS[1], TOK, IDS[1], LONG)
    parts = [replace(good, model=bad), good, replace(good, ids=[1]*65), replace(good, cfg=SampleConfig(n=2)), replace(good, model=None)]
    seen = run(parts)
    errors = [seen.of("failed", k)[0][2] for k in (0, 2, 3, 4)]
    assert [type(e) for e in errors[:2]]==[CheckpointError, ShapeError] and all(isinstance(e, NanoError) and e.fix for e in errors)
    assert "AttributeError" in errors[3].what and isinstance(errors[3].__cause__, AttributeError)
    assert seen.of("done", 1)[0][2]==alone(good)
    assert not bad.training and live._BUSY==[]

def test_a_page_that_breaks_ends_the_job():
    def show(k, *rest): raise RuntimeError("the page is gone")
    model = make()
    with Steps(model) as steps: seen = run([Part(model, TOK, IDS[0], LONG)]*2, show=show)
    assert all("the page is gone" in seen.of("failed", k)[0][2].what for k in (0, 1)) and steps.n==1
    assert run([Part(model, TOK, IDS[0], LONG)]).of("done", 0) # the next job has its turn

def test_the_memory_is_full():
    assert "memory is full" in live.as_error(MemoryError()).what
    assert "memory is full" in live.as_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")).what
    assert "memory" not in live.as_error(KeyError("x")).what

def test_no_thread_and_no_mode_is_left():
    before = set(threading.enumerate())
    model = make().train()
    for cfg in (LONG, BeamConfig(max_tokens=20)):
        job = Seen().job([Part(model, TOK, IDS[0], cfg)]*2).start()
        job.close()
        Seen().job([Part(model, TOK, IDS[0], cfg)]).close() # never begun
        assert model.training and not job.running
    Task(lambda stopped: None, print, print).start().close()
    assert set(threading.enumerate())==before

@pytest.mark.parametrize("how", ("ends", "is stopped", "fails", "breaks"))
def test_a_job_that_is_over_holds_nothing(how):
    "Whoever still holds the job, or was told by it, must not hold its model: a shelf could never let it go."
    seen, model = Seen(), make()
    gone = weakref.ref(model)
    ids = dict(fails=[1]*65, breaks=["the"]).get(how, IDS[0])
    seen.held = job = seen.job([Part(model, TOK, ids, LONG)]).start() # the page holds the job, and the job the page
    del model
    if how=="is stopped": job.stop()
    job.thread.join()
    assert seen.calls and gone() is None # at once, without looking for circles

def test_work_alone_waits_for_a_job():
    seen, model, order = Seen(), make(), []
    with Steps(model) as steps:
        steps.hold = 3
        job = seen.job([Part(model, TOK, IDS[0], LONG)]).start()
        assert steps.reached.wait(60)
        free = Task(lambda stopped: order.append("free"), print, print).start()
        alone = Task(lambda stopped: order.append(steps.n), lambda o: None, print, alone=True).start()
        free.thread.join()
        assert order==["free"] and alone.running
        steps.go_on.set()
        for o in (job, alone): o.thread.join()
    assert order==["free", 50]

def test_a_job_may_close_itself_and_begin_the_next():
    seen, model, jobs = Seen(), make(), []
    def again(k, o, seconds): jobs[0].close(); jobs.append(seen.job([Part(model, TOK, IDS[0], LONG)]).start())
    jobs.append(Job([Part(model, TOK, IDS[0], LONG)], seen.show, again, seen.failed).start())
    jobs[0].thread.join()
    jobs[1].thread.join()
    assert seen.of("done", 0)

EXIT = """
import test_live as t, threading
model, shown = t.make(), threading.Event()
parts = [t.Part(model, t.TOK, t.IDS[0], t.ENDLESS["sampled"])]*2
t.Job(parts, lambda *o: shown.set(), lambda k,o,s: print(k, o.reason), print).start()
t.Job([t.Part(model, t.TOK, t.IDS[0], t.LONG)], print, lambda k,o,s: print("waiting", o.reason, len(o.ids)), print).start()
shown.wait(60)
"""

def test_a_program_that_leaves_is_not_held_up(root, env):
    "Nobody has stopped the jobs; the program ends all the same, and each of them says so."
    env |= dict(PYTHONPATH=f"{root}:{root/'tests'}", OMP_NUM_THREADS="1")
    r = subprocess.run([sys.executable, "-c", EXIT], env=env, capture_output=True, text=True, timeout=200)
    assert r.returncode==0 and sorted(r.stdout.splitlines())==["0 stopped", "1 stopped", "waiting stopped 0"], r.stdout+r.stderr
