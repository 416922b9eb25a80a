"What happens to a run from outside: signals, kill -9 at any moment, damaged files, a full disk. Going on must equal never having stopped."
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from mini import KEYS, PRETRAIN, SFT, copy, end, here, log, numbers, one_message, reason, run, start, steps_done, tree, wait

def pretrain(shards, out, *more): return (*PRETRAIN, "--data", shards, "--out", out, *more)

def checkpoints(folder): return sorted(p.name for p in (folder/"ckpt").glob("step-????????"))

def same(folder, whole):
    "The run ended, and its log, its samples and its weights are those of the run that was never stopped."
    assert reason(folder)=="done"
    assert [o["step"] for o in log(folder, "step")]==[o["step"] for o in log(whole, "step")], "every step is logged once"
    for got, want in zip(numbers(folder), numbers(whole), strict=True): assert got==want
    assert (folder/"model/model.safetensors").read_bytes()==(whole/"model/model.safetensors").read_bytes()

@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory):
    "A pretraining that was asked to stop in the middle, and what it said."
    out = tmp_path_factory.mktemp("stopped")/"run"
    p = start(*pretrain(shards, out))
    assert wait(p, lambda: steps_done(out)>=12)
    p.send_signal(signal.SIGTERM)
    return out, end(p)

# ---- SIGTERM ---------------------------------------------------------------------------------------------------------

def test_the_log_holds_every_number(whole):
    "A run logs each step with loss, rate, gradient and the ids it saw, and dropout, evaluation and samples are part of the test."
    rows = log(whole, "step")
    assert [o["step"] for o in rows]==list(range(1, 31)) and all(set(KEYS) <= set(o) for o in rows)
    assert all(float.fromhex(o["loss_hex"])==o["loss"] for o in rows) and len({o["ids_sha"] for o in rows})==30
    assert len(log(whole, "eval"))==8 and len(log(whole, "sample"))==8

def test_sigterm_saves_and_says_so(stopped):
    "SIGTERM ends the step, saves it, and the exit file says why."
    out, (stdout, stderr) = stopped
    n = steps_done(out)
    assert 12<=n<30 and reason(out)=="preempted" and checkpoints(out)[-1]==f"step-{n:08d}" and not (out/"model").exists()
    assert "stopping after this step and saving" in stderr and "goes on from there" in stderr and f"preempted after {n} steps" in stdout
    assert here("ckpt", "verify", out)[0]==0

def test_resumed_equals_never_stopped(stopped, whole, shards, tmp_path):
    "After SIGTERM, --resume auto goes on with the same losses, rates, gradients, ids and weights, bit for bit."
    out = copy(stopped[0], tmp_path/"run")
    err = run(*pretrain(shards, out, "--resume", "auto")).stderr
    assert f"going on after step {steps_done(stopped[0])} of 30" in err and "not bit-equal" not in err
    same(out, whole)

def test_control_a_resume_that_forgets_the_dice(stopped, whole, shards, tmp_path):
    "The comparison can fail: without the state of the random generators the rest differs."
    out = copy(stopped[0], tmp_path/"run")
    run(*pretrain(shards, out), before="import nanogpt.checkpoint as ck\nck.set_rng_state = lambda state: None")
    n, (got, want) = steps_done(stopped[0]), (numbers(o)[0] for o in (out, whole))
    assert got[:n]==want[:n] and len(got)==len(want)
    assert [g[1] for g in got[n:]]!=[w[1] for w in want[n:]]

def test_a_change_is_not_silent(stopped, shards, tmp_path):
    "Going on with another setting is allowed, and the log says that the rest is not what it would have been."
    out = copy(stopped[0], tmp_path/"run")
    assert "not bit-equal to a run never stopped: lr" in run(*pretrain(shards, out, "--lr", "0.002")).stderr
    assert any("not bit-equal" in o["text"] for o in log(out, "note"))

def kept(folder):
    "Every file of a run; without what a machine tells of its energy, which is used by doing nothing too."
    files = tree(folder)
    return files | {"log.jsonl": [o for o in files["log.jsonl"].splitlines() if b'"kind": "energy"' not in o]}

def test_a_finished_run_stays_as_it_is(whole, shards, tmp_path):
    "The same command on a finished run does nothing and says so; with other settings it names them. Only more steps go on."
    out = copy(whole, tmp_path/"run")
    before = kept(out)
    done = run(*pretrain(shards, out))
    assert "is finished, after 30 steps: nothing is done\n" in done.stderr and "done after 30 steps" in done.stdout
    assert kept(out)==before
    err = run(*pretrain(shards, out, "--lr", "0.002", "--eval_every", 7, "--steps", 20)).stderr
    assert all(o in err for o in ("these settings change nothing", "lr=0.002 (then 0.001)", "eval_every=7 (then 4)", "steps=20 (then 30)"))
    assert kept(out)==before
    assert "is finished" not in run(*pretrain(shards, out, "--steps", 32)).stderr
    assert numbers(out)[0][:30]==numbers(whole)[0] and steps_done(out)==32

def test_a_finished_run_that_lost_its_model_gets_it_again(whole, shards, tmp_path):
    "What is missing of a finished run is not `nothing to do`: its model is written again, with the same weights."
    out = copy(whole, tmp_path/"run")
    shutil.rmtree(out/"model")
    run(*pretrain(shards, out))
    assert tree(out/"model")==tree(whole/"model")

def test_sft_resumed_equals_never_stopped(whole, tuned, tmp_path):
    "Instruction tuning is the same loop: stopped by SIGTERM and started again, it ends the same."
    words, out = (*SFT, "--init", whole, "--out", tmp_path/"run"), tmp_path/"run"
    p = start(*words)
    assert wait(p, lambda: steps_done(out)>=7)
    p.send_signal(signal.SIGTERM)
    end(p)
    assert reason(out)=="preempted" and 7<=steps_done(out)<20
    run(*words, "--resume", "auto")
    same(out, tuned)

def test_a_second_sigterm_leaves_at_once(shards, tmp_path):
    "Who cannot wait for the step and the saving says it twice."
    out = tmp_path/"run"
    p = start(*pretrain(shards, out, "--batch_tokens", 2*32*20_000)) # one step of minutes
    assert wait(p, lambda: (out/"tokenizer.json").exists())
    time.sleep(1) # from the last file of the beginning to the first step, in which signals are taken
    p.send_signal(signal.SIGTERM)
    for line in p.stderr:
        if "once more leaves at once" in line: break
    p.send_signal(signal.SIGTERM)
    end(p, 128+signal.SIGTERM)
    assert not log(out, "step") and not (out/"exit.json").exists() and not checkpoints(out)

def test_ctrl_c_is_heard_too(shards, tmp_path):
    "SIGINT does what SIGTERM does: one more step, saved, the reason written, and gone within ten seconds."
    out = tmp_path/"run"
    p = start(*pretrain(shards, out, "--steps", 100_000, "--eval_every", 0, "--save_every", 0))
    assert wait(p, lambda: steps_done(out)>=5)
    asked = time.time()
    p.send_signal(signal.SIGINT)
    end(p)
    n = steps_done(out)
    assert time.time()-asked<10 and reason(out)=="preempted" and checkpoints(out)==[f"step-{n:08d}"] and len(log(out, "step"))==n

# ---- SIGKILL ---------------------------------------------------------------------------------------------------------

SLOW = "import os, time\ndef slow(f, old=os.fsync): time.sleep(.02); old(f)\nos.fsync = slow" # so that a save can be met in its middle

def parts(folder, pid=""): return list((folder/"ckpt").glob(f".*.{pid}.part" if pid else ".*.part"))

def kill_at(moments, shards, out, dice, *more):
    "Start the run again and again and kill it, each time at another moment; how many saves were met in their middle."
    halves = 0
    for kind, n in moments:
        p = start(*pretrain(shards, out, *more), before=SLOW)
        assert wait(p, lambda p=p, kind=kind, n=n: steps_done(out)>=n and (kind=="step" or parts(out, p.pid)))
        time.sleep(dice.random()*(.02 if kind=="step" else .1))
        p.kill()
        p.communicate()
        assert p.returncode==-signal.SIGKILL
        halves += len(parts(out, p.pid))
        for name in checkpoints(out): assert here("ckpt", "verify", out/"ckpt"/name)[0]==0, (kind, n, name)
    return halves

@pytest.mark.parametrize("more", [(), ("--save_async",)], ids=["saves between steps", "saves beside them"])
def test_killed_at_any_moment(more, whole, shards, tmp_path):
    "Killed six times, in the middle of steps, samples and saves, the run still ends as if nothing had happened."
    dice, out = random.Random(2), tmp_path/"run"
    moments = [("step", 3), ("saving", 5), ("step", 8), ("saving", 10), ("step", dice.randint(12, 18)), ("saving", 20)]
    assert kill_at(moments, shards, out, dice, *more)>=1, "no save was met in its middle: this test tests less than it says"
    run(*pretrain(shards, out, *more))
    same(out, whole)

@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_twenty_five_times(whole, shards, tmp_path):
    "Whatever the dice say: killed at 25 random moments, some of them before anything new was saved, it ends the same."
    dice, out = random.Random(7), tmp_path/"run"
    def moments():
        for _ in range(25):
            saved = int(checkpoints(out)[-1][5:]) if checkpoints(out) else 0
            yield dice.choice([("step", min(29, saved+dice.randint(1, 6))), ("saving", min(25, saved+5))])
    assert kill_at(moments(), shards, out, dice)>=3
    run(*pretrain(shards, out))
    same(out, whole)

def test_what_a_kill_leaves_is_never_used(stopped, whole, shards, tmp_path):
    "Half-written folders and a torn last line of the log change nothing."
    out = copy(stopped[0], tmp_path/"run")
    for name in (".step-00000099.123.part", "step-00000099.part", ".step-00000099.old"):
        shutil.copytree(out/"ckpt"/checkpoints(out)[-1], out/"ckpt"/name)
        (out/"ckpt"/name/"MANIFEST.json").unlink()
    for name in (".model.123.part", ".model.old"): (out/name).mkdir(); (out/name/"model.safetensors").write_bytes(b"half")
    with open(out/"log.jsonl", "a", encoding="utf-8") as f: f.write('{"kind": "step", "step": 29, "loss')
    run(*pretrain(shards, out))
    same(out, whole)

def test_killed_while_the_model_is_replaced(whole, shards, tmp_path):
    "A crash between moving the old model away and deleting it does not block the folder."
    out = copy(whole, tmp_path/"run")
    shutil.copytree(out/"model", out/".model.old")
    run(*pretrain(shards, out))
    same(out, whole)

def test_killed_while_data_is_prepared(tmp_path, shards):
    "A crash between the files of the data does not block the run: they are made again."
    out = tmp_path/"run"
    (out/"data").mkdir(parents=True)
    for name in ("tokenizer.json", "val.bin"): shutil.copy(shards/name, out/"data") # train.bin, the one that is asked for, comes last
    own = ("--corpus", "tales", "--corpus_tokens", 3000, "--tokenizer", shards)
    run(*PRETRAIN, *own, "--out", out, "--steps", 2)
    assert reason(out)=="done"

def test_data_is_named_last(tmp_path, shards):
    "The file whose presence means that the data is whole is the last one to appear."
    spy = "import os\nold=os.replace\ndef replace(a, b, old=old): print(b); old(a, b)\nos.replace=replace"
    out = run("data", "--corpus", "tales", "--tokens", 2000, "--tokenizer", shards, "--out", tmp_path/"d", before=spy).stdout
    names = [o.rpartition("/")[2] for o in out.splitlines() if o.startswith(f"{tmp_path/'d'}/")]
    assert sorted(names)==["tokenizer.json", "train.bin", "val.bin"] and names[-1]=="train.bin"

# ---- damage ----------------------------------------------------------------------------------------------------------

def flip(folder):
    data = bytearray((folder/"model.safetensors").read_bytes())
    data[len(data)//2] ^= 1
    (folder/"model.safetensors").write_bytes(data)

def truncate(folder): os.truncate(folder/"optimizer.safetensors", 1000)

def no_manifest(folder): (folder/"MANIFEST.json").unlink()

DAMAGE = {flip: "model.safetensors has changed", truncate: "optimizer.safetensors has 1000 bytes", no_manifest: "holds no whole checkpoint"}

@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_set_aside(damage, stopped, whole, shards, tmp_path):
    "One flipped bit is enough: the checkpoint is named and set aside, the one before is used, the end is the same."
    out = copy(stopped[0], tmp_path/"run")
    *_, before, newest = checkpoints(out)
    damage(out/"ckpt"/newest)
    assert here("ckpt", "verify", out)[0]==3 and here("ckpt", "latest", out)==(0, f"{out/'ckpt'/before}\n")
    err = run(*pretrain(shards, out)).stderr
    assert f"set aside {newest}" in err and DAMAGE[damage] in err and f"going on after step {int(before[5:])} of 30" in err
    assert (out/"ckpt"/f"{newest}.damaged").is_dir()
    same(out, whole)

def test_damaged_twice(stopped, whole, shards, tmp_path):
    "A checkpoint that is damaged again, beside its older damaged twin, is set aside as well."
    out = copy(stopped[0], tmp_path/"run")
    newest = out/"ckpt"/checkpoints(out)[-1]
    shutil.copytree(newest, newest.with_name(newest.name+".damaged"))
    flip(newest)
    run(*pretrain(shards, out))
    same(out, whole)

def test_no_checkpoint_is_left(stopped, shards, tmp_path):
    "Where every checkpoint is damaged, each is named, and a script is told by exit code 3."
    out = copy(stopped[0], tmp_path/"run")
    for name in checkpoints(out): flip(out/"ckpt"/name)
    code, text = here("ckpt", "list", out)
    assert code==3 and text.count("has changed")==len(checkpoints(out)) and here("ckpt", "latest", out)==(3, "")
    one_message(run("generate", "--model", out, "--prompt", "x", code=2).stderr, "no model in")

# ---- refused ---------------------------------------------------------------------------------------------------------

def test_a_checkpoint_of_another_model_is_refused(stopped, shards, tmp_path):
    "Other sizes in the same folder are refused with the value that differs; not a byte in the folder changes."
    out = copy(stopped[0], tmp_path/"run")
    had = tree(out)
    done = run(*pretrain(shards, out, "--n_embd", 32), code=2)
    one_message(done.stderr, "is of another model", "n_embd=16")
    assert done.stdout=="" and tree(out)==had

def test_other_data_is_refused(stopped, tmp_path, shards):
    "A checkpoint goes on with the data it was made with, or not at all."
    out, other = copy(stopped[0], tmp_path/"run"), tmp_path/"d"
    run("data", "--corpus", "tales", "--tokens", 3000, "--seed", 5, "--tokenizer", shards, "--out", other)
    had = tree(out)
    one_message(run(*pretrain(other, out), code=2).stderr, "of another order")
    assert tree(out)==had

def test_never_leaves_old_checkpoints_alone(shards, tmp_path):
    "--resume never on a folder that holds a run is refused before anything in it is touched."
    out = tmp_path/"run"
    own = (*PRETRAIN, "--out", out, "--corpus", "tales", "--corpus_tokens", 3000, "--tokenizer", shards, "--steps", 2)
    run(*own)
    had = tree(out)
    one_message(run(*own, "--resume", "never", "--seed", 7, code=2).stderr, "holds checkpoints", "--out")
    assert tree(out)==had

# ---- a full disk -----------------------------------------------------------------------------------------------------

@pytest.fixture
def disk(tmp_path):
    "Makes a small disk of its own at a size in bytes; it is gone after the test."
    made = []
    def make(size):
        where = tmp_path/f"disk{len(made)}"
        where.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True, text=True)
        if done.returncode: pytest.skip(f"a small disk cannot be mounted here (root is needed): {done.stderr.strip()}")
        made.append(where)
        return where
    if os.name!="posix" or os.geteuid() or not shutil.which("mount"): pytest.skip("only root can mount a small disk to fill")
    yield make
    for where in made: subprocess.run(["umount", "-l", where], check=True)

def size_of(folder): return sum(-(-p.stat().st_size//4096)*4096 for p in folder.rglob("*") if p.is_file())

def left_over(folder): return [p for p in folder.rglob("*") if p.name.endswith(".part")]

def test_the_disk_is_full_while_saving(whole, shards, disk):
    "The third checkpoint does not fit: one message that names the disk, the earlier two stay whole; with space again, the run goes on."
    one = size_of(whole/"ckpt"/checkpoints(whole)[-1])
    where = disk(int(2.5*one)+40_000)
    out = where/"run"
    done = run(*pretrain(shards, out), code=2)
    text = one_message(done.stderr, "step-00000015").lower()
    assert "disk" in text or "no space" in text or "space left" in text
    assert reason(out)=="disk_full" and checkpoints(out)==["step-00000005", "step-00000010"] and not left_over(out)
    for name in checkpoints(out): assert here("ckpt", "verify", out/"ckpt"/name)[0]==0
    subprocess.run(["mount", "-o", "remount,size=20m", where], check=True)
    run(*pretrain(shards, out))
    same(out, whole)

def test_the_disk_is_full_while_logging(shards, disk):
    "Somebody else fills the disk: the log's next line is one message and exit 2 too."
    where = disk(1_000_000)
    p = start(*pretrain(shards, where/"run", "--steps", 400, "--save_every", 0, "--eval_every", 2))
    assert wait(p, lambda: steps_done(where/"run")>=3)
    with pytest.raises(OSError), open(where/"filler", "wb", buffering=0) as f:
        while True:
            if not f.write(b"0"*4096): raise OSError("full")
    _, err = end(p, 2)
    text = one_message(err).lower()
    assert "disk" in text or "space" in text
    assert not left_over(where) and not checkpoints(where/"run")

def test_data_for_which_there_is_no_room(shards, disk):
    "Preparing data on a full disk leaves nothing behind and says so."
    where = disk(40_000)
    done = run("data", "--corpus", "tales", "--tokens", 60_000, "--tokenizer", shards, "--out", where/"d", code=2)
    one_message(done.stderr, "could not be written")
    assert not tree(where)

# ---- a read-only disk ------------------------------------------------------------------------------------------------

LOCKS = """
import subprocess
from nanogpt import run as runs
old = runs.save_run
def save(t):
    if t.done==15:
        for words in {commands!r}: subprocess.run(["mount", *words], check=True)
    old(t)
runs.save_run = save
"""

def test_the_disk_becomes_read_only(whole, shards, disk):
    "At the third save the disk may only be read: the reason is on stderr, the earlier two are whole; writable again, the run goes on."
    where = disk("20m")
    out = where/"run"
    done = run(*pretrain(shards, out), code=2, before=LOCKS.format(commands=[["-o", "remount,ro", str(where)]]))
    one_message(done.stderr, "step-00000015 could not be saved: Read-only file system", "earlier checkpoints are untouched")
    assert f"{out}/exit.json could not be written either" in done.stderr and not (out/"exit.json").exists()
    for name in ("step-00000005", "step-00000010"): assert here("ckpt", "verify", out/"ckpt"/name)[0]==0
    assert checkpoints(out)==["step-00000005", "step-00000010"] and not left_over(out) and steps_done(out)==15
    one_message(run(*pretrain(shards, out), code=2).stderr, "Read-only file system") # and who tries again is told again
    subprocess.run(["mount", "-o", "remount,rw", where], check=True)
    run(*pretrain(shards, out))
    same(out, whole)

def test_the_checkpoints_become_read_only(whole, shards, disk):
    "Only the folder of the checkpoints is locked: then exit.json can be written, and it holds the reason."
    where = disk("20m")
    out = where/"run"
    folder = str(out/"ckpt")
    lock = LOCKS.format(commands=[["--bind", folder, folder], ["-o", "remount,ro,bind", folder]])
    try:
        one_message(run(*pretrain(shards, out), code=2, before=lock).stderr, "step-00000015 could not be saved: Read-only file system")
        ended = json.loads((out/"exit.json").read_text())
        assert ended["reason"]=="error" and ended["step"]==15 and "Read-only file system" in ended["error"]
        assert checkpoints(out)==["step-00000005", "step-00000010"] and not left_over(out)
        for name in checkpoints(out): assert here("ckpt", "verify", out/"ckpt"/name)[0]==0
    finally: subprocess.run(["umount", "-l", folder], capture_output=True)
    run(*pretrain(shards, out))
    same(out, whole)
