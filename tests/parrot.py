"Models that say what a test wants them to say, made in milliseconds: whatever is asked, the place in the text decides the next token."
import torch

from nanogpt.checkpoint import save_model
from nanogpt.core import write_json
from nanogpt.model import GPT, GPTConfig
from nanogpt.settings import settings
from nanogpt.tokenizer import Tokenizer

def tokenizer(texts, n_vocab=700): return Tokenizer.train(texts, n_vocab)

def parrot(tok, script, block=4096, layers=1):
    "A GPT that goes round and round a script, a list of ids; more layers only make it slower."
    cfg = GPTConfig(vocab_size=tok.n_vocab, block_size=block, n_layer=layers, n_head=2, n_embd=64, position="learned", tied=False)
    model, dice = GPT(cfg).eval(), torch.Generator().manual_seed(0)
    code = torch.randn(tok.n_vocab, 64, generator=dice)
    code = (code-code.mean(-1, keepdim=True))/code.std(-1, keepdim=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name: p.zero_()                                       # neither attention nor the small network says anything
        model.transformer.wte.weight.zero_()                                     # nor do the words …
        model.transformer.wpe.weight.copy_(code[[script[(p+1)%len(script)] for p in range(block)]]) # … only the place does
        model.lm_head.weight.copy_(code)
    return model

def save_parrot(folder, tok, text, base=None, end=True, times=1, **more):
    "A run whose model says this text, `times` times and then the end, if there is one; tuned from `base`, if there is one."
    script = tok.encode(text)*times+[tok.specials["<|end|>"]]*end
    model = parrot(tok, script, **more)
    made = dict(init=str(base)) if base else {}
    write_json(folder/"config.json", dict(kind="SFTConfig" if base else "TrainConfig", settings=dict(out=str(folder), **made), model=settings(model.cfg)))
    (folder/"log.jsonl").write_text("")
    save_model(folder/"model", model, tok)
    return folder
