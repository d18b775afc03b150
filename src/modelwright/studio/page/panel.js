// The document panel: shows the whole document of a citation with the cited passage marked and scrolled to.
// A modal dialog, so the browser itself keeps the focus inside, closes on Escape and gives the focus back.

import { readDocument } from "./api.js";

const $ = (id) => document.getElementById(id);
const kept = new Map(); // documents already read, by id
const MOST_KEPT = 8;
let citations = [];
let position = 0;
let opener = null;

/** Open the panel on citation `at` of an answer's citations. */
export function openPanel(all, at) {
  citations = all;
  opener = document.activeElement;
  if (!$("panel").open) $("panel").showModal();
  show(at);
  $("panel-body").focus({ preventScroll: true });
}

async function show(at) {
  position = at;
  const citation = citations[at];
  $("panel-place").textContent = `Source ${citation.number} of ${citations.length}`;
  $("panel-title").textContent = citation.doc;
  $("panel-previous").disabled = at === 0;
  $("panel-next").disabled = at === citations.length - 1;
  note("Opening the document…");
  $("panel-text").replaceChildren();
  try {
    const found = await read(citation.doc);
    if (citations[position] !== citation) return; // the reader has moved on
    note("");
    $("panel-title").textContent = found.title || found.id;
    render(found.text, citation);
  } catch (error) {
    if (citations[position] === citation) note(error.message, true);
  }
}

async function read(id) {
  if (!kept.has(id)) {
    const found = await readDocument(id);
    if (kept.size >= MOST_KEPT) kept.delete(kept.keys().next().value);
    kept.set(id, found);
  }
  return kept.get(id);
}

/** Put the text in as three text nodes, the middle one marked. Never as HTML: documents are not to be trusted. */
function render(text, citation) {
  const start = unitIndex(text, 0, 0, citation.start);
  const end = unitIndex(text, start, citation.start, citation.end);
  const mark = document.createElement("mark");
  mark.textContent = text.slice(start, end);
  $("panel-text").replaceChildren(text.slice(0, start), mark, text.slice(end));
  mark.scrollIntoView({ block: "center", behavior: "instant" });
}

/** Turn an offset in characters, as the server counts, into one in UTF-16 units, as the browser does. */
export function unitIndex(text, unit, character, wanted) {
  while (character < wanted && unit < text.length) {
    unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
    character += 1;
  }
  return unit;
}

function note(words, isBad = false) {
  $("panel-note").textContent = words;
  $("panel-note").classList.toggle("is-bad", isBad);
}

$("panel-previous").addEventListener("click", () => show(position - 1));
$("panel-next").addEventListener("click", () => show(position + 1));
$("panel-close").addEventListener("click", () => $("panel").close());
$("panel").addEventListener("click", (event) => {
  if (event.target === $("panel")) $("panel").close(); // the backdrop
});
$("panel").addEventListener("close", () => {
  $("panel-text").replaceChildren();
  opener?.focus();
});
