"A headless Chromium for tests."
import contextlib
import socket

from mini import program

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()

def chromium():
    "The browser's path; a desktop's Chrome will do as well."
    return program("chromium", "chromium", "chromium-browser", "google-chrome")

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
