"A headless Chromium for tests; where there is none, it is installed if that is allowed, else the tests say why they skip."
import contextlib
import os
import shutil
import socket
import subprocess

import pytest

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()

def chromium():
    "The browser's path. Debian's own package is installed when the tests run as root; a desktop's Chrome will do as well."
    names = ("chromium", "chromium-browser", "google-chrome")
    find = lambda: next(filter(None, map(shutil.which, names)), None)
    if not find() and shutil.which("apt-get") and os.geteuid()==0:
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-q", *words], capture_output=True, timeout=600)
    return find() or pytest.skip("there is no Chromium, and it cannot be installed without root: apt install chromium")

@contextlib.contextmanager
def browser(folder, width=1280, height=900):
    "A page of a fresh browser whose profile lies in this folder."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        size = dict(width=width, height=height)
        at = p.chromium.launch_persistent_context(str(folder), executable_path=chromium(), headless=True, args=FLAGS, viewport=size)
        try: yield at.new_page()
        finally: at.close()

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
