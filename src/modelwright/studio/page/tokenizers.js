// The page of tokenizers: the text goes to the server a moment after the last key, and comes back split.

import { readTokenizers, tokenize } from "./api.js";

const $ = (id) => document.getElementById(id);
const WAIT = 150; // milliseconds after the last key
const SAMPLES = {
  English: "Tokenizers split text into pieces; antidisestablishmentarianism is one word, but rarely one token.",
  German: "Die Datenschutzgrundverordnung gilt seit dem 25. Mai 2018 für Donaudampfschifffahrtsgesellschaften.",
  Japanese: "吾輩は猫である。名前はまだ無い。",
  Hindi: "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
  Code: "def wrap(text, width=70):\n    return [line for line in text.split('\\n') if len(line) < width]",
  Numbers: "1234567890 + 3.14159 = 1,234,567,893.14159",
  Emoji: "👩‍👩‍👧 family, 🏳️‍🌈 flag, 👍🏽 thumb",
};

let timer = 0;
let running = null; // the AbortController of the question on its way

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function number(value, digits = 0) {
  return value === null ? "–" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

/** One token as a list item: spaces as dots, a new line as an arrow before it, bytes of no character in hexadecimal. */
function patch(token, at, withIds) {
  const item = make("li", `p${at % 4}${token.special ? " is-unknown" : ""}`);
  item.title = `id ${token.id}`;
  if (token.bytes !== undefined) {
    item.append(make("span", "hex", token.bytes));
  } else {
    for (const part of token.text.split(/([ \t\n])/)) {
      if (part === " ") item.append(make("span", "space", "·"));
      else if (part === "\t") item.append(make("span", "space", "⇥"));
      else if (part === "\n") item.append(make("span", "space", "⏎"), "\n");
      else if (part) item.append(part);
    }
  }
  if (withIds) item.append(make("span", "number", String(token.id)));
  return item;
}

function column(one, withIds) {
  const section = make("section", "column");
  const heading = make("h2", "", one.name);
  heading.id = `column-${one.name}`;
  section.setAttribute("aria-labelledby", heading.id);
  const list = make("ol", "tokens");
  list.setAttribute("aria-label", `Tokens of ${one.name}`);
  list.append(...one.tokens.map((token, at) => patch(token, at, withIds)));
  const lost = numUnknown(one);
  const count = `${number(one.num_tokens)} tokens${lost ? `, ${number(lost)} of them unknown: that text is lost` : ""}`;
  section.append(heading, make("p", "count", count), list);
  return section;
}

/** How many tokens stand for what a tokenizer cannot say. */
function numUnknown(one) {
  return one.tokens.filter((token) => token.special).length;
}

function figures(all) {
  const fewest = Math.min(...all.filter((one) => !numUnknown(one)).map((one) => one.num_tokens));
  return all.map((one) => {
    const row = make("tr");
    const name = make("th", "", one.name);
    name.scope = "row";
    row.append(
      name,
      make("td", all.length > 1 && one.num_tokens === fewest ? "is-best" : "", number(one.num_tokens)),
      make("td", "", number(one.bytes_per_token, 2)),
      make("td", "", number(one.tokens_per_word, 2)),
      make("td", "", number(one.vocab_size)),
    );
    return row;
  });
}

let last = [];

function draw() {
  const withIds = $("ids").getAttribute("aria-pressed") === "true";
  $("figures").replaceChildren(...figures(last));
  $("columns").replaceChildren(...last.map((one) => column(one, withIds)));
  $("figures-box").hidden = last.length === 0;
}

/** Say what is shown to those who hear the page, and note how long a text it is about. */
function tell(words, text) {
  $("status").textContent = words;
  $("status").dataset.chars = text.length;
}

async function split() {
  running?.abort();
  running = new AbortController();
  const mine = running;
  const text = $("text").value;
  if (!text) {
    last = [];
    draw();
    $("problem").replaceChildren();
    tell("", "");
    return;
  }
  try {
    const found = await tokenize(text, mine.signal);
    last = found.tokenizers;
    draw();
    $("problem").replaceChildren();
    tell(last.map((one) => `${one.name}: ${one.num_tokens} tokens`).join(", "), text);
  } catch (error) {
    if (error.name === "AbortError") return;
    const box = make("div", "notice");
    box.setAttribute("role", "alert");
    const again = make("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", split);
    box.append(make("span", "", error.message), again);
    $("problem").replaceChildren(box);
  }
}

function sample([name, text]) {
  const button = make("button", "", name);
  button.type = "button";
  button.addEventListener("click", () => {
    $("text").value = text;
    split();
  });
  const item = make("li");
  item.append(button);
  return item;
}

async function start() {
  $("samples").replaceChildren(...Object.entries(SAMPLES).map(sample));
  $("text").value = SAMPLES.English;
  try {
    const { tokenizers, max_text_chars: most } = await readTokenizers();
    $("badge").textContent = tokenizers.length === 1 ? "1 tokenizer" : `${tokenizers.length} tokenizers`;
    $("badge").hidden = false;
    $("text").maxLength = most;
    $("limit").textContent = `At most ${number(most)} characters. Nothing is kept.`;
  } catch {
    // what is wrong is told by the question that follows
  }
  await split();
}

$("text").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(split, WAIT);
});
$("ids").addEventListener("click", () => {
  const isOn = $("ids").getAttribute("aria-pressed") !== "true";
  $("ids").setAttribute("aria-pressed", String(isOn));
  draw();
});
$("form").addEventListener("submit", (event) => event.preventDefault());
start();
