"Quantised models from outside: a folder of whole numbers goes through the verbs, and what cannot be done with it is refused."
import json
import sys
from pathlib import Path

import pytest
import torch
from mini import one_message

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
                        (("pretrain", "--init", small, "--out", tmp_path/"y", "--corpus", "tales", "--tokenizer", small,
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
