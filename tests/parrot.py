"Models that say what a test wants them to say, made in milliseconds: whatever is asked, the place in the text decides the next token."
import torch

from nanogpt.checkpoint import save_model
from nanogpt.core import write_json
from nanogpt.model import GPT, GPTConfig
from nanogpt.settings import settings
from nanogpt.tokenizer import Tokenizer

def tokenizer(texts, n_vocab=700): return Tokenizer.train(texts, n_vocab)

def _shape(tok, block, layers):
    return GPTConfig(vocab_size=tok.n_vocab, block_size=block, n_layer=layers, n_head=2, n_embd=64, position="learned", tied=False)

def speaker(tok, script, block=4096, layers=1, loop=False):
    """A GPT that says a script, a list of ids, after whatever it is asked; more layers only make it slower.

    Each token of the script brings the next; so none may come twice, and the first follows <|assistant|>. With `loop`
    the place in the text decides, whatever the tokens are: it goes round and round and begins somewhere."""
    model, dice = GPT(_shape(tok, block, layers)).eval(), torch.Generator().manual_seed(0)
    code = torch.randn(tok.n_vocab, 64, generator=dice)
    code = (code-code.mean(-1, keepdim=True))/code.std(-1, keepdim=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name: p.zero_()                           # neither attention nor the small network says anything
        wte, wpe = model.transformer.wte.weight.zero_(), model.transformer.wpe.weight.zero_()
        if loop: wpe.copy_(code[[script[(p+1)%len(script)] for p in range(block)]])
        else:
            before = [tok.specials["<|assistant|>"], *script[:-1]]
            assert len(set(before))==len(before), f"a token comes twice in {tok.decode(script)!r}"
            wte[before] = code[script]
        model.lm_head.weight.copy_(code)
    return model

def save_speaker(folder, tok, text, base=None, end=True, **more):
    "A run whose model says this text, and then the end, if there is one; tuned from `base`, if there is one."
    model = speaker(tok, tok.encode(text)+[tok.specials["<|end|>"]]*end, **more)
    made, kind = dict(out=str(folder)) | (dict(init=str(base)) if base else {}), "SFTConfig" if base else "TrainConfig"
    write_json(folder/"config.json", dict(kind=kind, settings=made, model=settings(model.cfg)))
    (folder/"log.jsonl").write_text("")
    save_model(folder/"model", model, tok)
    return folder
