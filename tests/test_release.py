"""A release says one version everywhere, and asks for what it is tested with."""

import re
import sys
from pathlib import Path

import pytest

import pyrodiff

ROOT = Path(pyrodiff.__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def test_the_version_is_the_newest_of_the_changelog_and_the_one_to_cite():
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == pyrodiff.__version__
    assert re.search(r"^version: (\S+)", read("CITATION.cff"), re.MULTILINE)[1] == pyrodiff.__version__


def test_versions_fall_from_the_top_of_the_changelog():
    versions = [numbers(one) for one in re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)]
    assert versions == sorted({*versions}, reverse=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_what_set_up_installs_is_in_the_range_that_the_package_asks_for():
    import tomllib

    asked = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    least = dict(one.split(">=") for one in asked if ";" not in one)
    for line in read("constraints.txt").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert numbers(version) >= numbers(least[name]), line
