"""A bibliography style whose labels are the catalog's numbers: [172] is row 172.

Entries outside the catalog have no number; they are labelled by their key.
"""

from __future__ import annotations

from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as UnsortedStyle
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle


class CatalogLabels(BaseLabelStyle):
    def format_labels(self, sorted_entries):
        for entry in sorted_entries:
            yield entry.fields.get("number", entry.key)


class CatalogOrder(BaseSortingStyle):
    def sorting_key(self, entry):
        number = entry.fields.get("number", "")
        return (not number, number, entry.key)


class CatalogStyle(UnsortedStyle):
    default_label_style = CatalogLabels
    default_sorting_style = CatalogOrder


def setup(app):
    register_plugin("pybtex.style.formatting", "catalog_numbers", CatalogStyle)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
