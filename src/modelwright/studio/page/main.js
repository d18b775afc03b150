// The conversation: asking, showing the answer while it is written, and what to say when something goes wrong.

import { ask, askInChat, newChat, readInfo } from "./api.js";
import { listChats } from "./chats.js";
import { openPanel } from "./panel.js";

const $ = (id) => document.getElementById(id);
const MODES = {
  extractive: {
    badge: "Exact quotes",
    headline: "Ask the documents",
    lead: (count) =>
      `Every answer is quoted word for word from ${count}, and each quote opens the place it comes from. ` +
      "What the documents do not say is not answered.",
    waiting: "Searching the documents…",
  },
  generated: {
    badge: "Written by a model",
    headline: "Ask the documents",
    lead: (count) =>
      `A language model writes the answers from passages that it finds in ${count}. ` +
      "It can be wrong: each number opens the passage, so that you can check what matters.",
    waiting: "Searching the documents…",
  },
  chat: {
    badge: "Model without documents",
    headline: "Ask the model",
    lead: () => "A language model answers from memory, with no documents to check it against. It can be wrong.",
    waiting: "Writing…",
  },
};

let info = null;
let running = null; // the AbortController of the answer being written
let chat = null; // the id of the conversation that the server keeps, for a model without documents

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

async function start() {
  try {
    info = await readInfo();
  } catch (error) {
    const box = notice(error.message, "Try again", start);
    $("lead").replaceChildren(box);
    return;
  }
  const mode = MODES[info.mode];
  const count = info.num_documents === 1 ? "1 document" : `${info.num_documents.toLocaleString("en")} documents`;
  $("name").textContent = info.name;
  $("badge-mode").textContent = mode.badge;
  $("badge-count").textContent = info.num_documents ? ` · ${count}` : "";
  $("badge").hidden = false;
  $("headline").textContent = document.title = mode.headline;
  $("lead").textContent = mode.lead(count);
  $("more").hidden = info.mode === "extractive";
  $("examples").replaceChildren(...info.examples.map(example));
  $("examples-box").hidden = info.examples.length === 0;
  if (info.mode === "chat") refreshChats();
}

function showWelcome(isShown) {
  $("welcome").classList.toggle("hidden", !isShown); // its heading stays for those who hear the page
  $("lead").hidden = !isShown;
  $("more").hidden = !isShown || !info || info.mode === "extractive";
  $("examples-box").hidden = !isShown || !info?.examples.length;
  $("restart").hidden = isShown;
}

function example(question) {
  const button = make("button", "", question);
  button.type = "button";
  button.addEventListener("click", () => submit(question));
  const item = make("li");
  item.append(button);
  return item;
}

async function submit(question) {
  if (running || !question.trim()) return;
  if (!info) await start();
  if (!info) return;
  showWelcome(false);
  const exchange = make("article", "exchange");
  exchange.append(make("h2", "asked", question.trim()));
  $("conversation").append(exchange);
  exchange.scrollIntoView({ block: "start" });
  $("question").focus({ preventScroll: true });
  await answer(exchange, question.trim());
}

/** Write the answer to a question into its exchange. */
async function answer(exchange, question) {
  const mode = MODES[info.mode];
  const body = make("div", "answer is-waiting", mode.waiting);
  exchange.append(body);
  let text = "";
  let last = {};
  setRunning(new AbortController(), mode.waiting);
  try {
    for await (const piece of piecesOf(question, running.signal)) {
      if (piece.text) {
        text += piece.text;
        body.className = "answer is-writing";
        body.replaceChildren(...paragraphs(text.trim(), null));
      } else {
        last = piece;
      }
    }
    finish(exchange, body, text, last);
    if (info.mode === "chat") refreshChats();
  } catch (error) {
    body.className = "answer";
    if (!text) body.remove();
    if (error.name === "AbortError") {
      exchange.append(make("p", "note", "Stopped. The answer above may be incomplete."));
      setRunning(null, "Stopped.");
    } else {
      exchange.append(notice(error.message, "Ask again", () => retry(exchange, question)));
      setRunning(null, "");
    }
    return;
  }
  const count = last.citations?.length ?? 0;
  setRunning(null, count ? `The answer is complete, with ${count} source${count > 1 ? "s" : ""}.` : "The answer is complete.");
}

/** The documents answer each question by itself; a model is asked in a conversation that the server keeps. */
async function* piecesOf(question, signal) {
  if (info.mode !== "chat") {
    yield* ask(info.model, [{ role: "user", content: question }], signal);
    return;
  }
  chat ??= await newChat();
  yield* askInChat(chat, question, signal);
}

const refreshChats = () => listChats(chat, openChat, restart);

/** Show a conversation that was kept, and go on with it. */
function openChat(kept) {
  running?.abort();
  chat = kept.id;
  showWelcome(false);
  const exchanges = [];
  for (const turn of kept.turns) {
    if (turn.role === "user") {
      exchanges.push(make("article", "exchange"));
      exchanges.at(-1).append(make("h2", "asked", turn.content));
    } else {
      const body = make("div", "answer");
      body.append(...paragraphs(turn.content.trim(), []));
      exchanges.at(-1)?.append(body);
    }
  }
  $("conversation").replaceChildren(...exchanges);
  exchanges.at(-1)?.scrollIntoView({ block: "start" });
  refreshChats();
  $("question").focus({ preventScroll: true });
}

function restart() {
  running?.abort();
  chat = null;
  $("conversation").replaceChildren();
  showWelcome(true);
  if (info?.mode === "chat") refreshChats();
  $("question").focus();
}

function retry(exchange, question) {
  if (running) return;
  exchange.replaceChildren(exchange.firstChild);
  $("question").focus({ preventScroll: true });
  answer(exchange, question);
}

function finish(exchange, body, text, last) {
  const citations = last.citations ?? [];
  body.className = "answer";
  body.classList.toggle("is-unsupported", last.is_supported === false);
  body.replaceChildren(...paragraphs(text.trim(), citations));
  if (!text.trim()) {
    body.remove();
    exchange.append(make("p", "note", "The answer is empty."));
  }
  if (last.finish_reason === "length") {
    exchange.append(make("p", "note", "The answer reached its greatest length and may be incomplete."));
  }
  if (citations.length) exchange.append(sources(citations, last.mode));
  if (last.is_supported === false && last.mode === "extractive") {
    exchange.append(make("p", "note", "No passage supports an answer well enough to be quoted. Other words may find one."));
  }
}

// Code and tables keep their lines and columns, lists their lines; a paragraph that was only wrapped at some width
// flows anew.
const CODE = /^\s*(?:>>> |\.\.\. |\$ |\||```|~~~|@\w|import \w)|^\s*(?:def|class|for|while|with|if|elif|else|try)\b.*:\s*$/m;
const LIST = /^\s*(?:#{1,6} |[-*+•] |\d{1,3}[.)] |:\w)/m;

/** The answer as paragraphs, with something to press in the place of each [1]; `citations` is null while it is written. */
function paragraphs(text, citations) {
  let isFenced = false;
  const blocks = text.split(/\n[ \t]*\n/).filter((block) => block.trim());
  return blocks.map((block) => {
    const isCode = isFenced || CODE.test(block);
    const paragraph = make("p", isCode ? "as-written code" : LIST.test(block) ? "as-written" : "");
    if (block.split("```").length % 2 === 0) isFenced = !isFenced;
    paragraph.append(...withMarkers(block, citations));
    return paragraph;
  });
}

function withMarkers(text, citations) {
  const at = new Map((citations ?? []).map((citation, position) => [String(citation.number), position]));
  const parts = text.split(/(\S{0,24} ?)\[(\d{1,3})\]/); // words, the last word, the number, and again
  const shown = [];
  for (let i = 0; i < parts.length; i += 3) {
    shown.push(parts[i]);
    const [word, number] = parts.slice(i + 1, i + 3);
    if (number === undefined) break;
    if (citations !== null && !at.has(number)) {
      shown.push(`${word}[${number}]`);
      continue;
    }
    const kept = make("span", "kept", word); // a mark never stands on a line without its word
    kept.append(citations === null ? make("span", "cite", number) : cite(citations, at.get(number)));
    shown.push(kept);
  }
  return shown;
}

function sources(citations, mode) {
  const section = make("section", "sources");
  section.append(make("h3", "label", citations.length === 1 ? "Source" : "Sources"));
  const list = make("ul");
  // A quoted answer has shown the words already, so each document is named once; a written one shows its passages.
  list.append(...(mode === "extractive" ? byDocument(citations) : citations.map((c, at) => passage(citations, at))));
  section.append(list);
  return section;
}

function byDocument(citations) {
  const documents = new Map();
  citations.forEach((citation, at) => {
    documents.set(citation.doc, [...(documents.get(citation.doc) ?? []), at]);
  });
  return [...documents].map(([doc, places]) => {
    const item = make("li", "source source-document");
    item.append(make("span", "source-name", doc), ...places.map((at) => cite(citations, at)));
    return item;
  });
}

function passage(citations, at) {
  const citation = citations[at];
  const button = make("button", "source");
  button.type = "button";
  button.append(
    make("span", "source-number", String(citation.number)),
    make("span", "source-name", citation.doc),
    make("span", "source-quote", citation.quote),
  );
  button.addEventListener("click", () => openPanel(citations, at));
  const item = make("li");
  item.append(button);
  return item;
}

function cite(citations, at) {
  const { number, doc } = citations[at];
  const button = make("button", "cite", String(number));
  button.type = "button";
  button.setAttribute("aria-label", `Source ${number}: ${doc}`);
  button.addEventListener("click", () => openPanel(citations, at));
  return button;
}

function notice(words, action, run) {
  const box = make("div", "notice");
  box.setAttribute("role", "alert");
  box.append(make("span", "", words));
  const button = make("button", "", action);
  button.type = "button";
  button.addEventListener("click", run);
  box.append(button);
  return box;
}

function setRunning(controller, words) {
  const hadFocus = document.activeElement === $("stop");
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("conversation").setAttribute("aria-busy", String(controller !== null));
  $("status").textContent = words;
  if (hadFocus) $("question").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value;
  if (running || !question.trim()) return;
  $("question").value = "";
  submit(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("restart").addEventListener("click", restart);
start();
