"""The shipped genomes against what is known of them."""

from collections import Counter

import pytest
import torch

from corelib.data import GENOMES, build_numbers, dna, dna_ids, reverse_complement


def test_lengths_and_composition():
    assert Counter(dna("phix174")) == {"T": 1684, "A": 1291, "G": 1254, "C": 1157}
    assert len(dna("chloroplast")) == 154_478
    for name in GENOMES:
        assert set(dna(name)) == set("ACGT")


def test_the_chloroplast_repeats_itself_on_the_other_strand():
    """Its two inverted repeats, 26,264 bases each: a dependency over a hundred thousand bases."""
    letters = dna("chloroplast")
    stretch = letters[90_000:90_200]
    other = "".join("TGCA"["ACGT".index(base)] for base in reversed(stretch))
    assert letters.count(other) == 1 and letters.index(other) > 128_000


def test_phage_gene_a_star_ends_where_it_should():
    """Gene D overlaps gene E in another reading frame; D runs from 390 to 848 (1-based)."""
    gene = dna("phix174")[389:848]
    assert gene[:3] == "ATG" and gene[-3:] in ("TAA", "TAG", "TGA")
    codons = {gene[i : i + 3] for i in range(0, len(gene) - 3, 3)}
    assert not codons & {"TAA", "TAG", "TGA"}


def test_ids_and_the_other_strand():
    ids = dna_ids("AACGT")
    assert ids.tolist() == [0, 0, 1, 2, 3]
    assert reverse_complement(ids).tolist() == dna_ids("ACGTT").tolist()
    both = torch.stack([ids, ids.flip(0)])
    assert torch.equal(reverse_complement(reverse_complement(both)), both)


def test_genbank_records_are_read_to_their_end():
    record = "LOCUS x\nORIGIN\n        1 acgt ac\n       61 tt\n//\nLOCUS y\nORIGIN\n 1 g\n//\n"
    assert build_numbers.genbank_sequence(record) == "ACGTACTT"


@pytest.mark.no_shape_checks
def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="name: expected one of .*phix174"):
        dna("lambda")
    with pytest.raises(FileNotFoundError, match="python -m corelib.data.build"):
        dna("phix174", folder=tmp_path)
    with pytest.raises(ValueError, match="letters: expected only ACGT, got 'N'"):
        dna_ids("ACNT")
