"""What one text says about many shards."""

import pytest

from profusion.decoding import PictureError
from profusion.pretraining.patterns import shards


@pytest.mark.parametrize(
    "where, expected",
    [
        ("a.tar", ["a.tar"]),
        ("a/{08..11}.tar", ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]),
        ("a/{8..10}.tar", ["a/8.tar", "a/9.tar", "a/10.tar"]),
        ("a/{002..0}.tar", ["a/002.tar", "a/001.tar", "a/000.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,b{1..2}}.tar,c.tar", ["a.tar", "b1.tar", "b2.tar", "c.tar"]),
        ("a.tar,,b.tar", ["a.tar", "b.tar"]),
        ("pipe:cat {0..1}.tar", ["pipe:cat 0.tar", "pipe:cat 1.tar"]),
        ("pipe:cat a.tar,pipe:cut -d, -f1 b", ["pipe:cat a.tar", "pipe:cut -d, -f1 b"]),
        ("a.tar,pipe:cat b.tar", ["a.tar", "pipe:cat b.tar"]),
        ("pipe:cat ${HOME}/{0..1} | awk '{print}'", [f"pipe:cat ${{HOME}}/{n} | awk '{{print}}'" for n in (0, 1)]),
        ("pipe:curl -sfL https://host/{0..1}.tar", [f"pipe:curl -sfL https://host/{n}.tar" for n in (0, 1)]),
        ("a{b.tar", ["a{b.tar"]),
    ],
)
def test_braces_and_commas(where, expected):
    assert shards(where) == expected


def test_globs_are_the_files_that_are_there_by_name(tmp_path):
    for name in ("2.tar", "1.tar", "3.txt"):
        (tmp_path / name).touch()
    (tmp_path / "4.tar").mkdir()
    assert shards(f"{tmp_path}/*.tar") == [f"{tmp_path}/1.tar", f"{tmp_path}/2.tar"]
    assert shards(f"{tmp_path}/[23].t*") == [f"{tmp_path}/2.tar", f"{tmp_path}/3.txt"]
    with pytest.raises(PictureError, match=r"no file fits .*\*\.zip"):
        shards(f"{tmp_path}/*.zip")


@pytest.mark.parametrize("name", ["a,b.tar", "{0..1}.tar", "a*[1].tar"])
def test_a_file_of_a_strange_name_is_that_file(tmp_path, name):
    (tmp_path / name).touch()
    assert shards(f"{tmp_path}/{name}") == [f"{tmp_path}/{name}"]


@pytest.mark.parametrize("where", ["https://host/{0..3}.tar", "s3://bucket/0.tar"])
def test_an_address_needs_a_command(where):
    with pytest.raises(PictureError, match="is not on this machine: give a command that writes it out, such as 'pipe"):
        shards(where)


@pytest.mark.parametrize("where", ["{0..99999999}.tar", "{0..9999}{0..9999}.tar"])
def test_too_many_are_refused_at_once(where):
    with pytest.raises(PictureError, match="names more than 100,000 shards"):
        shards(where)
