// Two small things, both without a network: the catalog's filter, and search results that ask for
// no summaries when the book is read from a file (a browser refuses to fetch them there).
"use strict";

if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// "LeanAttention", "lean attention" and "lean_attention" are one word to the filter.
const squash = (text) => text.normalize("NFKD").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "");

function addFilter(table) {
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row,
    text: squash(row.textContent),
    part: row.cells[2].textContent.trim(),
    works: row.querySelector(".works") !== null,
  }));
  const parts = [...new Set(rows.map((entry) => entry.part))].sort();
  const form = document.createElement("form");
  form.className = "catalog-filter";
  form.innerHTML =
    '<input type="search" placeholder="Title, name, number…" aria-label="Filter papers by text">' +
    '<select aria-label="Filter papers by part"><option value="">All parts</option></select>' +
    '<label><input type="checkbox"> only what works</label><output aria-live="polite"></output>';
  const [words, part, only] = form.querySelectorAll("input[type=search], select, input[type=checkbox]");
  for (const name of parts) part.add(new Option(name, name));
  const update = () => {
    const wanted = words.value.split(/\s+/).map(squash).filter(Boolean);
    let shown = 0;
    for (const entry of rows) {
      const fits =
        wanted.every((word) => entry.text.includes(word)) &&
        (!part.value || entry.part === part.value) &&
        (!only.checked || entry.works);
      entry.row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  (table.closest(".pst-scrollable-table-container") || table).before(form);
  const query = new URLSearchParams(location.search);
  words.value = query.get("find") || "";
  update();
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.catalog")) addFilter(table);
});
