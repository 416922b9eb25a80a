"Quantised models from outside: a folder of whole numbers goes through the verbs, and what cannot be done with it is refused."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mini import environment, one_message

from nanogpt.checkpoint import load_model, save_model
from nanogpt.core import CheckpointError
from nanogpt.model import GPT, GPTConfig
from nanogpt.quant import KINDS
from nanogpt.tokenizer import Tokenizer

@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    "A run as a tuning leaves it: the record that says so, and a model nobody trained."
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("quant")/"run"
    tok = Tokenizer.train(["the cat sat on the mat. the dog ran to the cat."]*3, 280)
    cfg = GPTConfig(vocab_size=tok.n_vocab, block_size=64, n_layer=2, n_head=2, n_embd=64, init_std=.1)
    save_model(home/"model", GPT(cfg), tok)
    (home/"config.json").write_text('{"kind": "SFTConfig"}')
    return home

@pytest.mark.parametrize("kind", KINDS)
def test_through_the_verbs(kind, run_of, tmp_path, call):
    "quantize says what it did; generate and eval take the folder, generate asks in chat form as the run did."
    code, out, err = call("quantize", "--model", run_of, "--out", tmp_path/"q", "--kind", kind, "--json")
    told = json.loads(out)
    assert code==0 and told["kind"]==kind, err
    assert told["after_bytes"]<told["before_bytes"]*(.2 if kind=="int4" else .33) and told["ratio"]>3 and 0<=told["nats"]<.5
    code, out, err = call("generate", "--model", tmp_path/"q", "--prompt", "the cat", "--max_tokens", 5, "--json")
    assert code==0 and json.loads(out)["chat"] is True, err
    code, out, err = call("eval", "--model", tmp_path/"q", "--tasks", "text", "--limit", 1, "--json")
    assert code==0 and json.loads(out.splitlines()[0])["n"]>0, err

def test_what_is_refused(run_of, tmp_path, call):
    "One message with a fix, exit 2, and no folder is made."
    small = tmp_path/"q"
    assert call("quantize", "--model", run_of, "--out", small)[0]==0
    for words, says in ((("quantize", "--model", run_of, "--out", small), "is not empty"),
                        (("quantize", "--model", small, "--out", tmp_path/"x"), "the model is int8 already"),
                        (("quantize", "--model", run_of, "--out", tmp_path/"x", "--kind", "int4", "--group", 48), "does not divide"),
                        (("quantize", "--model", run_of, "--out", tmp_path/"x", "--kind", "int5"), "int5"),
                        (("export", "--model", small, "--out", tmp_path/"x"), "weights of int8 have no place"),
                        (("sft", "--init", small, "--out", tmp_path/"x", "--corpus", "tales"), "cannot be trained"),
                        (("pretrain", "--init", small, "--out", tmp_path/"x", "--corpus", "tales", "--tokenizer", small,
                          "--corpus_tokens", 2000, "--seq_len", 32, "--batch_tokens", 64, "--micro_batch", 2), "cannot be trained")):
        code, out, err = call(*words)
        assert (code, out)==(2, ""), (words, err)
        assert says in one_message(err) and not (tmp_path/"x").exists()

def test_a_flipped_bit_is_found(run_of, tmp_path, call):
    assert call("quantize", "--model", run_of, "--out", tmp_path/"q", "--kind", "int4")[0]==0
    load_model(tmp_path/"q")
    data = bytearray((tmp_path/"q/model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path/"q/model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was saved"): load_model(tmp_path/"q")

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_weights_stay_in_the_file(run_of, tmp_path, call):
    "The tensors of a loaded model are the pages of its file: several processes share them."
    assert call("quantize", "--model", run_of, "--out", tmp_path/"q")[0]==0
    maps = lambda: Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(tmp_path/"q/model.safetensors") not in maps()
    model, _ = load_model(tmp_path/"q")
    line = next(o for o in maps().splitlines() if o.endswith(str(tmp_path/"q/model.safetensors")))
    low, high = (int(o, 16) for o in line.split()[0].split("-"))
    assert low<=model.lm_head.q.data_ptr()<high

def test_bench_quant(tuned, tmp_path, call):
    "All kinds of a tuned run: the losses are those of its own held-out rows, changes are told in pairs; a small copy is no place to begin."
    from nanogpt.shrink import ALL, shrink_text
    words = ("bench", "quant", "--model", tuned, "--limit", 3, "--tokens", 4, "--rounds", 1, "--group", 8)
    code, out, err = call(*words, "--json")
    rows = [json.loads(o) for o in out.splitlines()]
    assert code==0 and [r["kind"] for r in rows]==list(ALL), err
    assert rows[0]["loss_change"]==[0, 0, 0] and rows[0]["rows"]==3 and rows[0]["changes"]["tales endings"][0]==0
    last = [json.loads(o) for o in (tuned/"log.jsonl").read_text().splitlines() if '"val_loss"' in o][-1]["val_loss"]
    assert abs(rows[0]["loss"]-last)<.5                                                # three of the rows that the run was measured on
    for r in rows[1:]:
        assert r["file_bytes"]<rows[0]["file_bytes"] and r["loss_change"][1]<=r["loss_change"][0]<=r["loss_change"][2]
        assert abs(r["loss"]-rows[0]["loss"]-r["loss_change"][0])<1e-6
    code, out, err = call(*words)
    assert code==0 and len(out.splitlines())==len(shrink_text(rows).splitlines())==2+len(ALL)
    assert call("quantize", "--model", tuned, "--out", tmp_path/"q")[0]==0
    code, out, err = call("bench", "quant", "--model", tmp_path/"q")
    assert (code, out)==(2, "") and "weights of int8 already" in one_message(err)
    code, out, err = call("bench", "quant", "--model", tuned, "--tasks", "chess")
    assert (code, out)==(2, "") and "there are tales" in one_message(err)

@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    "A row of conversations may have nothing to learn: its product is empty, as nn.Linear's is."
    make, dtype = KINDS[kind]
    linear = make(torch.nn.Linear(64, 32), 32).to(dtype)
    for shape in ((0, 64), (2, 0, 64)): assert linear(torch.zeros(shape, dtype=dtype)).shape==(*shape[:-1], 32)

ANYWHERE = """
import torch, torch.nn as nn
from nanogpt.quant import Int8Linear
for width in (16, 24, 40, 72, 128, 192):
    for off in (0, 1, 8):
        m = Int8Linear(nn.Linear(width, 64).bfloat16())
        room = torch.zeros(64*width+64, dtype=torch.int8)
        at = (-room.data_ptr())%64+off
        m.q = room[at:at+64*width].view(64, width).copy_(m.q)
        for rows in range(1, 7):
            x = torch.randn(rows, width).bfloat16()
            got, want = m(x).float(), x.float()@m.weight.float().T+m.bias.float()
            assert (got-want).abs().max()<.02*want.abs().max(), (width, off, rows)
"""

def test_eight_bits_of_any_width_at_any_place():
    "A mapped file promises no alignment, and a model any width: no number of rows meets a kernel that reads beyond, or ends the process."
    done = subprocess.run([sys.executable, "-c", ANYWHERE], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode==0, (done.returncode, done.stderr[-400:])
