"Builds the package. Everything but the version is read from settings.ini; the version stands in nanogpt/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])  # not ":", which entry points contain
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_name"]
version = re.search(r'^__version__\s*=\s*"([^"]+)"', (here/lib/"__init__.py").read_text(encoding="utf-8"), re.M)[1]
kinds = ["*.json", "*.gz", "*.LICENSE", "*.j2", "*.css", "*.js", "py.typed"]  # data that travels inside the package

setup(
    name=lib, version=version, description=cfg["description"], license=cfg["license"],
    author=cfg["author"], keywords=cfg["keywords"].split(),
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"],
    # the built lessons stand beside the package in a checkout and travel inside it in a wheel
    packages=[*find_packages(include=[lib, lib + ".*"]), lib + ".course_lessons"], package_dir={lib + ".course_lessons": "lessons"},
    package_data={lib: kinds + ["**/" + k for k in kinds], lib + ".course_lessons": ["*.ipynb"]},
    install_requires=cfg["requirements"].split(), extras_require={k: cfg[f"{k}_requirements"].split() for k in ("dev", "bench")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
