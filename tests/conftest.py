import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture
def root(): return ROOT

@pytest.fixture
def run_folder(tmp_path):
    "A folder a test may train into; it is gone afterwards."
    return tmp_path/"run"

@pytest.fixture
def env():
    "The environment of a child process: the source tree on the path, few threads, no network, pictures without a screen."
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

@pytest.fixture
def data_home():
    "The folder of real data, for tests that need it; everything else must pass without."
    folder = os.environ.get("NANOGPT_DATA")
    if not folder: pytest.skip("NANOGPT_DATA is not set: this test reads real data (CONTRIBUTING.md says which)")
    if not Path(folder).is_dir(): pytest.skip(f"NANOGPT_DATA={folder} is not a folder: this test reads real data")
    return Path(folder)

@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    "A small vocabulary and a few thousand tokens of tales, prepared by the program itself; a folder for --data and --tokenizer."
    from mini import run
    home = tmp_path_factory.mktemp("shards")
    run("tokenizer", "--corpus", "tales", "--vocab_size", 400, "--tokenizer_bytes", 60_000, "--out", home/"t")
    run("data", "--corpus", "tales", "--tokens", 8000, "--tokenizer", home/"t", "--out", home/"d")
    return home/"d"

@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    "A tiny pretraining that nobody stopped."
    from mini import PRETRAIN, run
    out = tmp_path_factory.mktemp("whole")/"base"
    run(*PRETRAIN, "--data", shards, "--out", out)
    return out

@pytest.fixture(scope="session")
def tuned(whole):
    "A tiny instruction tuning of it that nobody stopped."
    from mini import SFT, run
    run(*SFT, "--init", whole, "--out", whole.parent/"tuned")
    return whole.parent/"tuned"

@pytest.fixture
def call(capsys, monkeypatch):
    "Runs a verb in this process, which is quick; gives exit code, stdout and stderr."
    for name in ("NANOGPT_DATA", "WORLD_SIZE"): monkeypatch.delenv(name, raising=False)
    from nanogpt.cli import main
    def call(*words):
        capsys.readouterr()
        code = main([str(w) for w in words])
        return (code, *capsys.readouterr())
    return call
